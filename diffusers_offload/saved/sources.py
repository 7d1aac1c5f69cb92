"""The files of a saved component: what of them is refused, and a stamp that tells whether they have changed."""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator
from pathlib import Path

from ..quoting import quoted
from ..tiers.blockfile import digest
from .skeleton import read_json

WEIGHTS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")
_LARGEST_HEADER = 100 * 2**20  # bytes; safetensors itself reads none that is larger
_SAMPLES, _SAMPLE = 64, 4096  # how many pieces of a file a stamp looks at, and bytes of each


def folder_of(component: str, root: Path) -> Path:
    """Where a pipeline's component is saved: in the folder of its name, or beside model_index.json."""
    folder = root / component
    return folder if folder.is_dir() else root


def checkpoints(folder: Path) -> list[Path]:
    """The files with weights in `folder` and what it holds, by name."""
    return sorted(file for file in folder.rglob(f"*{WEIGHTS}") if file.is_file())


def refuse(component: str, folder: Path) -> None:
    """Raise ValueError if the component's weights cannot be streamed: pickled, or quantised."""
    files = [file.name for file in folder.iterdir()] if folder.is_dir() else []
    pickles = sorted(
        name for name in files if name.endswith(PICKLES) and not name.startswith("training_args")
    )
    if pickles and not any(name.endswith(WEIGHTS) for name in files):
        raise ValueError(
            f"{component}: {folder / pickles[0]} is pickled, which is neither safe to open nor readable piece by "
            "piece. Convert it once: load it with Diffusers, and save_pretrained writes .safetensors files"
        )
    config = folder / "config.json"
    if config.is_file():
        kind = read_json(config).get("quantization_config")
        if kind:
            method = kind.get("quant_method", "") if isinstance(kind, dict) else kind
            raise ValueError(
                f"{component} is quantised ({quoted(str(method))}), which cannot be streamed: load the pipeline with "
                "Diffusers' own from_pretrained, or use weights that are not quantised"
            )


def stamp_of(folder: Path) -> str:
    """Another one whenever a file with weights, or a JSON file, in `folder` was written to or replaced.

    Of weights, it looks at length, inode, times of change (`ctime` too, which nobody can set), the header, and 64
    pieces of 4 KiB: a folder that was copied has another stamp, and one in which one model stands for another too.

    Raises:
        OSError: a file cannot be read.
    """
    told: list[bytes] = []
    # Several ControlNets are one component, in folders `controlnet`, `controlnet_1` ...
    numbered = re.compile(re.escape(folder.name) + r"_[0-9]+")
    also = sorted(each for each in folder.parent.iterdir() if numbered.fullmatch(each.name) and each.is_dir())
    for file in (file for each in (folder, *also) for file in sorted(each.rglob("*"))):
        if file.is_file() and file.suffix in (WEIGHTS, ".json"):
            status = file.stat()
            about = (status.st_size, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)
            name = str(file.relative_to(folder.parent)).encode()
            told.append(name + b"\0" + struct.pack("<QQqq", *about))
            told.append(file.read_bytes() if file.suffix == ".json" else b"".join(_samples(file)))
    return digest(*(len(each).to_bytes(8, "little") + each for each in told))


def header_of(file: Path) -> bytes:
    """A .safetensors file's header, its length in front.

    Raises:
        ValueError: it is none.
    """
    with file.open("rb") as stream:
        length = stream.read(8)
        nbytes = int.from_bytes(length, "little")
        if len(length) < 8 or nbytes > _LARGEST_HEADER or nbytes + 8 > os.fstat(stream.fileno()).st_size:
            raise ValueError(f"{file} is truncated, or no {WEIGHTS} file: get it anew")
        return length + stream.read(nbytes)


def _samples(file: Path) -> Iterator[bytes]:
    header = header_of(file)
    yield header
    size = file.stat().st_size
    with file.open("rb") as stream:
        for i in range(_SAMPLES):
            stream.seek(len(header) + (size - len(header)) * i // _SAMPLES)
            yield stream.read(_SAMPLE)
