"""MindIE-SD's `enable_offload`, on the engine of diffusers_offload: existing calls work unchanged."""

from .offload import enable_offload

__all__ = ["enable_offload"]
