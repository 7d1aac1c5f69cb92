"""LightX2V's configuration: `OffloadConfig`, read from its JSON files, and what that asks of a pipeline.

Defaults are LightX2V's own, so that a file means here what it means there; `offload_ratio` is the exception.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import wraps
from pathlib import Path
from typing import Any

from torch import nn

from .log import logger
from .policy import STREAMING, OffloadPolicy, check_ratio, parse_bytes
from .roles import AUTOENCODER, CLIP, T5, role_of
from .units import dissect

_GRANULARITIES = ("block", "phase", "model")
_DISK_ONLY = ("num_disk_workers", "max_memory")  # keys that say something only where weights are on disk
_GIB = 2**30
_MOST_GIB = 2**20  # a `max_memory` beyond was meant in bytes
_LONGEST = 60  # characters of a value in a message


@dataclass(frozen=True)
class OffloadConfig:
    """LightX2V's keys for offloading, checked.

    Args:
        cpu_offload: stream the denoiser, and whatever has no flag of its own. False keeps it on the device.
        offload_ratio: share of the denoiser's blocks that streams, 0.0 to 1.0, by bytes. None leaves it to the
            planner (LightX2V: 1.0).
        offload_granularity: "block", "phase", or "model" for the whole component at once.
        lazy_load, offload_to_disk: either keeps the weights that stream on disk.
        num_disk_workers: threads that read; only with the disk.
        max_memory: what the host may hold of weights; only with the disk. A number counts GiB, as in LightX2V; a
            string has its unit ("1536MiB").
        t5_cpu_offload: stream the text encoders that are not of CLIP's kind; None follows `cpu_offload`.
        clip_cpu_offload: the same for text encoders of CLIP's kind and encoders of images.
        vae_cpu_offload: the autoencoders come when they run and leave again; None follows `cpu_offload`.

    Raises:
        ValueError: a value is of the wrong type or out of range, or two contradict each other; the message names
            the key, the value and a remedy.
    """

    cpu_offload: bool = False
    offload_ratio: float | None = None
    offload_granularity: str = "block"
    lazy_load: bool = False
    offload_to_disk: bool = False
    num_disk_workers: int = 2
    max_memory: int | float | str = 2
    t5_cpu_offload: bool | None = None
    clip_cpu_offload: bool | None = None
    vae_cpu_offload: bool | None = None

    def __post_init__(self) -> None:
        for key in ("cpu_offload", "lazy_load", "offload_to_disk"):
            _check_flag(key, getattr(self, key))
        for key in ("t5_cpu_offload", "clip_cpu_offload", "vae_cpu_offload"):
            if getattr(self, key) is not None:
                _check_flag(key, getattr(self, key))
        if self.offload_ratio is not None:
            object.__setattr__(self, "offload_ratio", check_ratio("offload_ratio", self.offload_ratio))
        granularity = self.offload_granularity
        if not isinstance(granularity, str) or granularity not in _GRANULARITIES:
            raise ValueError(
                f"offload_granularity={_shown(granularity)} is not known; "
                f"use one of {', '.join(map(repr, _GRANULARITIES))}"
            )
        _check_workers(self.num_disk_workers)
        _ = self.max_memory_bytes
        if self.on_disk and not self.cpu_offload:
            key = "lazy_load" if self.lazy_load else "offload_to_disk"
            raise ValueError(f"{key}=True goes with cpu_offload=True: set that as well, or leave out {key}")

    @classmethod
    def from_lightx2v(cls, source: str | os.PathLike | Mapping[str, Any]) -> OffloadConfig:
        """Read LightX2V's configuration: the path of a JSON file, or what is in one.

        Keys that are not among this class's are listed in one warning, with those that do nothing without
        `lazy_load`.

        Raises:
            TypeError: `source` is neither a path nor a mapping.
            ValueError: the file cannot be read or holds no JSON object, or a value is wrong.
        """
        if isinstance(source, Mapping):
            found, where = source, "the LightX2V configuration"
        elif isinstance(source, (str, os.PathLike)):
            found, where = _read(source), f"the LightX2V configuration {os.fspath(source)!r}"
        else:
            raise TypeError(
                f"config={_shown(source)} is a {type(source).__name__}; use the path of a JSON file, a dict or an "
                "OffloadConfig"
            )
        known = {field.name for field in fields(cls)}
        given = {key: value for key, value in found.items() if isinstance(key, str) and key in known}
        for key, value in given.items():
            if value is None:  # LightX2V would take it for false, also where leaving it out means true
                raise ValueError(f"{key}=None (null) says nothing: leave {key} out, or give it a value")
        config = cls(**given)
        _warn(where, [key for key in found if key not in given], [] if config.on_disk else list(given))
        return config

    @property
    def on_disk(self) -> bool:
        """Whether the weights that stream are kept on disk."""
        return self.lazy_load or self.offload_to_disk

    @property
    def max_memory_bytes(self) -> int:
        """`max_memory` in bytes."""
        return _bytes_of(self.max_memory)

    def streams(self, role: str | None) -> bool:
        """Whether components of `role` (see `roles`) leave the device."""
        flags = {T5: self.t5_cpu_offload, CLIP: self.clip_cpu_offload, AUTOENCODER: self.vae_cpu_offload}
        own = flags.get(role)
        return self.cpu_offload if own is None else own

    def arguments(self, pipe: Any, **given: Any) -> dict[str, Any]:
        """The keyword arguments of `pipe.enable_block_offload` that this asks for.

        Args:
            pipe: looked at for its components: which of them are a T5, a CLIP, a VAE.
            given: arguments of the caller's own, which win; in `components`, name by name. None is not given.
        """
        given = {key: value for key, value in given.items() if value is not None}
        unit = self.offload_granularity
        arguments: dict[str, Any] = {"offload_granularity": unit if self.cpu_offload else "resident"}
        if given.get("offload_granularity") in STREAMING:
            unit = given["offload_granularity"]
        streams = given.get("offload_granularity", arguments["offload_granularity"]) in STREAMING
        ratio = self.offload_ratio if self.cpu_offload and streams else None
        if ratio is not None:
            arguments["offload_ratio"] = ratio
        if self.on_disk and given.get("tier", "disk") == "disk":
            arguments |= {
                "tier": "disk",
                "offload_dir": default_folder(),
                "num_disk_workers": self.num_disk_workers,
                "max_host_memory": self.max_memory_bytes,
            }
        of_denoiser_only = ratio not in (None, 1.0) and "offload_ratio" not in given
        policies = {}
        for name, model in _components(pipe).items():
            policy = self._policy_of(role_of(name, model), model, unit, of_denoiser_only)
            if policy is not None:
                policies[name] = policy
        named = given.get("components", {})
        if isinstance(named, Mapping):  # what is none is refused where it goes
            given["components"] = {**policies, **named}
        return {**arguments, **given}

    def _policy_of(
        self, role: str | None, model: nn.Module | type, unit: str, of_denoiser_only: bool
    ) -> str | OffloadPolicy | None:
        """What a component of `role` needs to be named for; None if it may follow the call.

        Args:
            of_denoiser_only: the call's `offload_ratio` is not for the encoders.
        """
        wanted = self.streams(role)
        if not wanted:
            return "resident" if self.cpu_offload else None
        if self.cpu_offload and not (of_denoiser_only and role in (T5, CLIP)):
            return None
        parted = unit in STREAMING and role != AUTOENCODER and _has_parts(model, unit)
        if self.cpu_offload and not parted:
            return None  # comes and goes as a whole by itself
        return OffloadPolicy(unit if parted else "model", tier="disk" if self.on_disk else "pinned")


def default_folder() -> Path:
    """Where weights go that are to be kept on disk: their keys name no folder. Beside Hugging Face's caches."""
    from huggingface_hub.constants import HF_HOME  # as its environment variables say

    return Path(HF_HOME) / "diffusers_offload"


