"""What safetensors calls the dtypes, and how the elements of one tensor lie."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence

import safetensors
import torch

from ..slab import Placement

WORDS = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # float4 is missing: safetensors counts its halves of a byte, torch the bytes
NAMES = {word: name for name, word in WORDS.items()}
DTYPES = {
    str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if type(kind) is torch.dtype
}


def numel(place: Placement) -> int:
    return math.prod(place.shape)


def nbytes_of(place: Placement) -> int:
    return numel(place) * place.dtype.itemsize


def reach(place: Placement) -> int:
    """Bytes from the first that the tensor has to the last, which is more than it has if there are holes."""
    steps = sum((n - 1) * step for n, step in zip(place.shape, place.stride, strict=True))
    return (1 + steps) * place.dtype.itemsize


def word_of(place: Placement) -> str:
    return str(place.dtype).removeprefix("torch.")


def is_plain(place: Placement) -> bool:
    """Whether an entry of safetensors' says all there is: in order, and of a dtype it knows."""
    in_order = zip(place.shape, place.stride, contiguous(place.shape), strict=True)
    ordered = not numel(place) or all(n == 1 or step == usual for n, step, usual in in_order)
    return ordered and word_of(place) in WORDS and _is_known(WORDS[word_of(place)])


def contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """torch's strides, in elements, of a tensor whose elements lie one behind the other."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


@functools.cache
def _is_known(word: str) -> bool:
    """Whether the safetensors installed here knows the dtype: the number grows from version to version."""
    text = json.dumps({"x": {"dtype": word, "shape": [0], "data_offsets": [0, 0]}}).encode()
    try:
        safetensors.deserialize(len(text).to_bytes(8, "little") + text)
    except safetensors.SafetensorError:
        return False
    return True
