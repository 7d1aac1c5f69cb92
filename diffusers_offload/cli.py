"""The command `diffusers-offload`."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Iterator, Sequence

from .policy import GRANULARITIES, check_ratio

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
    _add_plan(commands)
    _add_convert(commands)
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


def _add_plan(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "plan",
        help="show what a saved pipeline would be taken apart into, without loading its weights",
        description="Show for each component of a saved pipeline the units that would stream, what does not "
        "and why, and the bytes on device and host for each granularity. Only configs are read, and the headers of "
        "weight files where no --dtype is given. The exit code is 1 if --max-device-memory is too little for the "
        "weights alone, and 2 if there is no such pipeline.",
    )
    parser.add_argument(
        "path",
        nargs="?",
        help="a directory with a model_index.json, one with a component's config.json, or an id on the Hub",
    )
    parser.add_argument(
        "--pipeline",
        metavar="NAME",
        choices=_PipelineNames(),
        help="in place of a path, one of the demo's pipelines: %(choices)s",
    )
    parser.add_argument(
        "--size",
        default="full",
        choices=("tiny", "full"),
        help="of the demo's pipeline; full (the default) has the published denoiser at its true size",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="as torch_dtype of from_pretrained; that of the stored weights if left out",
    )
    parser.add_argument(
        "--granularity",
        default="block",
        choices=GRANULARITIES,
        help="what to show in detail, as offload_granularity; %(default)s if left out",
    )
    parser.add_argument(
        "--component",
        action="append",
        metavar="NAME",
        help="look at this component only; may be given several times",
    )
    parser.add_argument(
        "--max-device-memory", metavar="SIZE", help='such as "10GiB", or bytes: what each granularity leaves'
    )
    parser.add_argument("--json", action="store_true", help="as data, sizes in bytes")
    parser.set_defaults(run=lambda arguments: _plan(arguments, parser))


def _plan(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    if (arguments.path is None) == (arguments.pipeline is None):
        parser.error("name either a path or a --pipeline of the demo's")
    import json

    import torch

    from .inspection import inspect
    from .policy import parse_bytes
    from .saved.skeleton import demo_skeleton, open_skeleton

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    try:
        size = arguments.max_device_memory
        in_bytes = size is not None and re.fullmatch("[0-9]{1,19}", size)
        limit = parse_bytes("--max-device-memory", int(size) if in_bytes else size)
        if arguments.pipeline is not None:
            found = demo_skeleton(arguments.pipeline, arguments.size, dtype)
        else:
            found = open_skeleton(arguments.path, dtype)
        found = found.only(arguments.component)
    except ValueError as error:
        parser.error(_printable(str(error)))
    inspection = inspect(
        found.modules, arguments.granularity, found.title, found.dtypes, found.missing, limit
    )
    print(json.dumps(inspection.as_dict(), indent=2) if arguments.json else _printable(str(inspection)))
    too_little = inspection.too_little()
    if too_little is not None:
        print(_printable(too_little), file=sys.stderr)
    return 1 if too_little is not None else 0


def _add_convert(commands: argparse._SubParsersAction) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a saved pipeline as block files, which from_pretrained opens at once",
        description="Write the weights of a saved pipeline block by block, never holding more than two blocks, beside "
        "copies of its configs and tokenizers. Killed, it goes on where it was when it is called again. The exit code "
        "is 2 if it cannot be done.",
    )
    parser.add_argument("source", help="a directory with a model_index.json, or an id on the Hub")
    parser.add_argument("destination", help="a directory: empty, not there yet, or of an earlier conversion")
    parser.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="as torch_dtype of from_pretrained; what Diffusers loads without it if left out",
    )
    parser.add_argument("--variant", help='of the files, such as "fp16"')
    parser.add_argument(
        "--granularity",
        default="block",
        choices=GRANULARITIES,
        help="that it will be offloaded with; %(default)s if left out",
    )
    parser.add_argument(
        "--packed",
        action="store_true",
        help="pack the weights of blocks, without loss in some 70%% of the bytes: for devices that unpack fast",
    )
    parser.set_defaults(run=lambda arguments: _convert(arguments, parser))


def _convert(arguments: argparse.Namespace, parser: argparse.ArgumentParser) -> int:
    import torch

    from .saved.conversion import convert

    dtype = getattr(torch, arguments.dtype) if arguments.dtype else None
    try:
        folder = convert(
            arguments.source,
            arguments.destination,
            dtype,
            arguments.variant,
            arguments.granularity,
            progress=True,
            packed=arguments.packed,
        )
    except (ValueError, OSError) as error:
        parser.error(_printable(str(error)))
    print(_printable(f"{folder}: open it with diffusers_offload.from_pretrained"))
    return 0


def _printable(text: str) -> str:
    """`text` with what a terminal would obey, or cannot show, written out: names may be a stranger's."""
    encoding = sys.stdout.encoding or "utf-8"
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    return shown.encode(encoding, "backslashreplace").decode(encoding)


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
