"""A converted folder is the model it was made from, or it is refused; a conversion that was killed goes on."""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import build, run
from safetensors.torch import load_file, save_file
from test_from_pretrained import assert_the_same, quiet, saved

import diffusers_offload
from diffusers_offload import cli
from diffusers_offload.saved.conversion import NOTE
from diffusers_offload.saved.deferred import DeferredCasts, Promises
from diffusers_offload.saved.holes import Holes
from diffusers_offload.tiers.blockfile import StoreError
from diffusers_offload.tiers.reader import DiskReadError
from diffusers_offload.tiers.sealed import seal, unseal

KILLED = Path(__file__).parent / "killed_conversion.py"


def opened(folder: Path, **arguments):
    return quiet(diffusers_offload.from_pretrained(folder, device="cpu", **arguments))


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return saved("flux", tmp_path_factory.mktemp("source") / "flux", max_shard_size="300KB")[0]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("flux", None),
        ("flux", torch.float16),
        ("flux", torch.bfloat16),
        ("wan22", torch.bfloat16),
        ("sdxl-controlnet", torch.float16),
        ("sd-two-controlnets", None),
        ("kandinsky-combined", torch.bfloat16),
    ],
)
def test_opens_as_the_source_without_it(name, dtype, tmp_path):
    folder, cls = saved(name, tmp_path / "source", max_shard_size="300KB")
    right = quiet(cls.from_pretrained(folder, torch_dtype=dtype))
    place = diffusers_offload.convert(folder, tmp_path / "converted", dtype, pipeline_class=cls)
    shutil.rmtree(folder)
    for _ in range(2):
        pipe = opened(place, pipeline_class=cls)
        assert_the_same(pipe, right)
    assert str(pipe.config._name_or_path) == str(place)
    if dtype is None and name in ("flux", "wan22", "sdxl-controlnet"):
        assert torch.equal(run(pipe, name), run(right, name))


@pytest.mark.parametrize("granularity", ["block", "phase"])
def test_opening_writes_and_reads_no_weights(granularity, source, tmp_path, monkeypatch):
    place = diffusers_offload.convert(source, tmp_path / "converted", offload_granularity=granularity)
    files = {path: path.stat().st_mtime_ns for path in place.rglob("*.safetensors")}
    monkeypatch.setattr("diffusers_offload.saved.settling._part", lambda *_: pytest.fail("read"))
    pipe = opened(place, offload_granularity=granularity)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*.safetensors")} == files
    assert pipe.block_offload.report().disk.bytes_read == 0


def test_plain_diffusers_does_not_take_it_for_a_model(source, tmp_path):
    place = diffusers_offload.convert(source, tmp_path / "converted")
    with pytest.raises(OSError, match=r"safetensors|found"):
        DiffusionPipeline.from_pretrained(place)


def test_converting_again_changes_nothing(source, tmp_path, monkeypatch):
    place = diffusers_offload.convert(source, tmp_path / "converted")
    files = {path: path.stat().st_mtime_ns for path in place.rglob("*.safetensors")}
    monkeypatch.setattr("diffusers_offload.saved.settling._part", lambda *_: pytest.fail("read again"))
    diffusers_offload.convert(source, place)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("*.safetensors")} == files


def test_the_command(source, tmp_path, capsys):
    place = tmp_path / "converted"
    assert cli.main(["convert", str(source), str(place), "--dtype", "bfloat16"]) == 0
    assert str(place) in capsys.readouterr().out
    assert_the_same(opened(place), DiffusionPipeline.from_pretrained(source, torch_dtype=torch.bfloat16))
    with pytest.raises(SystemExit) as error:
        cli.main(["convert", str(tmp_path / "nothing"), str(tmp_path / "other")])
    assert error.value.code == 2


# --- refusals ---------------------------------------------------------------------------------------------


