"""What the user asks for: an `OffloadPolicy` per component, checked before anything is touched."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from .quoting import quoted

GRANULARITIES = ("resident", "model", "block", "phase", "leaf")
STREAMING = ("block", "phase", "leaf")  # of these, what comes in units, which take turns on the device
TIERS = ("pinned", "packed", "disk")
CACHE_POLICIES = ("static", "fifo", "lru")
_MOST_BYTES = 2**63 - 1  # what torch counts sizes in


@dataclass(frozen=True)
class OffloadPolicy:
    """How one component is offloaded.

    Args:
        granularity: "resident" keeps the component on the device, "model" brings it as a whole when it
            runs and sends it away afterwards. The others stream it: "block" by block, "phase" by phase
            (the attentions, feed-forwards and norms of each block), "leaf" layer by layer.
        ratio: share of the units' bytes that streams, 0.0 to 1.0; the rest stays on the device, spread
            evenly over the order; on an accelerator, from the second call on, so that a step is the shortest.
            Only with the granularities that stream.

        tier: where the weights are while they are not on the device: "pinned" (host memory), "packed" (host
            memory, without loss in some 70 % of the bytes) or "disk".

    Raises:
        ValueError: an unknown granularity or tier, a ratio outside 0-1 or one that has no blocks to go with.
    """

    granularity: str = "block"
    ratio: float = 1.0
    tier: str = "pinned"

    def __post_init__(self) -> None:
        check_granularity("granularity", self.granularity)
        check_word("tier", self.tier, TIERS)
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


def check_granularity(name: str, value: str) -> str:
    """`value` if it is a granularity; `name` is what the message calls it."""
    return check_word(name, value, GRANULARITIES)


def check_word(name: str, value: str, words: tuple[str, ...]) -> str:
    """`value` if it is one of `words`; `name` is what the message calls it."""
    # Not everything can be looked up in a tuple: an array is compared element by element.
    if not isinstance(value, str) or value not in words:
        raise ValueError(f"{name}={quoted(value)} is not known; use one of {', '.join(map(repr, words))}")
    return value


def check_ratio(name: str, value: float) -> float:
    """`value` as a float between 0.0 and 1.0; `name` is what the message calls it."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(
            f"{name}={quoted(value)} is not a number; use one between 0.0 (all stays) and 1.0 (all streams)"
        )
    if not 0.0 <= value <= 1.0:
        raise ValueError(
            f"{name}={quoted(value)} is outside 0.0-1.0; use 0.0 to keep every block on the device, 1.0 to keep none"
        )
    return float(value)


def parse_bytes(name: str, value: int | str | None) -> int | None:
    """A size such as "10GiB" or 10737418240 in bytes; `name` is what the message calls it.

    Raises:
        ValueError: `value` is no positive size, or more bytes than can be counted.
    """
    if value is None:
        return None
    from accelerate.utils.modeling import convert_file_size_to_int  # heavy, and few ask for it

    try:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise ValueError
        nbytes = convert_file_size_to_int(value)
    except (ValueError, OverflowError):  # "infGiB" is a number, too
        raise ValueError(
            f"{name}={quoted(value)} is not a size; use bytes, or a string such as '10GiB'"
        ) from None
    if nbytes <= 0:
        raise ValueError(f"{name}={quoted(value)} is not positive; use bytes, or a string such as '10GiB'")
    if nbytes > _MOST_BYTES:
        raise ValueError(
            f"{name}={quoted(value)} is more than any memory holds; use bytes, or a string such as '10GiB'"
        )
    return nbytes


@dataclass(frozen=True)
class Storage:
    """How weights are kept on disk.

    Attributes:
        directory: holds a folder per component and content.
        workers: threads that read.
        cache_policy: "static", "fifo" or "lru": what of it host memory keeps.
        packs: what is written is packed; None: if the device unpacks fast.
    """

    directory: Path
    workers: int = 2
    cache_policy: str = "static"
    packs: bool | None = None


