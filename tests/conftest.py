"""What every test has: deterministic kernels, under which unloaded memory reads as NaN."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
# On some processors (seen: AMD with AVX2) MKL's results depend on where in a line of the cache a weight begins, and in
# a file that Diffusers has mapped that is anywhere.
os.environ.setdefault("MKL_CBWR", "AVX2,STRICT")

import diffusers  # noqa: F401
import pytest
import torch

import diffusers_offload  # noqa: F401


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--simulated",
        action="store_true",
        help="run the tests that need an accelerator on a simulated NPU, and look for races",
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--simulated"):
        from simulated.device import install

        install()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--simulated"):
        wanted = [item for item in items if "[cuda" in item.name or "simulated" in item.path.parts]
        config.hook.pytest_deselected(items=[item for item in items if item not in wanted])
        items[:] = wanted
        return
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no accelerator here"))


def pytest_collection_finish() -> None:
    """What was imported stays: each collection after a test need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def deterministic():
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)  # tiny tensors: a second thread only waits, and badly on a busy machine
    yield
    torch.use_deterministic_algorithms(False)
    gc.collect()


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request) -> Iterator[str]:
    if not request.config.getoption("--simulated"):
        yield request.param
        return
    from simulated.device import THE

    with THE.checked() as checker:
        yield "npu"
    races = checker.races
    if request.node.get_closest_marker("edits_while_loading"):  # what was loaded is dropped, and loaded again
        races = [race for race in races if not race.startswith("write by the host")]
    assert not races, "\n".join(races[:5])


@pytest.fixture
def nobody_is_left_half_way(monkeypatch) -> Iterator[None]:
    """Passes that take turns have all come to their end."""
    from greenlet import greenlet

    from diffusers_offload.pairing import passes

    made = []

    def make(run):
        made.append(greenlet(run))
        return made[-1]

    monkeypatch.setattr(passes, "greenlet", make)
    yield
    assert all(each.dead for each in made)
