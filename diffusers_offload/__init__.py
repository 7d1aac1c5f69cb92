"""diffusers_offload: run a diffusion pipeline far larger than the device's memory, equal to the bit.

`import diffusers_offload` gives every `DiffusionPipeline` the method `enable_block_offload()`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._install import install, uninstall

if TYPE_CHECKING:
    from .handle import OffloadHandle
    from .lightx2v import OffloadConfig
    from .pipeline import enable_block_offload
    from .planning.planner import Plan
    from .policy import OffloadPolicy
    from .report import Report
    from .saved.conversion import convert
    from .saved.loader import from_pretrained

__version__ = "0.1.0"
__all__ = [
    "OffloadConfig",
    "OffloadHandle",
    "OffloadPolicy",
    "Plan",
    "Report",
    "convert",
    "enable_block_offload",
    "from_pretrained",
    "install",
    "uninstall",
]

_HOME = {
    "OffloadConfig": "lightx2v",
    "OffloadHandle": "handle",
    "OffloadPolicy": "policy",
    "Plan": "planning.planner",
    "Report": "report",
    "convert": "saved.conversion",
    "enable_block_offload": "pipeline",
    "from_pretrained": "saved.loader",
}


def __getattr__(name: str) -> Any:
    # Loaded at first use: importing the package costs nothing beyond importing diffusers.
    if name in _HOME:
        from importlib import import_module

        try:
            home = import_module(f".{_HOME[name]}", __name__)
        except RuntimeError as error:  # torch loads the extensions that it finds installed
            if "torch_npu" not in str(error):
                raise
            raise ImportError(
                "torch_npu is installed but cannot be loaded, probably for want of CANN: source CANN's set_env.sh, or "
                "set TORCH_DEVICE_BACKEND_AUTOLOAD=0 to work without the NPU"
            ) from error
        return getattr(home, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


install()