def parse_storage(
    offload_dir: str | os.PathLike | None,
    num_disk_workers: int,
    cache_policy: str,
    pack_on_disk: bool | None = None,
) -> Storage | None:
    """The arguments of the disk tier; None if there is no folder for it.

    Raises:
        ValueError: one of them is wrong.
    """
    if isinstance(num_disk_workers, bool) or not isinstance(num_disk_workers, int) or num_disk_workers < 1:
        raise ValueError(
            f"num_disk_workers={quoted(num_disk_workers)} is no number of threads; use 1 or more, 2 to 4 for most disks"
        )
    check_word("cache_policy", cache_policy, CACHE_POLICIES)
    check_packing("pack_on_disk", pack_on_disk)
    if offload_dir is None:
        return None
    if not isinstance(offload_dir, (str, os.PathLike)) or not str(offload_dir):
        raise ValueError(
            f"offload_dir={quoted(offload_dir)} is no path; use a folder with room for the weights"
        )
    if "\0" in str(offload_dir):
        raise ValueError(
            f"offload_dir={quoted(offload_dir)} cannot be a path; use a folder with room for the weights"
        )
    return Storage(Path(offload_dir).expanduser(), num_disk_workers, cache_policy, pack_on_disk)


def check_packing(name: str, value: bool | None) -> bool | None:
    """`value` if it says whether to pack; `name` is what the message calls it."""
    if value is not None and not isinstance(value, bool):
        raise ValueError(
            f"{name}={quoted(value)} is neither True nor False; leave it out to pack where the device unpacks fast"
        )
    return value


@dataclass(frozen=True)
class Request:
    """One call of `enable_block_offload`: the policy of every component, and which were asked for by name."""

    default: OffloadPolicy
    by_name: Mapping[str, OffloadPolicy]
    decides: bool = False  # what of a component streams is left to us
    storage: Storage | None = None  # of what is kept on disk
    tier: str | None = None  # that was asked for; None: left to us
    pair_passes: bool | None = None  # whether guidance passes run for one load; None: where that gains

    def policy_for(self, component: str) -> OffloadPolicy:
        return self.by_name.get(component, self.default)


def parse_request(
    offload_granularity: str,
    offload_ratio: float | None,
    components: Mapping[str, str | OffloadPolicy] | None,
    known: tuple[str, ...],
    tier: str | None = None,
    storage: Storage | None = None,
    pair_passes: bool | None = None,
) -> Request:
    """Turn the arguments of `enable_block_offload` into a `Request`.

    Args:
        known: names of the pipeline's components that are modules.
        storage: what `parse_storage` made of the arguments of the disk tier.

    Raises:
        ValueError: an argument is wrong; the message names it, its value and what to write instead.
    """
    if pair_passes is not None and not isinstance(pair_passes, bool):
        raise ValueError(
            f"pair_passes={quoted(pair_passes)} is not known; use True, False, or None to pair passes where that gains"
        )
    default = OffloadPolicy(check_granularity("offload_granularity", offload_granularity))
    if tier is not None:
        default = replace(default, tier=check_word("tier", tier, TIERS))
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
            f"components={quoted(components)} is not a mapping; use e.g. components={{'vae': 'resident'}}"
        )
    by_name = {}
    for name, wanted in (components or {}).items():
        if name not in known:
            raise ValueError(
                f"components names {quoted(name)}, which this pipeline does not have; "
                f"its components are {', '.join(map(repr, known)) or 'none'}"
            )
        by_name[name] = _parse_policy(name, wanted, ratio, default.tier)
    on_disk = [name for name, policy in by_name.items() if policy.tier == "disk"]
    if storage is None and (default.tier == "disk" or on_disk):
        what = f"components[{on_disk[0]!r}] has tier='disk'" if on_disk else "tier='disk'"
        raise ValueError(f"{what}, which needs offload_dir: give a folder with room for the weights")
    return Request(default, by_name, default.streams and offload_ratio is None, storage, tier, pair_passes)


def _parse_policy(name: str, wanted: str | OffloadPolicy, ratio: float | None, tier: str) -> OffloadPolicy:
    if isinstance(wanted, OffloadPolicy):
        return wanted
    if not isinstance(wanted, str) or wanted not in GRANULARITIES:
        raise ValueError(
            f"components[{name!r}]={quoted(wanted)} is not known; use an OffloadPolicy "
            f"or one of {', '.join(map(repr, GRANULARITIES))}"
        )
    return OffloadPolicy(wanted, 1.0 if ratio is None or wanted not in STREAMING else ratio, tier)
