"""A pipeline of Flux's architecture with a denoiser of a given size, loaded and run in a process of its own.

    python tests/large_flux.py make FOLDER GIGABYTES [HEADS]
    python tests/large_flux.py resident FOLDER
    python tests/large_flux.py streamed FOLDER OFFLOAD_DIR MAX_HOST_MEMORY

`make` writes its checkpoint, in float32; the others load it in bfloat16, `GIGABYTES` of it, and print, as JSON, a
digest of the picture that they make, seconds, and the most anonymous memory that there was, in MiB, sampled every
millisecond.
"""

from __future__ import annotations

import hashlib
import json
import sys
import threading
import time
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel

import diffusers_offload
from diffusers_offload.demo import pipelines

HEAD = 128  # dimensions; the true model has 24 heads of them


def anonymous() -> int:
    """Anonymous memory of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not tell")


class Peak(threading.Thread):
    """The most anonymous memory between `start` and `stop`."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.bytes = 0
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.001):
            self.bytes = max(self.bytes, anonymous())

    def stop(self) -> int:
        self._ended.set()
        self.join()
        return max(self.bytes, anonymous())


def make(folder: str, gigabytes: float, heads: int = 12) -> None:
    pipe = pipelines.build("flux", dtype=torch.float32)
    small = dict(pipe.transformer.config)
    pair = (26 + 2 * 15) * (heads * HEAD) ** 2  # weights of a double block and two single ones, about
    pairs = max(1, round(gigabytes * 1e9 / 2 / pair))
    config = {**small, "num_layers": pairs, "num_single_layers": 2 * pairs}
    config |= {"attention_head_dim": HEAD, "num_attention_heads": heads, "axes_dims_rope": (16, 56, 56)}
    torch.manual_seed(0)
    pipe.transformer = FluxTransformer2DModel.from_config(config)
    pipe.save_pretrained(folder, max_shard_size="500MB")
    print(sum(p.numel() for p in pipe.transformer.parameters()) * 2 / 1e9, "GB in bfloat16")


def picture(pipe) -> str:
    pipe.set_progress_bar_config(disable=True)
    kwargs = {**pipelines.call_kwargs("flux"), "num_inference_steps": 1}
    result = pipelines.output(pipe(**kwargs, generator=torch.Generator("cpu").manual_seed(0)))
    return hashlib.sha256(result.float().numpy().tobytes()).hexdigest()


def main(what: str, folder: str, *rest: str) -> None:
    torch.set_num_threads(1)
    if what == "make":
        return make(folder, float(rest[0]), *map(int, rest[1:]))
    before, peak, begin = anonymous(), Peak(), time.perf_counter()
    peak.start()
    if what == "resident":
        pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    else:
        pipe = diffusers_offload.from_pretrained(
            folder,
            torch_dtype=torch.bfloat16,
            offload_dir=rest[0],
            max_host_memory=rest[1],
            device="cpu",
        )
    loaded, peak_loaded = time.perf_counter() - begin, peak.bytes
    digest = picture(pipe)
    told = {
        "digest": digest,
        "load_seconds": round(loaded, 2),
        "seconds": round(time.perf_counter() - begin, 2),
        "anonymous_before": before // 2**20,
        "anonymous_peak_loading": peak_loaded // 2**20,
        "anonymous_peak": peak.stop() // 2**20,
        "model": sum(p.numel() * p.element_size() for p in pipe.transformer.parameters()) // 2**20,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main(*sys.argv[1:])
