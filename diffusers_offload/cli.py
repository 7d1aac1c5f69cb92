"""The command `diffusers-offload`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator, Sequence

from .policy import check_ratio

# The environment has to know before torch is imported: cuBLAS is deterministic only with a workspace of fixed
# size. The libraries' remarks on optional packages would bury the demo's own lines.
ENVIRONMENT = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    "TRANSFORMERS_VERBOSITY": "error",
    "DIFFUSERS_VERBOSITY": "error",
}


class _PipelineNames:
    """The demo pipelines' names, looked up when asked for: the rest of the command starts without torch."""

    def __iter__(self) -> Iterator[str]:
        from .demo.pipelines import PIPELINES

        return iter(PIPELINES)

    def __contains__(self, name: object) -> bool:
        return name in tuple(self)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command with `argv` (the process's own arguments if None); returns the exit code.

    Raises SystemExit: 0 after `--help`, 2 where the arguments are wrong.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    parser = argparse.ArgumentParser(
        prog="diffusers-offload",
        description="Run diffusion pipelines far larger than the device's memory, equal to the bit.",
    )
    commands = parser.add_subparsers(dest="command", required=True)
    _add_demo(commands)
    arguments = parser.parse_args(argv)
    return arguments.run(arguments)


def _add_demo(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "demo",
        help="run a pipeline resident and offloaded, and compare outputs, times and memory",
        description="Build a real pipeline with random weights (nothing is downloaded), run it resident and "
        "then offloaded, and compare outputs, times and memory. The exit code is 1 if one bit of the output "
        "differs.",
    )
    parser.add_argument(
        "--pipeline",
        default="flux",
        metavar="NAME",
        choices=_PipelineNames(),
        help="one of %(choices)s; %(default)s if left out",
    )
    parser.add_argument(
        "--size",
        default="tiny",
        choices=("tiny", "full"),
        help="tiny (the default) runs anywhere in seconds; full has the published denoiser at its true size",
    )
    parser.add_argument("--device", help='"cuda", "npu", "xpu" or "cpu"; found by itself if left out')
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="of the weights; bfloat16 on an accelerator and float32 on the CPU if left out",
    )
    parser.add_argument("--steps", type=_positive, help="denoising steps; a few if left out")
    parser.add_argument(
        "--offload-ratio",
        type=_ratio,
        metavar="R",
        help="share of the blocks' bytes that streams, 0.0 to 1.0; 1.0 if left out",
    )
    parser.add_argument(
        "--output-dir",
        default="demo-output",
        metavar="DIR",
        help="where the pictures go; %(default)s if left out",
    )
    parser.set_defaults(run=lambda arguments: _demo(arguments, parser))


def _demo(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import torch

    from .demo.show import show
    from .streams import find_device

    try:
        device = find_device(arguments.device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    return show(
        arguments.pipeline,
        size=arguments.size,
        device=device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        steps=arguments.steps,
        offload_ratio=arguments.offload_ratio,
        output_dir=arguments.output_dir,
    )


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _ratio(text: str) -> float:
    try:
        return check_ratio("--offload-ratio", float(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
