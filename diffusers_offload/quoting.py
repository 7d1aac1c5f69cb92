"""`quoted`: a value as an error message shows it."""

from __future__ import annotations

_LONGEST = 120  # characters


def quoted(value: object) -> str:
    """`repr(value)`, cut to what fits into a message; never an error of its own."""
    try:
        text = repr(value)
    except Exception:  # an int of too many digits, a list that is nested too deeply
        return f"<{type(value).__name__}>"
    half = _LONGEST // 2
    return text if len(text) <= _LONGEST else f"{text[:half]} ... {text[-half:]}"
