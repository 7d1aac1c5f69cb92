"""LightX2V's configuration: what is not used is listed once, whatever is wrong is named."""

import json

import pytest
from helpers import warnings_of_ours
from hypothesis import given
from hypothesis import strategies as st

from diffusers_offload import OffloadConfig
from diffusers_offload.policy import parse_bytes

READ = OffloadConfig.from_lightx2v
KEYS = sorted(OffloadConfig.__dataclass_fields__)


def test_other_keys_are_listed_in_one_warning(tmp_path):
    file = tmp_path / "wan_i2v.json"
    file.write_text(
        json.dumps({"infer_steps": 40, "cpu_offload": True, "seed": 1, "max_memory": 4, "a\nb": 0})
    )
    with warnings_of_ours() as warned:
        READ(file)
    (record,) = warned
    message = record.getMessage()
    assert all(
        part in message for part in ("wan_i2v.json", "infer_steps, seed, 'a\\nb'", "lazy_load: max_memory")
    )
    assert "cpu_offload" not in message
    with warnings_of_ours() as warned:
        READ({"cpu_offload": True, "lazy_load": True, "max_memory": 4})
    assert not warned


WRONG = {
    **{
        key: ["true", 1, 0, 1.0, [], {}]
        for key in KEYS
        if key.endswith("_offload") or key in ("lazy_load", "offload_to_disk")
    },
    "offload_ratio": [1.5, -0.1, float("nan"), "0.5", True, []],
    "offload_granularity": ["leaf", "Block", "", 1, True, ["block"]],
    "num_disk_workers": [0, -1, 2.0, True, "2"],
    "max_memory": [
        0,
        -1,
        float("nan"),
        float("inf"),
        1e-12,
        8 * 2**30,
        10**400,
        "8",
        "x",
        "infGiB",
        "-1GiB",
        True,
        [],
    ],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in KEYS for value in [*WRONG[key], None]])
def test_what_is_wrong_is_named(key, value):
    with pytest.raises(ValueError, match=key) as raised:
        READ({key: value})
    shown = str(raised.value)
    assert repr(value)[:50] in shown
    assert len(shown) < 300


def test_a_number_too_long_to_print():
    with pytest.raises(ValueError, match="max_memory=<int>"):
        READ({"max_memory": 10**5000})


@pytest.mark.parametrize("key", ["lazy_load", "offload_to_disk"])
def test_the_disk_goes_with_offloading(key):
    with pytest.raises(ValueError, match=rf"{key}=True goes with cpu_offload=True"):
        READ({key: True, "t5_cpu_offload": True})


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (b"{", ["JSON", "line 1"]),
        (b"", ["JSON"]),
        (b"\xff\xfe{}", ["JSON"]),
        (b'{"cpu_offload": true, // so', ["JSON"]),
        (b"[" * 100_000, ["JSON"]),
        (b'{"max_memory": ' + b"9" * 5000 + b"}", ["JSON"]),
        (b"[]", ["list", "object"]),
        (b"null", ["NoneType", "object"]),
        (b'"wan.json"', ["str", "object"]),
        (b'{"offload_ratio": NaN}', ["offload_ratio"]),
    ],
)
def test_a_file_that_is_no_configuration(tmp_path, content, parts):
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"broken\.json|offload_ratio") as raised:
        READ(file)
    assert all(part in str(raised.value) for part in parts), str(raised.value)


def test_a_file_with_a_byte_order_mark(tmp_path):
    file = tmp_path / "wan.json"
    file.write_text('{"cpu_offload": true}', encoding="utf-8-sig")
    assert READ(file).cpu_offload


def test_a_file_that_cannot_be_read(tmp_path):
    for path in (tmp_path / "missing.json", tmp_path, "", "a\0b"):
        with pytest.raises(ValueError, match="config="):
            READ(path)


@pytest.mark.parametrize("source", [3, ["a"], b"wan.json", OffloadConfig])
def test_what_is_neither_a_path_nor_a_dict(source):
    with pytest.raises(TypeError, match="config="):
        READ(source)


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)
SIZES = st.builds(
    lambda number, unit: f"{number}{unit}", st.text() | st.floats(), st.sampled_from(["GiB", "mb", "Kb"])
)


@given(key=st.sampled_from(KEYS), value=ANYTHING | SIZES)
def test_any_value_is_taken_or_refused_by_name(key, value):
    try:
        config = READ({key: value})
    except (ValueError, TypeError) as error:
        assert key in str(error)  # noqa: PT017
    else:
        assert getattr(config, key) == value
        assert config.max_memory_bytes > 0


@given(config=st.dictionaries(st.sampled_from(KEYS) | st.text() | st.integers(), ANYTHING, max_size=4))
def test_any_dict_is_taken_or_refused_by_name(config):
    try:
        READ(config)
    except (ValueError, TypeError) as error:
        assert any(key in str(error) for key in KEYS if key in config)  # noqa: PT017


@given(SIZES)
def test_any_size_is_taken_or_refused(size):
    try:
        assert parse_bytes("max_host_memory", size) > 0
    except ValueError as error:
        assert "max_host_memory" in str(error)  # noqa: PT017
