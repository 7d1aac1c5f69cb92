"""Reads JSON that somebody may have edited: nothing is taken for what it is not. All errors are ValueError."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

_MOST = 64  # dimensions that torch allows


def parse(raw: bytes) -> object:
    """JSON without what Python adds to it: no name twice, no NaN.

    Raises:
        ValueError: it is none.
    """
    try:
        return json.loads(raw.decode(), object_pairs_hook=_once, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("its JSON is nested too deeply") from None
    except ValueError as error:
        raise ValueError(f"its JSON is damaged ({error})") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name twice")
    return found


def _no_constant(word: str) -> None:
    raise ValueError(word)


def _is(kind: type) -> Callable[[object, str], Any]:
    def check(value: object, what: str) -> Any:
        if not isinstance(value, kind):
            raise ValueError(f"{what} is {type(value).__name__}, not {kind.__name__}")
        return value

    return check


mapping, sequence, text = _is(dict), _is(list), _is(str)


def keys(value: Mapping[str, Any], *wanted: str) -> None:
    if set(value) != set(wanted):
        raise ValueError(f"there should be {', '.join(wanted)}, there are {', '.join(value) or 'none'}")


def sizes(value: object, name: str) -> tuple[int, ...]:
    """Numbers of bytes or elements. JSON's true is an int to Python, so the type is asked for exactly."""
    if (
        not isinstance(value, list)
        or len(value) > _MOST
        or any(type(n) is not int or not 0 <= n < 2**63 for n in value)
    ):
        raise ValueError(f"a size or an offset of {name!r} is no number of bytes or elements")
    return tuple(value)
