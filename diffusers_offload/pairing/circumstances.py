"""What changes the result of a forward besides the module and its arguments."""

from __future__ import annotations

import sys
import threading

import torch


def modes(device_type: str) -> tuple:
    """What torch keeps per thread that changes what a forward computes."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_cache_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled(device_type),
        torch.get_autocast_dtype(device_type),
        torch._C._len_torch_function_stack(),
        torch._C._is_torch_function_enabled(),
        torch._C._len_torch_dispatch_stack(),
    )


def circumstances(device_type: str) -> tuple:
    """What must be the same when a follower's call comes as when it was computed, besides the module."""
    attention = getattr(
        sys.modules.get("diffusers.models.attention_dispatch"), "_AttentionBackendRegistry", None
    )
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    return (
        modes(device_type),
        threading.get_ident(),
        torch.get_num_threads(),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_float32_matmul_precision(),
        (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        (
            cuda.flash_sdp_enabled(),
            cuda.mem_efficient_sdp_enabled(),
            cuda.math_sdp_enabled(),
            cuda.cudnn_sdp_enabled(),
        ),
        (
            cuda.matmul.allow_tf32,
            cuda.matmul.allow_fp16_reduced_precision_reduction,
            cuda.matmul.allow_bf16_reduced_precision_reduction,
        ),
        getattr(attention, "_active_backend", None),
    )
