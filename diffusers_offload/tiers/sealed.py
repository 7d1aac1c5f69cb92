"""Small JSON files of which every byte is checked when they are read."""

from __future__ import annotations

import json
from typing import Any

from . import blockfile
from .strictjson import mapping, parse


def seal(content: dict[str, Any]) -> bytes:
    """`content` as a file holds it, with a digest of itself."""
    body = json.dumps(content, indent=1, ensure_ascii=True)
    return f'{{"digest": "{blockfile.digest(body.encode())}",\n"manifest": {body}}}\n'.encode()


def unseal(raw: bytes) -> dict[str, Any]:
    """What was sealed. Each byte of the file is compared: also those that mean nothing in JSON.

    Raises:
        ValueError: it is not as it was written.
    """
    whole = mapping(parse(raw), "the manifest")
    content = mapping(whole.get("manifest"), "the manifest")
    if seal(content) != raw:
        raise ValueError("it is not as it was written")
    return content
