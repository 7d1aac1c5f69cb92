#!/usr/bin/env python
"""Save a tiny pipeline with random weights, to try the example without downloading anything."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch

from diffusers_offload.demo.pipelines import PIPELINES, build

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse_args(input_args: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse `input_args`, or the process's own arguments if None."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pipeline", choices=tuple(PIPELINES), default="flux")
    parser.add_argument("--torch_dtype", choices=tuple(DTYPES), default="bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", default="tiny-checkpoint", help="folder for the pipeline")
    return parser.parse_args(input_args)


def main(args: argparse.Namespace) -> None:
    """Build the pipeline and write it as `save_pretrained` does."""
    pipe = build(args.pipeline, dtype=DTYPES[args.torch_dtype], seed=args.seed)
    pipe.save_pretrained(args.output_dir)
    print(f"{type(pipe).__name__} saved to {args.output_dir}")


if __name__ == "__main__":
    main(parse_args())
