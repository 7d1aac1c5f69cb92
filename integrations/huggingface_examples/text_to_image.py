#!/usr/bin/env python
"""Text to image with any Diffusers pipeline, its weights streaming block by block to the accelerator."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

import diffusers_offload  # noqa: F401  gives every pipeline `enable_block_offload`

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `input_args`, or the process's own arguments if None."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="folder of a saved pipeline, or a model's name on the Hub",
    )
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--num_inference_steps", type=int, default=28)
    parser.add_argument("--guidance_scale", type=float, help="the pipeline's own default if left out")
    parser.add_argument("--height", type=int, help="in pixels; the pipeline's own default if left out")
    parser.add_argument("--width", type=int, help="in pixels; the pipeline's own default if left out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--torch_dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--device", help='"cuda", "npu", "xpu" or "cpu"; found by itself if left out')
    parser.add_argument("--output", default="image.png", help="where the image goes")
    parser.add_argument(
        "--offload_granularity",
        default="block",
        help='what moves as a whole: "block", "model", or "resident" to move nothing',
    )
    parser.add_argument(
        "--offload_ratio",
        type=float,
        help="share of each component's blocks that streams, 0.0 to 1.0; 1.0 if left out",
    )
    parser.add_argument(
        "--max_device_memory", help='upper bound on the peak device memory, such as "10GiB"; none if left out'
    )
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Load, enable block offload, run once, print the peak and the report, save the image."""
    pipe = DiffusionPipeline.from_pretrained(
        args.pretrained_model_name_or_path, torch_dtype=DTYPES[args.torch_dtype]
    )
    pipe.enable_block_offload(
        device=args.device,
        offload_granularity=args.offload_granularity,
        offload_ratio=args.offload_ratio,
        **given(max_device_memory=args.max_device_memory),
    )
    print(pipe.block_offload.plan)

    with pipe.block_offload.measured():
        image = pipe(
            prompt=args.prompt,
            num_inference_steps=args.num_inference_steps,
            generator=torch.Generator("cpu").manual_seed(args.seed),
            **given(guidance_scale=args.guidance_scale, height=args.height, width=args.width),
        ).images[0]

    report = pipe.block_offload.report()
    peak = f"{report.peak_bytes / 2**30:.2f} GiB" if report.peak_bytes else "n/a, the device is the CPU"
    print(f"\npeak device memory: {peak}")
    print(f"\n{report}")
    image.save(args.output)
    print(f"\nimage saved to {args.output}")


def given(**arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that are not None, so that the others keep the callee's default."""
    return {name: value for name, value in arguments.items() if value is not None}


if __name__ == "__main__":
    main(parse_args())