def test_another_dtype_than_it_holds(source, tmp_path):
    place = diffusers_offload.convert(source, tmp_path / "converted", torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch_dtype.*float16.*bfloat16"):
        opened(place, torch_dtype=torch.float16)
    opened(place, torch_dtype=torch.bfloat16)


def test_a_half_converted_folder(source, tmp_path, monkeypatch):
    def fail(*arguments):
        raise StoreError("the disk is full")

    place = tmp_path / "converted"
    monkeypatch.setattr("diffusers_offload.tiers.store.Store.link", fail)
    with pytest.raises(StoreError, match="full"):
        diffusers_offload.convert(source, place)
    monkeypatch.undo()
    with pytest.raises(StoreError, match=f"{NOTE}.*did not end"):
        opened(place)
    assert_the_same(
        opened(diffusers_offload.convert(source, place)), DiffusionPipeline.from_pretrained(source)
    )


@pytest.mark.parametrize("damage", ["truncated", "header", "gone", "folder"])
def test_a_damaged_file_is_named(damage, source, tmp_path):
    place = diffusers_offload.convert(source, tmp_path / "converted")
    file = next(place.glob("transformer-*/transformer_blocks.1-*"))
    if damage == "truncated":
        os.truncate(file, file.stat().st_size - 1)
    elif damage == "header":
        with file.open("r+b") as stream:
            stream.seek(20)
            stream.write(b"x")
    elif damage == "gone":
        file.unlink()
    else:
        shutil.rmtree(file.parent)
    with pytest.raises(StoreError, match=file.parent.name if damage == "folder" else file.name):
        opened(place)
    diffusers_offload.convert(source, place)
    assert_the_same(opened(place), DiffusionPipeline.from_pretrained(source))


def test_changed_data_are_never_served(source, tmp_path):
    place = diffusers_offload.convert(source, tmp_path / "converted")
    file = next(place.glob("transformer-*/transformer_blocks.1-*"))
    with file.open("r+b") as stream:
        stream.seek(8192 + 100)
        byte = stream.read(1)
        stream.seek(8192 + 100)
        stream.write(bytes([byte[0] ^ 1]))
    pipe = opened(place)
    with pytest.raises(DiskReadError, match=file.name):
        run(pipe, "flux")


def test_another_models_store_under_its_name(source, tmp_path):
    other = build("flux")
    with torch.no_grad():
        other.transformer.proj_out.weight.mul_(2)
    other.save_pretrained(tmp_path / "other")
    one = diffusers_offload.convert(source, tmp_path / "one")
    two = diffusers_offload.convert(tmp_path / "other", tmp_path / "two")
    (mine,), (theirs,) = one.glob("transformer-*"), two.glob("transformer-*")
    shutil.rmtree(mine)
    shutil.copytree(theirs, mine)
    with pytest.raises(StoreError, match="another model"):
        opened(one)


def test_every_byte_of_the_note_counts(source, tmp_path):
    place = diffusers_offload.convert(source, tmp_path / "converted")
    raw = (place / NOTE).read_bytes()
    rng = random.Random(0)
    for position in rng.sample(range(len(raw)), 30):
        changed = bytearray(raw)
        changed[position] ^= 1 << rng.randrange(8)
        (place / NOTE).write_bytes(changed)
        with pytest.raises(StoreError, match=NOTE):
            opened(place)


@pytest.mark.parametrize(
    "edit",
    [
        lambda note: note["headers"].update({"../escaped.safetensors": [100, "{}"]}),
        lambda note: note["headers"].update({"/tmp/escaped.safetensors": [100, "{}"]}),
        lambda note: note["headers"].update({"escaped.json": [100, "{}"]}),
        lambda note: note.update(torch_dtype="save"),
        lambda note: note.update(components={"../x": "0" * 32}),
        lambda note: note.update(format=99),
        lambda note: note.update(more=1),
    ],
)
def test_a_strangers_note(edit, source, tmp_path):
    place = diffusers_offload.convert(source, tmp_path / "converted")
    note = unseal((place / NOTE).read_bytes())
    edit(note)
    (place / NOTE).write_bytes(seal(note))
    with pytest.raises(StoreError, match=NOTE):
        opened(place)
    assert not (tmp_path / "escaped.safetensors").exists()


def test_what_was_killed_before_its_note_was_there_goes_on(source, tmp_path):
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / f".{16 * '0'}.tmp").write_bytes(b"{")
    opened(diffusers_offload.convert(source, tmp_path / "converted"))


def test_destinations_that_are_something_else(source, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters/one.txt").write_text("dear")
    with pytest.raises(ValueError, match="something else"):
        diffusers_offload.convert(source, tmp_path / "letters")
    with pytest.raises(ValueError, match="source itself"):
        diffusers_offload.convert(source, source)
    place = diffusers_offload.convert(source, tmp_path / "converted")
    with pytest.raises(ValueError, match="converted already"):
        diffusers_offload.convert(place, tmp_path / "twice")


# --- kills ------------------------------------------------------------------------------------------------


def test_killed_at_random_moments(source, tmp_path):
    """A process converts on command and is killed; what is left is completed, or refused as it is.

    KILLS=50 in the environment tries more of them.
    """
    kills = int(os.environ.get("KILLS", "8"))
    place, right = tmp_path / "converted", DiffusionPipeline.from_pretrained(source)
    seen = {"killed": 0, "refused": 0, "complete": 0}
    with subprocess.Popen(
        [sys.executable, KILLED, source, place, str(kills)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        for line in process.stdout:
            if not line.startswith("{"):
                continue
            told = json.loads(line)
            seen["killed"] += told["killed"]
            try:
                pipe = opened(place)
            except (StoreError, ValueError):  # not begun yet, or not ended
                seen["refused"] += 1
            else:
                assert_the_same(pipe, right)
                pipe.disable_block_offload()
                seen["complete"] += 1
                shutil.rmtree(place)
            process.stdin.write("\n")
            process.stdin.flush()
    assert process.returncode == 0
    assert seen["killed"] >= kills // 2 and seen["refused"] >= kills // 4, seen
    diffusers_offload.convert(source, place)
    assert_the_same(opened(place), right)
    assert not (place / "unfinished").exists()


def test_what_lies_in_a_hole_is_not_read(tmp_path):
    """Here it holds something, so that a look at it shows."""
    files = [tmp_path / f"{name}.safetensors" for name in ("hole", "other")]
    for file in files:
        save_file({"small": torch.ones(10), "large": torch.ones(2**16)}, file)
    begin = 8 + int.from_bytes(files[0].read_bytes()[:8], "little")
    with Promises() as promises, DeferredCasts(promises, Holes({files[0]: begin})):
        hole, other = (load_file(file) for file in files)
        assert not hole["small"].bfloat16().any() and other["small"].bfloat16().all()
        promised = hole["large"].bfloat16()
    assert promised.all()  # what is promised comes from the file
