"""What strangers may hand over: values of every kind for arguments, and folders that claim to be pipelines."""

from __future__ import annotations

import json
import os
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from hypothesis import strategies as st

# --- values ---------------------------------------------------------------------------------------------

ANY_TEXT = st.text(st.characters(exclude_categories=()), max_size=12)  # surrogates and zeros as well
# Of more than 4300 digits Python makes no text, so they are not listed but made.
HUGE = st.builds(
    lambda sign, digits, more: sign * (10**digits + more),
    *(st.sampled_from([1, -1]), st.sampled_from([0, 18, 19, 308, 309, 400, 5000]), st.integers(-1, 1)),
)
ODD = [
    *(b"block", bytearray(b"x"), 1j, Decimal("NaN"), Fraction(1, 3), object, len, ..., range(3), "x" * 10**5),
    *(
        torch.ones(2),
        torch.tensor(0.5),
        np.ones(3),
        np.float32(0.5),
        np.float64(0.5),
        np.array(["block", "x"]),
    ),
    *(
        torch.float32,
        torch.device("cpu"),
        torch.device("meta"),
        {"block"},
        frozenset(),
        "os.system",
        "__class__",
    ),
]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    HUGE,
    ANY_TEXT,
    st.binary(max_size=8),
    st.sampled_from(ODD),
)
ANYTHING = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT | st.integers(), inner, max_size=3),
    max_leaves=6,
)

WORDS = st.sampled_from(["resident", "model", "block", "phase", "leaf", "Block", "block ", "atom", ""])
RATIOS = (
    st.sampled_from([0, 1, 0.0, 0.3, 0.5, 1.0, -0.0, 5e-324, 1.0000001, -1, 2, "0.5", "nan"]) | st.floats()
)
UNITS = st.sampled_from(["", "B", "b", "KiB", "GiB", "gib", "MB", "kb", "Gb", " GiB", "TiB", "GIB\x00", "é"])
NUMBERS = st.one_of(
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["inf", "-inf", "nan", "1e999", "1_0", "१", "²", "0x10", "1e-5", "--1", "9" * 5000]),
)
SIZES = st.builds(lambda number, unit: number + unit, NUMBERS, UNITS) | st.integers(-2, 2**66)
DEVICES = st.sampled_from(
    [
        *("cpu", "cpu:0", "cuda:99", "cuda:128", "cuda:-1", "cuda:" + "9" * 30),
        *("npu", "npu:x", "meta", "mps", "xla:1", "CPU"),
    ]
)

# --- folders --------------------------------------------------------------------------------------------