def takes_config(enable: Callable[..., None]) -> Callable[..., None]:
    """Give a method `enable_block_offload` its `config`: what that asks for is given to it as arguments."""
    signature = inspect.signature(enable)

    @wraps(enable)
    def with_config(self: Any, *args: Any, **kwargs: Any) -> None:
        given = signature.bind(self, *args, **kwargs).arguments  # without defaults: what the caller said
        given.pop("self")
        config = given.pop("config", None)
        if config is None:
            return enable(self, **given)
        if not isinstance(config, OffloadConfig):
            config = OffloadConfig.from_lightx2v(config)
        return enable(self, **config.arguments(self, **given))

    return with_config


def _components(pipe: Any) -> dict[str, nn.Module | type]:
    """The pipeline's components by name, with the classes of those that a modular one has not loaded."""
    specs = getattr(pipe, "_component_specs", None) or {}
    classes = {name: spec.type_hint for name, spec in specs.items()}
    coming = {n: c for n, c in classes.items() if isinstance(c, type) and issubclass(c, nn.Module)}
    return {**coming, **pipe._offloadable_modules()}


def _has_parts(model: nn.Module | type, unit: str) -> bool:
    """Whether `model` has blocks that could be streamed; a class of which nothing is loaded yet counts as such."""
    return isinstance(model, type) or bool(dissect(model, unit).parts)


