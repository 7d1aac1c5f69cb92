"""Machines with torch_npu that lack something: what to do is said."""

import os
import subprocess
import sys

import pytest

# A torch_npu as it is without CANN: torch loads it at import, and it fails.
BROKEN = "raise ImportError('libascend_hal.so: cannot open shared object file')"


@pytest.fixture
def site(tmp_path):
    """A folder of packages with a torch_npu that torch finds as an extension."""
    package = tmp_path / "torch_npu"
    package.mkdir()
    (package / "__init__.py").write_text(f"def _autoload():\n    {BROKEN}\n")
    metadata = tmp_path / "torch_npu-2.13.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 2.13.0\n")
    (metadata / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    return tmp_path


def python(code, site=None, **environment):
    path = os.pathsep.join(
        filter(None, [str(site) if site else "", os.environ.get("PYTHONPATH", ""), os.getcwd()])
    )
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


def test_an_npu_without_cann(site):
    result = python("import diffusers_offload; diffusers_offload.enable_block_offload", site)
    assert result.returncode
    assert "CANN" in result.stderr and "TORCH_DEVICE_BACKEND_AUTOLOAD=0" in result.stderr


@pytest.mark.parametrize(
    ("installed", "loads", "message"),
    [(False, "1", "install torch_npu"), (True, "0", "TORCH_DEVICE_BACKEND_AUTOLOAD=0")],
)
def test_an_npu_that_torch_does_not_know(site, installed, loads, message):
    code = "import torch, diffusers_offload as d; d.enable_block_offload(torch.nn.Linear(1, 1), device='npu')"
    result = python(code, site if installed else None, TORCH_DEVICE_BACKEND_AUTOLOAD=loads)
    assert result.returncode
    assert "RuntimeError: device='npu' is not there: " in result.stderr
    assert message in result.stderr


def test_what_is_used_of_torch_npu_is_there_in_2_13():
    """The names of `torch.npu` that the simulated device has are those of torch_npu 2.13, and no others are used."""
    public = (
        "is_available is_initialized device_count current_device set_device current_stream default_stream set_stream "
        "stream synchronize empty_cache mem_get_info memory_allocated max_memory_allocated memory_reserved "
        "max_memory_reserved reset_peak_memory_stats get_rng_state set_rng_state manual_seed_all Stream Event"
    )
    code = (
        "import sys; sys.path.insert(0, 'tests')\n"
        "from simulated.device import _Module\n"
        "print(*(n for n in vars(_Module) if not n.startswith('_')))"
    )
    assert set(python(code).stdout.split()) <= set(public.split())
