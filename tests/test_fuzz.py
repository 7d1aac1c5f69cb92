"""Hostile input: a call works to the bit, or it raises what it says it raises and has changed nothing.

The inputs follow from the code alone (`derandomize`), so two runs try the same ones. `FUZZ_EXAMPLES` sets how many
each test tries, and `-s` prints how many there were in all:

    FUZZ_EXAMPLES=5000 pytest -s tests/test_fuzz.py

What strangers may hand over is in `hostile.py`; SECURITY.md says who is trusted.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import os
import pickle
import re
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import build
from hostile import ANY_TEXT, ANYTHING, CHANGES, DEVICES, RATIOS, SIZES, WORDS, write_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffusers_offload
from diffusers_offload import OffloadPolicy
from diffusers_offload.cli import main
from diffusers_offload.policy import check_ratio, parse_bytes
from diffusers_offload.quoting import quoted
from diffusers_offload.saved import confinement
from diffusers_offload.streams import find_device
from integrations.mindie_sd import enable_offload

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "100"))
TRIED: Counter[str] = Counter()
REMEDY = re.compile(
    r"\b(use|leave|let|load|call|pass|name|install|must be|its components are)\b", re.IGNORECASE
)

fuzz = settings(max_examples=EXAMPLES, derandomize=True, deadline=None, database=None)


@pytest.fixture(scope="module", autouse=True)
def count():
    yield
    print(f"\ninputs fuzzed: {sum(TRIED.values())}", dict(TRIED))


def check_message(error: BaseException, given: dict[str, Any], says: str = "") -> None:
    """The error names one of the arguments, its value and a remedy, is short, and says `says`."""
    text = str(error)
    assert len(text) < 2000 and says in text
    assert REMEDY.search(text), text
    named = [value for name, value in given.items() if name in text]
    assert named, text
    shown = [quoted(value) in text or type(value).__name__ in text for value in named]
    assert any(shown) or any(str(_bytes(value)) in text for value in named) or "components" in given, text


def _bytes(value: Any) -> int | None:
    try:
        return parse_bytes("size", value)
    except ValueError:
        return None


# --- the model, and that nothing of it was changed ------------------------------------------------------


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        return torch.tanh(self.second(self.first(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return x


class Pipe(DiffusionPipeline):
    def __init__(self, text_encoder: Net, transformer: Net) -> None:
        super().__init__()
        self.register_modules(text_encoder=text_encoder, transformer=transformer)

    def __call__(self, x):
        x = self.transformer(self.text_encoder(x))
        self.maybe_free_model_hooks()
        return x


X = torch.linspace(-1, 1, 8).reshape(2, 4)


def make_net() -> Net:
    torch.manual_seed(0)
    return Net().eval().requires_grad_(False)


class Unchanged:
    """What a model was: asked later whether it still is."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.expected = model(X)
        self.tensors = dict(model.named_parameters())
        self.values = {name: tensor.clone() for name, tensor in self.tensors.items()}
        self.members = [set(vars(part)) for part in model.modules()]

    def works(self) -> None:
        """It computes the same, and shows the same weights, while offloaded."""
        for _ in range(3):
            assert torch.equal(self.model(X), self.expected)
        state = self.model.state_dict()
        assert all(torch.equal(state[name], value) for name, value in self.values.items())

    def check(self) -> None:
        assert torch.equal(self.model(X), self.expected)
        now = dict(self.model.named_parameters())
        assert list(now) == list(self.tensors) and all(now[name] is t for name, t in self.tensors.items())
        assert all(torch.equal(now[name], value) for name, value in self.values.items())
        assert all(tensor.device.type == "cpu" for tensor in now.values())
        for part, members in zip(self.model.modules(), self.members, strict=True):
            more = {name: member for name, member in vars(part).items() if name not in members}
            # Where a hook of accelerate's has been, the class's own forward lies in the instance.
            assert not more or ([*more] == ["forward"] and more["forward"].__func__ is type(part).forward)
            assert members <= set(vars(part))
        assert not any(part._forward_hooks or part._forward_pre_hooks for part in self.model.modules())


# --- strings and numbers --------------------------------------------------------------------------------


@fuzz
@given(SIZES | ANYTHING)
def test_a_size_is_bytes_or_refused(value):
    TRIED["sizes"] += 1
    try:
        nbytes = parse_bytes("max_memory", value)
    except ValueError as error:
        check_message(error, {"max_memory": value})
    else:
        assert (nbytes is None) == (value is None)
        assert nbytes is None or ((type(nbytes) is int or isinstance(value, int)) and 0 < nbytes < 2**63)


@fuzz
@given(RATIOS | ANYTHING)
def test_a_ratio_is_a_float_or_refused(value):
    TRIED["ratios"] += 1
    try:
        ratio = check_ratio("offload_ratio", value)
    except ValueError as error:
        check_message(error, {"offload_ratio": value})
    else:
        assert type(ratio) is float and 0.0 <= ratio <= 1.0 and ratio == value


