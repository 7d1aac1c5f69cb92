"""What files and folders of the disk tier are called: names for every file system, whatever a component is called."""

from __future__ import annotations

import hashlib
import re


def file_name(block: str) -> str:
    """A file's name for a block's: safe on every file system, different for different blocks."""
    slug = re.sub(r"[^A-Za-z0-9._-]+", "_", block)[:80].lstrip(".")
    return f"{slug}-{hashlib.blake2b(block.encode(), digest_size=6).hexdigest()}.safetensors"


def folder_name(component: str, identity: str) -> str:
    """The name of the folder that holds a component with an identity."""
    slug = re.sub(r"[^A-Za-z0-9_-]+", "_", component)[:80]
    return f"{slug}-{identity[:16]}"