# No integers between the small and those that no memory holds: they ask for real memory of this machine.
_JSON_SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.sampled_from([2**63 - 1, 2**63, -(2**63), 10**30, 10**400, 1e308, float("nan"), float("inf")]),
    st.sampled_from(
        [
            *(
                "os.system",
                "__import__",
                "../../evil",
                "/etc/passwd",
                "evil/kernel",
                "evil/repo--evil.Model",
                "evil",
            ),
            *("\x1b[2J", "\ud800", "", "a" * 10**4, "flash_attention_2", "_inductor", "float8_e4m3fn", "os"),
        ]
    ),
    ANY_TEXT,
)
JSON = st.recursive(
    _JSON_SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(ANY_TEXT, inner, max_size=3),
    max_leaves=5,
)
_CLASSES = [
    *(
        "eval",
        "system",
        "os.system",
        "__class__",
        "__init__.__globals__",
        "evil.Model",
        "Evil",
        "FluxPipeline",
    ),
    *(
        "ModelMixin",
        "PreTrainedModel",
        "AutoModel",
        "FluxTransformer2DModel",
        "T5EncoderModel",
        "T6EncoderModel",
    ),
    *("DiffusionPipeline", "UNet2DModel", "CLIPVisionModel", "GPT2Model", "TimmBackbone"),
]
_LIBRARIES = [
    *("builtins", "os", "subprocess", "evil", "antigravity", "this", "diffusers", "transformers", "torch.nn"),
    *("torch", "diffusers_modules", "pipeline_utils", "stable_diffusion", "_import_structure", "__spec__"),
]
_ENTRY = st.lists(st.sampled_from([*_LIBRARIES, *_CLASSES]), min_size=2, max_size=2) | JSON
_COMPONENT = st.sampled_from(
    [
        "transformer",
        "text_encoder",
        "vae",
        "../evil",
        "..",
        "/",
        "__class__",
        "evil",
        "scheduler",
        "_class_name",
    ]
)
_KEYS = st.sampled_from(
    [
        *(
            "_class_name",
            "architectures",
            "model_type",
            "auto_map",
            "attn_implementation",
            "_attn_implementation",
        ),
        *(
            "torch_dtype",
            "dtype",
            "quantization_config",
            "num_layers",
            "in_channels",
            "d_model",
            "vocab_size",
        ),
        *(
            "sub_configs",
            "text_config",
            "backbone_config",
            "_name_or_path",
            "configuration_files",
            "__class__",
        ),
        *(
            "attention_head_dim",
            "block_out_channels",
            "down_block_types",
            "layers_per_block",
            "axes_dims_rope",
        ),
        *("feed_forward_proj", "per_layer_config", "experts_implementation", "self", "config", "gguf_file"),
    ]
)
_DEEP = [
    b"[" * 10**5,
    b'{"a":' * 10**5,
    b"[" * 900 + b"]" * 900,
    b'{"_class_name":' + b"[" * 900 + b"]" * 900 + b"}",
]
_BYTES = st.one_of(
    st.sampled_from(
        [
            *(
                b"",
                b"{",
                b"null",
                b"[]",
                b"5",
                b'"x"',
                b"\xff\xfe{}",
                b"\xef\xbb\xbf{}",
                b"{}",
                b'{"a":1}{"b":2}',
            ),
            *(b'{"_class_name": ' + b"9" * 5000 + b"}", *_DEEP),
        ]
    ),
    st.binary(max_size=40),
)
_HEADERS = st.one_of(
    st.binary(max_size=20),
    st.builds(lambda n, text: n.to_bytes(8, "little") + text, st.integers(0, 2**64 - 1), _BYTES),
    st.builds(
        lambda entry, cut: _header(entry)[: cut or None],
        st.one_of(
            JSON,
            st.fixed_dictionaries(
                {"dtype": st.sampled_from(["F32", "BF16", "F4", "os.system"]) | JSON, "data_offsets": JSON}
            ),
        ),
        st.integers(0, 30),
    ),
)
_CONFIGS = [f"{name}/config.json" for name in ("transformer", "text_encoder", "vae")]
_FILES = st.sampled_from(["model_index.json", *_CONFIGS])
_WEIGHTS = st.sampled_from(["transformer/x.safetensors", "text_encoder/model.safetensors"])
_LINKS = st.sampled_from(
    ["self", "/", "/dev/zero", "/dev/null", "/proc/self/mem", "nowhere", "../..", "pipe", "folder"]
)

# What is done, to which file, and with what.
CHANGES = st.lists(
    st.one_of(
        st.tuples(st.just("set"), _FILES, _KEYS | ANY_TEXT, JSON),
        st.tuples(st.just("set"), st.just("model_index.json"), _COMPONENT, _ENTRY),
        st.tuples(st.just("set"), _FILES, st.just("_class_name"), st.sampled_from(_CLASSES) | JSON),
        st.tuples(st.just("write"), _FILES, _BYTES),
        st.tuples(st.just("write"), _WEIGHTS, _HEADERS),
        st.tuples(st.just("link"), _FILES | _WEIGHTS | st.just("transformer"), _LINKS),
        st.tuples(st.just("remove"), _FILES),
    ),
    min_size=1,
    max_size=4,
)


def _header(entry: Any) -> bytes:
    text = json.dumps({"x": entry}).encode()
    return len(text).to_bytes(8, "little") + text


def write_folder(folder: Path, files: dict[str, dict[str, Any]], changes: list[tuple]) -> None:
    """Write JSON `files` to `folder`, and then do to them what `changes` says."""
    texts: dict[str, bytes] = {}
    contents = {name: dict(content) for name, content in files.items()}
    for change in changes:
        if change[0] == "set":
            contents[change[1]][change[2]] = change[3]
    for name, content in contents.items():
        texts[name] = json.dumps(content).encode()
    texts |= {change[1]: change[2] for change in changes if change[0] == "write"}
    for name, text in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text)
    # One thing a place, and files before the folder they lie in: nothing is done beyond a link to somewhere else.
    places = {change[1]: change[2:] for change in changes if change[0] in ("link", "remove")}
    for name in sorted(places, key=lambda name: -name.count("/")):
        path = folder / name
        assert path.parent.resolve() == (folder.resolve() / name).parent
        if path.is_dir():
            path.rename(path.with_name("moved"))
        path.unlink(missing_ok=True)
        if places[name]:
            _link(path, *places[name])


def _link(path: Path, to: str) -> None:
    if to == "pipe":
        os.mkfifo(path)
    elif to == "folder":
        path.mkdir()
    else:
        path.symlink_to(path.name if to == "self" else to)
