"""Random use of small real pipelines for some minutes, each result compared with the resident pipeline's.

python benchmarks/soak.py --minutes 5 --device cuda --seed 0

Enables with random policies and tiers, from the host or from the device, runs, changes policies while enabled, lets
a forward fail in a random module, edits under `suspended()`, disables. Ends with an error at the first difference of
one bit, printing what led to it.
Counts what stays behind: device bytes, threads, file descriptors.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import threading
from collections import Counter, deque
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

import diffusers_offload  # noqa: F401
from diffusers_offload.demo import pipelines
from diffusers_offload.tiers import packed

NAMES = ("flux", "wan22", "sdxl-controlnet", "sd3")
SEEDS = (0, 1)


class Failure(Exception):
    """What a forward is made to raise."""


class Soak:
    """One pipeline, what it gives when resident, and what was done to it last."""

    def __init__(self, name: str, device: str, random: Random, folder: Path) -> None:
        self.name, self.device, self.random, self.folder = name, device, random, folder / name
        self.pipe = pipelines.build(name).to(device)
        self.expected = {seed: self._call(seed) for seed in SEEDS}
        self.pipe.to("cpu")
        self.weights = {key: module.state_dict() for key, module in self._modules().items()}
        self.weights = {key: {n: t.clone() for n, t in each.items()} for key, each in self.weights.items()}
        self.log: deque[str] = deque(maxlen=12)
        self.enabled = False

    def step(self) -> str:
        """Do one random thing; returns its name."""
        choices = (
            ["enable", "run", "run", "run", "fail", "suspend", "disable"] if self.enabled else ["enable"]
        )
        action = self.random.choice(choices)
        getattr(self, f"_{action}")()
        return action

    def _enable(self) -> None:
        arguments: dict[str, Any] = {
            "offload_granularity": self.random.choice(("block", "phase", "leaf")),
            "offload_ratio": self.random.choice((1.0, 1.0, 0.7, 0.3, 0.0)),
        }
        if self.random.random() < 0.6:
            arguments["tier"] = self.random.choice(("packed", "packed", "disk"))
            arguments["offload_dir"] = self.folder if arguments["tier"] == "disk" else None
            arguments["pack_on_disk"] = self.random.choice((None, True, False))
        arguments["pair_passes"] = self.random.choice((None, True, False))
        words = ("resident", "model", "block", "phase", "leaf")
        some = [key for key in self._modules() if self.random.random() < 0.3]
        arguments["components"] = {key: self.random.choice(words) for key in some}
        if not self.enabled:
            self.pipe.to(self.random.choice(("cpu", self.device)))
        self.log.append(f"enable {arguments}")
        self.pipe.enable_block_offload(device=self.device, **arguments)
        self.enabled = True

    def _run(self) -> None:
        seed = self.random.choice(SEEDS)
        self.log.append(f"run {seed}")
        if not torch.equal(self._call(seed), self.expected[seed]):
            raise AssertionError(f"{self.name}: not the resident output, after {list(self.log)}")

    def _fail(self) -> None:
        module = self.random.choice([m for part in self._modules().values() for m in part.modules()])
        left = self.random.randrange(4)

        def fails(*_: Any) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise Failure

        self.log.append(f"fail in {type(module).__name__} after {left}")
        hook = module.register_forward_pre_hook(fails)
        try:
            self._call(0)
        except Failure:
            pass
        finally:
            hook.remove()
        self._run()

    def _suspend(self) -> None:
        self.log.append("suspend")
        with self.pipe.block_offload.suspended():
            self._compare_weights()

    def _disable(self) -> None:
        self.log.append("disable")
        self.pipe.disable_block_offload()
        self.enabled = False
        self._compare_weights()

    def _compare_weights(self) -> None:
        for key, module in self._modules().items():
            for name, tensor in module.state_dict().items():
                if not torch.equal(tensor.cpu(), self.weights[key][name]):
                    raise AssertionError(f"{self.name}: {key}.{name} has changed, after {list(self.log)}")

    def _call(self, seed: int) -> torch.Tensor:
        arguments = pipelines.call_kwargs(self.name)
        result = self.pipe(**arguments, generator=torch.Generator("cpu").manual_seed(seed))
        return pipelines.output(result).cpu()

    def _modules(self) -> dict[str, torch.nn.Module]:
        return {k: m for k, m in self.pipe.components.items() if isinstance(m, torch.nn.Module)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pipelines", default=",".join(NAMES))
    arguments = parser.parse_args()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)  # what is not loaded reads as NaN
    logging.getLogger("diffusers.block_offload").setLevel(logging.ERROR)  # of failures that are made
    packed.SMALLEST, packed.SLOT_BYTES = 0, 64 * 1024  # small weights go the way of large ones
    with TemporaryDirectory() as folder:
        _soak(arguments, Path(folder))


def _soak(arguments: argparse.Namespace, folder: Path) -> None:
    random = Random(arguments.seed)
    soaks = [Soak(name, arguments.device, random, folder) for name in arguments.pipelines.split(",")]
    before, done, begin = _left(arguments.device), Counter(), perf_counter()
    while perf_counter() - begin < arguments.minutes * 60:
        done[random.choice(soaks).step()] += 1
    for soak in soaks:
        if soak.enabled:
            soak._run()
            soak._disable()
        soak.pipe.to("cpu")
    after = _left(arguments.device)
    print(
        f"{arguments.minutes:g} minutes on {arguments.device}, seed {arguments.seed}: {dict(done)}, no bit off"
    )
    print(f"before: {before}; after: {after}")


def _left(device: str) -> dict[str, int]:
    gc.collect()
    kind = torch.device(device).type
    bytes_left = torch.get_device_module(kind).memory_allocated() if kind != "cpu" else 0
    descriptors = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else -1
    return {"device bytes": bytes_left, "threads": threading.active_count(), "descriptors": descriptors}


if __name__ == "__main__":
    main()