@fuzz
@given(DEVICES | ANYTHING)
def test_a_device_is_there_or_refused(value):
    TRIED["devices"] += 1
    try:
        device = find_device(value)
    except ValueError as error:
        check_message(error, {"device": value})
    except RuntimeError as error:
        check_message(error, {"device": value}, "is not there")
    else:
        assert torch.empty(1, device=device).device == device


@fuzz
@given(WORDS | ANYTHING, RATIOS | ANYTHING)
def test_a_policy_is_right_or_refused(granularity, ratio):
    TRIED["policies"] += 1
    try:
        policy = OffloadPolicy(granularity, ratio)
    except ValueError as error:
        check_message(error, {"granularity": granularity, "ratio": ratio})
    else:
        assert policy.granularity == granularity and policy.ratio == ratio
        assert policy == eval(repr(policy), {"OffloadPolicy": OffloadPolicy})


# --- enabling -------------------------------------------------------------------------------------------


def arguments(**more: st.SearchStrategy) -> st.SearchStrategy[dict[str, Any]]:
    """Some of the arguments that modules and pipelines share, plausible or not, and `more`."""
    kinds = {
        "device": DEVICES,
        "offload_granularity": WORDS,
        "offload_ratio": RATIOS,
        "max_device_memory": SIZES | st.integers(1, 3000),
        "max_host_memory": SIZES | st.integers(1, 3000),
        "pack_on_disk": st.none() | st.booleans(),
        **more,
    }
    # Mostly plausible: of several wrong arguments only the first is looked at.
    each = {name: st.one_of(kind, kind, kind, ANYTHING) for name, kind in kinds.items()}
    return st.fixed_dictionaries({}, optional=each).map(lambda given: {"device": "cpu", **given})


@fuzz
@given(arguments(name=ANY_TEXT))
def test_a_module_is_offloaded_or_as_before(given):
    TRIED["enable_block_offload(module)"] += 1
    before = Unchanged(make_net())
    try:
        handle = diffusers_offload.enable_block_offload(before.model, **given)
    except (ValueError, TypeError) as error:
        check_message(error, given)
    except RuntimeError as error:
        check_message(error, {"device": given["device"]}, "is not there")
    else:
        before.works()
        assert str(handle.plan) and str(handle.report())
        handle.disable()
    before.check()


POLICIES = st.builds(OffloadPolicy, st.sampled_from(["block", "leaf"]), st.sampled_from([0.0, 0.5, 1.0]))
NAMES = st.sampled_from(["transformer", "text_encoder", "vae", "__class__", "Transformer"])


@fuzz
@given(
    arguments(
        components=st.dictionaries(
            st.one_of(NAMES, NAMES, ANY_TEXT, st.integers(), st.none(), st.binary(max_size=4)),
            st.one_of(WORDS, POLICIES, ANYTHING),
            max_size=3,
        )
    )
)
def test_a_pipeline_is_offloaded_or_as_before(given):
    TRIED["enable_block_offload(pipeline)"] += 1
    pipe = Pipe(make_net(), make_net())
    before = [Unchanged(pipe.text_encoder), Unchanged(pipe.transformer)]
    expected = pipe(X)
    try:
        pipe.enable_block_offload(**given)
    except ValueError as error:
        check_message(error, given)
    except RuntimeError as error:
        check_message(error, {"device": given["device"]}, "is not there")
    else:
        for _ in range(3):
            assert torch.equal(pipe(X), expected)
        for each in before:
            each.works()
        assert str(pipe.block_offload.plan) and str(pipe.block_offload.report())
        pipe.disable_block_offload()
    assert pipe.block_offload is None
    for each in before:
        each.check()
    assert torch.equal(pipe(X), expected)


CHOICES = {  # what may be given as the blocks of a model
    "its own": lambda net: net.blocks,
    "some": lambda net: net.blocks[1:],
    "reversed": lambda net: nn.ModuleList([*net.blocks][::-1]),
    "one twice": lambda net: nn.ModuleList([net.blocks[0], *net.blocks]),
    "one in another": lambda net: nn.ModuleList([net.blocks[0].first, *net.blocks]),
    "the model": lambda net: nn.ModuleList([net, *net.blocks]),
    "another model's": lambda net: make_net().blocks,
    "with None": lambda net: nn.ModuleList([None, *net.blocks]),
    "none": lambda net: nn.ModuleList(),
    "a list": lambda net: list(net.blocks),
    "a Sequential": lambda net: nn.Sequential(*net.blocks),
}


@pytest.mark.skipif(torch.accelerator.is_available(), reason="this machine's accelerator would be taken")
@fuzz
@given(st.sampled_from([*CHOICES]) | ANYTHING, st.integers(-2, 6) | ANYTHING, st.booleans())
def test_mindie_sds_call_offloads_or_leaves_the_model_as_before(blocks, reserved, right_model):
    TRIED["enable_offload of MindIE-SD"] += 1
    before = Unchanged(make_net())
    model = before.model if right_model else reserved
    given = CHOICES[blocks](before.model) if isinstance(blocks, str) and blocks in CHOICES else blocks
    try:
        enable_offload(model, given, reserved)
    except (ValueError, TypeError) as error:
        named = {"model": model, "blocks": given, "min_reserved_blocks_count": reserved}
        text = str(error)
        assert len(text) < 2000 and any(name in text for name in named)
    else:
        before.works()
        diffusers_offload.handle.held_policy(model)[0].disable()
    before.check()