def _read(path: str | os.PathLike) -> Mapping[str, Any]:
    name = f"config={os.fspath(path)!r}"
    try:
        with open(path, encoding="utf-8-sig") as file:
            found = json.load(file)
    except OSError as error:
        raise ValueError(
            f"{name} cannot be read ({error.strerror or error}): give the path of a JSON file, or a dict"
        ) from None
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and a null in the path, too
        raise ValueError(f"{name} is not JSON ({error}): correct the file, or give a dict") from None
    if not isinstance(found, Mapping):
        raise ValueError(
            f'{name} holds a {type(found).__name__}, not an object: write the keys as {{"cpu_offload": true, ...}}'
        )
    return found


def _warn(where: str, others: list[Any], given: list[str]) -> None:
    """Say once what of a configuration does nothing; `given`: its known keys, if it does not use the disk."""
    idle = [key for key in given if key in _DISK_ONLY]
    parts = []
    if others:
        parts.append(f"is not used here: {', '.join(map(_key_text, others))}")
    if idle:
        parts.append(f"does nothing without lazy_load: {', '.join(idle)}")
    if parts:
        logger.warning("of %s, this %s", where, "; this ".join(parts))


def _check_flag(key: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise ValueError(
            f"{key}={_shown(value)} is neither true nor false: use one of the two, without quotes"
        )


def _check_workers(value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"num_disk_workers={_shown(value)} is not a whole number from 1 on, such as 2")


def _bytes_of(value: Any) -> int:
    remedy = "use GiB as a number, such as 8 or 1.5, or a string with its unit, such as '8GiB'"
    if isinstance(value, str):
        try:
            return parse_bytes("max_memory", value)
        except ValueError:
            raise ValueError(f"max_memory={_shown(value)} is not a size; {remedy}") from None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
        raise ValueError(f"max_memory={_shown(value)} is not a size; {remedy}")
    if value > _MOST_GIB:
        raise ValueError(f"max_memory={_shown(value)} counts GiB, not bytes; {remedy}")
    nbytes = int(value * _GIB) if value > 0 else 0
    if nbytes < 1:
        raise ValueError(f"max_memory={_shown(value)} is not positive; {remedy}")
    return nbytes


def _key_text(key: Any) -> str:
    return key if isinstance(key, str) and key.isprintable() and len(key) <= _LONGEST else _shown(key)


def _shown(value: Any) -> str:
    """`value` as a message has it: whatever it is, and not too long."""
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python prints
        return f"<{type(value).__name__}>"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
