"""What a stranger's config may not do, whatever it says; SECURITY.md promises it."""

from __future__ import annotations

import ast
import json
import socket
import time
from pathlib import Path

import pytest
import torch
from helpers import build

import diffusers_offload
from diffusers_offload.saved import confinement
from diffusers_offload.saved.confinement import ConfinedError, confined
from diffusers_offload.saved.skeleton import _dtype_of, open_skeleton


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    pipe = build("flux")
    for name in ("transformer", "text_encoder", "vae"):
        getattr(pipe, name).save_pretrained(folder / name)
    return folder


def open_with(folder: Path, **changes) -> tuple[dict, str]:
    """The modules of a component whose config was changed, and why there are none; the config is put back."""
    config = folder / "config.json"
    before = config.read_text()
    config.write_text(json.dumps({**json.loads(before), **changes}))
    try:
        found = open_skeleton(str(folder))
    finally:
        config.write_text(before)
    return dict(found.modules), " ".join(found.missing.values())


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("transformer", {"num_layers": 10**9}),
        ("text_encoder", {"num_hidden_layers": 10**9}),
        ("vae", {"layers_per_block": 10**9}),
    ],
)
def test_a_model_without_end_is_not_built(name, change, saved, monkeypatch):
    monkeypatch.setattr(confinement, "MOST_MODULES", 1000)
    modules, why = open_with(saved / name, **change)
    assert not modules and "more than 1000 modules" in why


def test_a_build_that_takes_too_long_ends(monkeypatch):
    monkeypatch.setattr(confinement, "LONGEST_BUILD", 0.1)
    with pytest.raises(ConfinedError, match="takes more than"), confined():
        time.sleep(10)
    with confined():
        pass
    time.sleep(0.2)  # the timer has ended with the block


@pytest.mark.parametrize(
    "kernel", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal"]
)
def test_kernels_and_code_on_the_hub_are_not_asked_for(kernel, saved):
    change = {kernel: "somebody/kernel", "auto_map": {"AutoModel": "somebody/code--model.Model"}}
    modules, why = open_with(saved / "text_encoder", **change)
    assert not why
    config = modules["text_encoder"].config
    assert config._attn_implementation != "somebody/kernel" and not hasattr(config, "auto_map")


def test_nothing_connects_and_nothing_asks():
    with pytest.raises(ConfinedError, match="look up"), confined():
        socket.getaddrinfo("localhost", 80)
    with pytest.raises(ConfinedError, match="connect"), confined():
        socket.socket().connect(("127.0.0.1", 9))
    with pytest.raises(ConfinedError, match="ask"), confined():
        input()
    socket.getaddrinfo("localhost", 80)


@pytest.mark.parametrize("word", ["_inductor", "os", "load", "__class__", ["float16"], 5, "int8"])
def test_the_dtype_in_a_config_is_looked_up_among_dtypes(word, tmp_path):
    assert _dtype_of(tmp_path, {"dtype": word}) == (torch.float32, "a guess, for nothing says")


def test_no_source_of_the_package_unpickles_or_evaluates():
    modules = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    calls = {"eval", "exec", "compile", "__import__", "torch.load", "numpy.load", "np.load"}
    package = Path(diffusers_offload.__file__).parent
    for file in (*package.rglob("*.py"), *(package.parent / "integrations").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not modules & {alias.name.partition(".")[0] for alias in node.names}, file
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in modules, file
            elif isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in calls, (file, node.lineno)