# --- the command ----------------------------------------------------------------------------------------

FORBIDDEN = {
    *("pickle.find_class", "os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen"),
    *("socket.connect", "socket.getaddrinfo", "builtins.input"),
}
FILES: dict[str, dict[str, Any]] = {}  # the JSON files of a small pipeline, by name
CANARIES = ("evil", "antigravity", "this")
EVENTS: list[str] | None = None  # those that are forbidden, while the command runs


def audit(event: str, arguments: tuple) -> None:
    if EVENTS is not None and event in FORBIDDEN:
        EVENTS.append(event)


class Bomb:
    """Leaves a file called "boom" behind if it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "boom"

    def __reduce__(self):
        return Path.touch, (self.path,)


def run(argv: list[str]) -> tuple[int, str]:
    """The command's exit code and what it printed; fails if it did what no config may ask for."""
    global EVENTS
    EVENTS = []
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # strict, as Python's own
    error = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace")
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(error):
            code = main(argv)
    except SystemExit as exit:
        code = exit.code
    finally:
        events, EVENTS = EVENTS, None
    assert not events and not any(name in sys.modules for name in CANARIES)
    out.seek(0), error.seek(0)
    return code, out.read() + error.read()


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A saved pipeline's files in `FILES`; the command without the Hub, with bounds that a test can wait for."""
    folder = tmp_path_factory.mktemp("saved")
    build("flux").save_pretrained(folder)
    for name in (
        "model_index.json",
        "transformer/config.json",
        "text_encoder/config.json",
        "vae/config.json",
    ):
        FILES[name] = json.loads((folder / name).read_text())
    assert run(["plan", str(folder)])[0] == 0  # imports what it needs
    sys.addaudithook(audit)

    def not_here(*args: Any, **kwargs: Any) -> None:
        raise OSError("no Hub in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.snapshot_download", not_here)
        patch.setattr(confinement, "MOST_MODULES", 1000)
        patch.setattr(confinement, "LONGEST_BUILD", 3.0)
        yield


@fuzz
@given(changes=CHANGES, alone=st.booleans(), as_json=st.booleans())
@pytest.mark.usefixtures("command")
def test_the_command_plans_a_folder_or_refuses_it(changes, alone, as_json):
    TRIED["plan FOLDER"] += 1
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "pipeline"
        folder.mkdir()
        for place in (folder, folder / "transformer", Path(root)):
            place.mkdir(exist_ok=True)
            for name in ("evil.py", "__init__.py", "modeling_evil.py"):
                (place / name).write_text(f"import pathlib; pathlib.Path({str(root)!r}, 'boom').touch()")
            for name in ("pytorch_model.bin", "diffusion_pytorch_model.bin", "config.pkl"):
                (place / name).write_bytes(pickle.dumps(Bomb(Path(root))))
        write_folder(folder, FILES, changes)
        listed = sorted(str(path) for path in Path(root).rglob("*"))
        argv = ["plan", str(folder / "transformer" if alone else folder), *(["--json"] if as_json else [])]
        code, text = run(argv)
        assert code in (0, 2), text
        assert code == 0 or "error: " in text
        assert all(c.isprintable() or c == "\n" for c in text)
        assert (
            sorted(str(path) for path in Path(root).rglob("*")) == listed
        )  # nothing exploded, nothing written


@fuzz
@given(
    st.lists(
        st.one_of(
            st.sampled_from(["plan", "demo", "--json", "--component", "--dtype", "--granularity", "--help"]),
            st.sampled_from(
                ["~nobody/x", "a" * 5000, "\0", "..", "/", "/dev/null", "somebody/model", "./nowhere", ""]
            ),
            st.builds(lambda size: f"--max-device-memory={size}", SIZES),
            st.builds(lambda ratio: f"--offload-ratio={ratio}", RATIOS),
            st.builds(lambda text: f"--steps={text}", st.sampled_from(["0", "-1", "x", "9" * 5000])),
            ANY_TEXT,
        ),
        max_size=5,
    )
)
@pytest.mark.usefixtures("command")
def test_the_command_refuses_what_it_cannot_read(words):
    TRIED["command lines"] += 1
    # The demo draws pictures for seconds if it is asked rightly: let it be asked wrongly.
    argv = ["demo", "--steps=0", *words] if words[:1] == ["demo"] else ["plan", *words]
    code, text = run(argv)
    assert code in ((0, 2) if "--help" in words or "-h" in itertools.chain(*words) else (2,)), text
    assert "error: " in text or code == 0
