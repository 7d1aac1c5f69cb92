"""What the user asks for: an `OffloadPolicy` per component, checked before anything is touched."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

GRANULARITIES = ("resident", "model", "block", "phase", "leaf")
STREAMING = ("block", "phase", "leaf")  # of these, what comes in units, which take turns on the device


@dataclass(frozen=True)
class OffloadPolicy:
    """How one component is offloaded.

    Args:
        granularity: "resident" keeps the component on the device, "model" brings it as a whole when it
            runs and sends it away afterwards. The others stream it: "block" by block, "phase" by phase
            (the attentions, feed-forwards and norms of each block), "leaf" layer by layer.
        ratio: share of the units' bytes that streams, 0.0 to 1.0; the rest stays on the device, spread
            evenly over the order. Only with the granularities that stream.

    Raises:
        ValueError: an unknown granularity, a ratio outside 0-1 or one that has no blocks to go with.
    """

    granularity: str = "block"
    ratio: float = 1.0

    def __post_init__(self) -> None:
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"granularity={self.granularity!r} is not known; use one of {', '.join(map(repr, GRANULARITIES))}"
            )
        object.__setattr__(self, "ratio", check_ratio("ratio", self.ratio))
        if self.ratio != 1.0 and not self.streams:
            raise ValueError(
                f"ratio={self.ratio} goes with granularity='block', 'phase' or 'leaf', "
                f"not {self.granularity!r}: leave it out"
            )

    @property
    def streams(self) -> bool:
        """Whether the component's weights take turns on the device."""
        return self.granularity in STREAMING


def check_ratio(name: str, value: float) -> float:
    """`value` as a float between 0.0 and 1.0; `name` is what the message calls it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"{name}={value!r} is not a number; use one between 0.0 (all stays) and 1.0 (all streams)"
        )
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name}={value!r} is outside 0.0-1.0; 0.0 keeps every block on the device, 1.0 none"
        )
    return float(value)


def parse_bytes(name: str, value: int | str | None) -> int | None:
    """A size such as "10GiB" or 10737418240 in bytes; `name` is what the message calls it.

    Raises:
        ValueError: `value` is no positive size.
    """
    if value is None:
        return None
    from accelerate.utils.modeling import convert_file_size_to_int  # heavy, and few ask for it

    try:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError
        nbytes = convert_file_size_to_int(value)
    except (ValueError, OverflowError):  # "infGiB"
        raise ValueError(f"{name}={value!r} is not a size; use bytes, or a string such as '10GiB'") from None
    if nbytes <= 0:
        raise ValueError(f"{name}={value!r} is not positive; use bytes, or a string such as '10GiB'")
    return nbytes


@dataclass(frozen=True)
class Request:
    """One call of `enable_block_offload`: the policy of every component, and which were asked for by name."""

    default: OffloadPolicy
    by_name: Mapping[str, OffloadPolicy]
    decides: bool = False  # what of a component streams is left to us

    def policy_for(self, component: str) -> OffloadPolicy:
        return self.by_name.get(component, self.default)


def parse_request(
    offload_granularity: str,
    offload_ratio: float | None,
    components: Mapping[str, str | OffloadPolicy] | None,
    known: tuple[str, ...],
) -> Request:
    """Turn the arguments of `enable_block_offload` into a `Request`.

    Args:
        known: names of the pipeline's components that are modules.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and what to write instead.
    """
    if offload_granularity not in GRANULARITIES:
        raise ValueError(
            f"offload_granularity={offload_granularity!r} is not known; "
            f"use one of {', '.join(map(repr, GRANULARITIES))}"
        )
    default = OffloadPolicy(granularity=offload_granularity)
    ratio = None
    if offload_ratio is not None:
        ratio = check_ratio("offload_ratio", offload_ratio)
        if default.streams:
            default = replace(default, ratio=ratio)
        elif ratio != 1.0:
            raise ValueError(
                f"offload_ratio={offload_ratio} goes with offload_granularity='block', 'phase' or 'leaf', "
                f"not {offload_granularity!r}: leave it out"
            )
    if components is not None and not isinstance(components, Mapping):
        raise ValueError(
            f"components={components!r} is not a mapping; use e.g. components={{'vae': 'resident'}}"
        )
    by_name = {}
    for name, wanted in (components or {}).items():
        if name not in known:
            raise ValueError(
                f"components names {name!r}, which this pipeline does not have; "
                f"its components are {', '.join(map(repr, known)) or 'none'}"
            )
        by_name[name] = _parse_policy(name, wanted, ratio)
    return Request(default, by_name, decides=default.streams and offload_ratio is None)


def _parse_policy(name: str, wanted: str | OffloadPolicy, ratio: float | None) -> OffloadPolicy:
    if isinstance(wanted, OffloadPolicy):
        return wanted
    if not isinstance(wanted, str) or wanted not in GRANULARITIES:
        raise ValueError(
            f"components[{name!r}]={wanted!r} is not known; use an OffloadPolicy "
            f"or one of {', '.join(map(repr, GRANULARITIES))}"
        )
    return OffloadPolicy(wanted, 1.0 if ratio is None or wanted not in STREAMING else ratio)
