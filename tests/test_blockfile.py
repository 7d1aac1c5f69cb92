"""One block in one `.safetensors` file: what goes in comes out, safetensors reads it too, and damage is noticed."""

from __future__ import annotations

import errno
import json
import mmap
import os
import random
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from diffusers_offload import slab
from diffusers_offload.tiers import blockfile, words
from diffusers_offload.tiers.blockfile import PAGE, Part, StoreError

KNOWN = [getattr(torch, name) for name in words.WORDS if hasattr(torch, name)]
UNKNOWN = [torch.complex32, torch.complex128]


def noise(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random bytes as a tensor: every pattern, NaNs with their payload included."""
    size = dtype.itemsize
    count = torch.Size(shape).numel() * size
    limit = 2 if dtype is torch.bool else 256
    return torch.randint(limit, (count,), dtype=torch.uint8).view(dtype).view(shape)


def part_of(name: str, tensors: dict[str, torch.Tensor], extra: int = 0) -> Part:
    """The part with `tensors`, in a slab that was used before, `extra` bytes too long."""
    layout = slab.lay_out(list(tensors.values()))
    data = torch.randint(256, (layout.nbytes + extra,), dtype=torch.uint8)
    slab.gather(layout, list(tensors.values()), data)
    return Part(name, layout, tuple(tensors), data)


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def read_back(part: blockfile.StoredPart) -> list[torch.Tensor]:
    buffer = torch.randint(256, (part.layout.nbytes,), dtype=torch.uint8)
    blockfile.read(part.stored, buffer)
    return slab.views(part.layout, buffer)


def assert_equal(part: blockfile.StoredPart, tensors: dict[str, torch.Tensor]) -> None:
    assert part.names == tuple(tensors)
    for found, wanted in zip(read_back(part), tensors.values(), strict=True):
        assert (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        assert raw(found) == raw(wanted)


def odd_tensors() -> dict[str, torch.Tensor]:
    full, wide, tied = noise((8, 6)), noise((4, 1)), noise((33,), torch.bfloat16)
    return {
        "plain": noise((5, 7), torch.bfloat16),
        "scalar": noise(()),
        "empty": torch.empty(0, 3),
        "empty.slice": full[8:],
        "even": full[::2],
        "odd": full[1::2],
        "transposed": noise((3, 9)).t(),
        "expanded": wide.expand(4, 1000),
        "tied": tied,
        "tied.again": tied.view(33),
        "tied.otherwise": tied.view(3, 11),
        "same": (again := noise((12,))),
        "same.again": again.view(12),
        "shifted": noise((40,))[3:],
        "one": noise((7, 1)).as_strided((7, 1), (1, 5)),
        "größe": noise((2,), torch.float16),
    }


def test_odd_tensors_come_back_as_they_were(tmp_path):
    tensors = odd_tensors()
    written = blockfile.write(tmp_path / "block.safetensors", [part_of("b", tensors)])
    found = blockfile.read_layout(written.path)
    assert found == written
    assert_equal(found.parts[0], tensors)


def test_tensors_that_share_bytes_share_them_afterwards_and_are_stored_once(tmp_path):
    base = noise((1000,))
    tensors = {"a": base[:600], "b": base[400:], "c": base}
    file = blockfile.write(tmp_path / "block.safetensors", [part_of("b", tensors)])
    assert file.nbytes <= PAGE + slab.align(4000, PAGE)
    a, b, c = read_back(file.parts[0])
    c[500] = 42
    assert a[500] == b[100] == 42


@pytest.mark.parametrize("dtype", KNOWN + UNKNOWN, ids=str)
def test_every_dtype_is_kept(tmp_path, dtype):
    tensors = {"a": noise((3, 5), dtype), "b": noise((), dtype), "c": noise((2, 0), dtype)}
    file = blockfile.write(tmp_path / "block.safetensors", [part_of("b", tensors)])
    assert_equal(blockfile.read_layout(file.path).parts[0], tensors)
    with safe_open(file.path, "pt") as opened:
        assert ("a" in opened.keys()) == (dtype in KNOWN)  # noqa: SIM118


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="this torch has no float4")
def test_float4_is_kept_as_bytes(tmp_path):  # torch's deterministic mode cannot make views of it
    tensors = {"a": torch.arange(15, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)}
    part = part_of("b", tensors)
    found = blockfile.read_layout(blockfile.write(tmp_path / "b.safetensors", [part]).path).parts[0]
    assert found.layout.placements == part.layout.placements
    with safe_open(found.stored.path, "pt") as opened:
        assert opened.get_tensor("__bytes__.0").tolist() == list(range(15))


def test_safetensors_reads_the_same_values(tmp_path):
    tensors = odd_tensors() | {str(dtype): noise((4, 3), dtype) for dtype in KNOWN}
    second = {"other.weight": noise((70, 70))}
    file = blockfile.write(tmp_path / "x.safetensors", [part_of("p", tensors), part_of("q", second)])
    raws = {"even", "odd", "transposed", "expanded", "tied", "tied.again", "tied.otherwise", "same.again"}
    with safe_open(file.path, "pt") as opened:
        names = {name for name in opened.keys() if not name.startswith("__")}  # noqa: SIM118
        assert names == set(tensors) - raws | set(second)
        for name in names:
            assert raw(opened.get_tensor(name)) == raw((tensors | second)[name])
        everything = [opened.get_tensor(name) for name in opened.keys()]  # noqa: SIM118
    assert sum(t.nbytes for t in everything) == file.nbytes - file.parts[0].stored.offset


def test_parts_start_at_pages_and_are_padded_to_the_next(tmp_path):
    parts = [part_of(str(n), {f"{n}.w": noise((n,))}, extra=n) for n in (1, 900, 0, 5000)]
    file = blockfile.write(tmp_path / "block.safetensors", parts)
    assert file.nbytes % PAGE == 0 and file.path.stat().st_size == file.nbytes
    ends = [part.stored.offset + slab.align(part.stored.nbytes, PAGE) for part in file.parts]
    assert all(part.stored.offset % PAGE == 0 for part in file.parts)
    assert [*(part.stored.offset for part in file.parts[1:]), file.nbytes] == ends
    for part, given in zip(file.parts, parts, strict=True):
        assert part.layout.placements == given.layout.placements
        assert_equal(part, {f"{part.name}.w": slab.views(given.layout, given.data)[0]})


def test_what_lay_between_the_tensors_leaves_no_trace(tmp_path):
    tensors = {"a": noise((3,)), "b": noise((100,))[1:], "c": noise((5,), torch.int8)}
    files = [blockfile.write(tmp_path / f"{n}.safetensors", [part_of("b", tensors)]) for n in range(2)]
    assert files[0].path.read_bytes() == files[1].path.read_bytes()
    assert files[0].fingerprint == files[1].fingerprint


def test_file_without_tensors(tmp_path):
    file = blockfile.write(tmp_path / "block.safetensors", [part_of("b", {})])
    assert blockfile.read_layout(file.path).parts[0].names == ()
    assert blockfile.write(tmp_path / "none.safetensors", []).parts == ()
    with safe_open(file.path, "pt") as opened:
        assert list(opened.keys()) == []


@pytest.mark.parametrize("name", ["__metadata__", "__gap__.1", "__bytes__.0"])
def test_reserved_names_are_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"cannot be named"):
        blockfile.write(tmp_path / "block.safetensors", [part_of("b", {name: noise((3,))})])
    assert list(tmp_path.iterdir()) == []


def test_wrong_slabs_are_refused(tmp_path):
    part = part_of("b", {"a": noise((300,))})
    path = tmp_path / "block.safetensors"
    for data in (part.data[:-1], part.data.view(2, -1), part.data.view(torch.int16), part.data[::2]):
        with pytest.raises(ValueError, match="slab"):
            blockfile.write(path, [Part("b", part.layout, part.names, data)])
    with pytest.raises(ValueError, match="two tensors"):
        blockfile.write(path, [part, part_of("c", {"a": noise((3,))})])
    with pytest.raises(ValueError, match="names for 1 tensors"):
        blockfile.write(path, [Part("b", part.layout, (), part.data)])
    with pytest.raises(ValueError, match="repeats"):
        blockfile.write(path, [part, part_of("b", {"z": noise((3,))})])
    assert list(tmp_path.iterdir()) == []


# --- damage -----------------------------------------------------------------------------------------------


@pytest.fixture
def file(tmp_path):
    parts = [part_of("p", odd_tensors()), part_of("q", {"w": noise((600, 10))})]
    return blockfile.write(tmp_path / "block.safetensors", parts)


def test_each_changed_byte_of_the_header_is_refused_or_changes_the_fingerprint(file):
    whole = bytearray(file.path.read_bytes())
    head = len(whole) - sum(slab.align(part.stored.nbytes, PAGE) for part in file.parts)
    path = file.path.with_name("changed.safetensors")
    path.write_bytes(whole)
    accepted = 0
    with open(path, "r+b", buffering=0) as changed:
        for position in range(head):
            for value in {whole[position] ^ 1, whole[position] ^ 0x80, 0x20, 0x30, 0x31} - {whole[position]}:
                os.pwrite(changed.fileno(), bytes([value]), position)
                try:
                    accepted += 1
                    assert blockfile.read_layout(path).fingerprint != file.fingerprint
                except StoreError:
                    accepted -= 1
            os.pwrite(changed.fileno(), whole[position : position + 1], position)
    assert blockfile.read_layout(path).fingerprint == file.fingerprint
    assert accepted < head  # names and digests are any text: only the fingerprint tells


def test_random_changes_in_the_data_are_caught(file):
    rng = random.Random(0)
    with open(file.path, "r+b", buffering=0) as changed:
        for _ in range(1000):
            part = rng.choice(file.parts)
            position = part.stored.offset + rng.randrange(part.stored.nbytes)
            old = os.pread(changed.fileno(), 1, position)
            os.pwrite(changed.fileno(), bytes([old[0] ^ rng.randrange(1, 256)]), position)
            with pytest.raises(StoreError, match=r"block\.safetensors cannot be used: its bytes"):
                read_back(part)
            os.pwrite(changed.fileno(), old, position)
    assert blockfile.read_layout(file.path) == file


@pytest.mark.parametrize("change", [-1, -PAGE, 1, PAGE, "head", "empty"])
def test_truncated_and_extended_files_are_refused(file, change):
    length = {"head": 100, "empty": 0}.get(change) if isinstance(change, str) else file.nbytes + change
    os.truncate(file.path, length)
    with pytest.raises(StoreError, match=r"block\.safetensors cannot be used.*Delete"):
        blockfile.read_layout(file.path)
    if length < file.nbytes - PAGE + 1:
        with pytest.raises(StoreError, match=r"shorter|are not those"):
            read_back(file.parts[-1])


def test_vanished_files_links_folders_and_pipes_are_refused(file, tmp_path):
    for make in (
        lambda path: None,
        lambda path: path.mkdir(),
        lambda path: path.symlink_to(file.path),
        os.mkfifo,
    ):
        path = tmp_path / f"other{len(list(tmp_path.iterdir()))}.safetensors"
        make(path)
        with pytest.raises(StoreError, match=f"{path.name} cannot be used"):
            blockfile.read_layout(path)


def edited(file: blockfile.BlockFile, change) -> Path:
    """A copy of `file` whose header went through `change(entries, note)`."""
    whole = file.path.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    entries = json.loads(whole[8 : 8 + length])
    note = json.loads(entries["__metadata__"]["diffusers_offload"])
    change(entries, note)
    entries["__metadata__"].setdefault("diffusers_offload", json.dumps(note))
    if "version" in note:
        entries["__metadata__"]["diffusers_offload"] = json.dumps(note)
    text = json.dumps(entries).encode()
    text = text.ljust(slab.align(8 + len(text), PAGE) - 8)
    path = file.path.with_name("edited.safetensors")
    path.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    return path


def _set(mapping, key, value):
    mapping[key] = value


EDITS = {
    "version of the future": lambda e, n: _set(n, "version", 3),
    "no version": lambda e, n: _set(n, "version", None),
    "parts no list": lambda e, n: _set(n, "parts", {}),
    "a part too few": lambda e, n: n["parts"].pop(),
    "parts swapped": lambda e, n: n["parts"].reverse(),
    "part twice": lambda e, n: n["parts"].append(n["parts"][-1]),
    "offset not of a page": lambda e, n: _set(n["parts"][1], "offset", 8),
    "offset true": lambda e, n: _set(n["parts"][0], "offset", False),
    "longer than the data": lambda e, n: _set(n["parts"][1], "nbytes", 10**9),
    "negative": lambda e, n: _set(n["parts"][0], "nbytes", -1),
    "a float": lambda e, n: _set(n["parts"][0], "nbytes", 4096.0),
    "digest cut": lambda e, n: _set(n["parts"][0], "digest", "00"),
    "digest a number": lambda e, n: _set(n["parts"][0], "digest", 7),
    "tensor of another part": lambda e, n: _set(n["parts"][0]["tensors"], 0, "w"),
    "tensor unknown": lambda e, n: _set(n["parts"][0]["tensors"], 0, "nobody"),
    "a gap as a tensor": lambda e, n: n["parts"][0]["tensors"].append(
        next(k for k in e if k.startswith("__gap__"))
    ),
    "tensor beyond the part": lambda e, n: _set(
        n["parts"][1]["tensors"],
        0,
        {"name": "w", "offset": 2**40, "dtype": "float32", "shape": [600, 10], "stride": [10, 1]},
    ),
    "strides that reach beyond": lambda e, n: _set(
        n["parts"][1]["tensors"],
        0,
        {"name": "w", "offset": 0, "dtype": "float32", "shape": [600, 10], "stride": [11, 1]},
    ),
    "another shape than the entry": lambda e, n: _set(
        n["parts"][1]["tensors"],
        0,
        {"name": "w", "offset": 0, "dtype": "float32", "shape": [10, 600], "stride": [600, 1]},
    ),
    "not aligned": lambda e, n: _set(
        n["parts"][0]["tensors"],
        4,
        {"name": "even", "offset": 2, "dtype": "float32", "shape": [1], "stride": [1]},
    ),
    "a dtype that is a function": lambda e, n: _set(n["parts"][0]["tensors"][4], "dtype", "load"),
    "an entry in no part": lambda e, n: n["parts"][1]["tensors"].clear(),
    "unknown dtype": lambda e, n: _set(e["w"], "dtype", "F31"),
    "dtype a list": lambda e, n: _set(e["w"], "dtype", []),
    "shape too large": lambda e, n: _set(e["w"], "shape", [601, 10]),
    "shape of many": lambda e, n: _set(e["w"], "shape", [2**62] * 70),
    "one offset": lambda e, n: e["w"]["data_offsets"].pop(),
    "a key too many": lambda e, n: _set(e["w"], "more", 1),
    "entry a list": lambda e, n: _set(e, "w", []),
    "a hole": lambda e, n: e.pop(next(k for k in e if k.startswith("__gap__"))),
    "an overlap": lambda e, n: _set(
        e, "v", {"dtype": "U8", "shape": [4], "data_offsets": e["w"]["data_offsets"][:1] * 2}
    ),
    "no metadata of ours": lambda e, n: (
        (n.clear(), _set(e, "__metadata__", {"format": "pt"}))
        and _set(e["__metadata__"], "diffusers_offload", "[]")
    ),
    "metadata deep": lambda e, n: (
        n.clear(),
        _set(e["__metadata__"], "diffusers_offload", "[" * 100_000),
    ),
    "metadata a number": lambda e, n: _set(e["__metadata__"], "format", 3),
}


@pytest.mark.parametrize("edit", EDITS)
def test_headers_that_contradict_themselves_are_refused(file, edit):
    path = edited(file, EDITS[edit])
    with pytest.raises(StoreError, match=r"edited\.safetensors cannot be used: .*\. Delete"):
        blockfile.read_layout(path)


def test_an_edit_that_changes_nothing_is_accepted(file):
    parts = blockfile.read_layout(edited(file, lambda entries, note: None)).parts
    assert [part.layout for part in parts] == [part.layout for part in file.parts]


@pytest.mark.parametrize(
    "text", [b"", b"[]", b'{"a":1,"a":2}', b'{"a":NaN}', b"\xff", b'{"__metadata__":{}}', b"9" * 5000]
)
def test_other_headers_are_refused(tmp_path, text):
    path = tmp_path / "block.safetensors"
    path.write_bytes((PAGE - 8).to_bytes(8, "little") + text.ljust(PAGE - 8)[: PAGE - 8])
    with pytest.raises(StoreError, match="cannot be used"):
        blockfile.read_layout(path)


def test_a_file_of_another_program_is_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({"a": noise((3,))}, tmp_path / "theirs.safetensors")
    with pytest.raises(StoreError, match=r"theirs\.safetensors cannot be used"):
        blockfile.read_layout(tmp_path / "theirs.safetensors")


# --- writing that fails -----------------------------------------------------------------------------------


def failing(call: str, number: int, error: BaseException, monkeypatch) -> None:
    """Let `os.<call>` raise `error` from its `number`-th use on."""
    true, used = getattr(os, call), []

    def replaced(*args, **kwargs):
        used.append(args)
        if len(used) >= number:
            raise error
        return true(*args, **kwargs)

    monkeypatch.setattr(os, call, replaced)


@pytest.mark.parametrize(
    ("call", "number"), [("open", 1), ("writev", 1), ("writev", 2), ("fsync", 1), ("close", 1), ("rename", 1)]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(file, monkeypatch, call, number):
    before = file.path.read_bytes()
    true = os.writev
    monkeypatch.setattr(os, "writev", lambda handle, views: true(handle, [views[0][:3000]]))  # short writes
    for code in (errno.ENOSPC, errno.EIO, errno.EACCES):
        with monkeypatch.context() as patch:
            failing(call, number, OSError(code, os.strerror(code)), patch)
            with pytest.raises(
                StoreError, match=rf"block\.safetensors could not be written: {os.strerror(code)}"
            ):
                blockfile.write(file.path, [part_of("new", {"w": noise((5000,))})])
        assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]
        assert file.path.read_bytes() == before


def test_data_reach_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    calls = []
    for name in ("writev", "fsync", "rename"):
        true = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *given, n=name, t=true: (calls.append(n), t(*given))[1])
    blockfile.write(tmp_path / "block.safetensors", [part_of("b", {"w": noise((50,))})])
    assert calls == ["writev", "fsync", "rename", "fsync"]


@pytest.mark.skipif(not hasattr(os, "O_DIRECT"), reason="no O_DIRECT here")
def test_one_direct_read_fills_a_slab(tmp_path):
    tensors = {"a": noise((7000,)), "b": noise((3,))}
    parts = [part_of("p", {"x": noise((123,))}), part_of("q", tensors)]
    part = blockfile.write(tmp_path / "block.safetensors", parts).parts[1]
    try:
        handle = os.open(part.stored.path, os.O_RDONLY | os.O_DIRECT)
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    length = slab.align(part.stored.nbytes, PAGE)
    memory = mmap.mmap(-1, length)
    assert os.preadv(handle, [memory], part.stored.offset) == length
    os.close(handle)
    buffer = torch.frombuffer(memory, dtype=torch.uint8)
    blockfile.check(part.stored, buffer)
    found = slab.views(part.layout, buffer)
    assert [raw(tensor) for tensor in found] == [raw(tensor) for tensor in tensors.values()]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(file, monkeypatch):
    before = file.path.read_bytes()
    failing("fsync", 1, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        blockfile.write(file.path, [part_of("new", {"w": noise((5000,))})])
    assert [path.name for path in file.path.parent.iterdir()] == [file.path.name]
    assert file.path.read_bytes() == before


def test_short_writes_and_many_pieces_are_written_whole(tmp_path, monkeypatch):
    true = os.writev
    monkeypatch.setattr(os, "writev", lambda handle, views: true(handle, [views[0][:1234]]))
    tensors = {f"t{n}": noise((n % 50,)) for n in range(700)}
    file = blockfile.write(tmp_path / "block.safetensors", [part_of("b", tensors)])
    assert_equal(blockfile.read_layout(file.path).parts[0], tensors)
