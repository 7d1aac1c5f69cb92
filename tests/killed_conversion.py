"""Converts a pipeline in children that are killed at random moments; run by test_convert.py in a process of its own.

    python tests/killed_conversion.py SOURCE DESTINATION COUNT

After each it prints, as JSON, whether it was killed, and waits for a line.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
import traceback

import torch
from diffusers import DiffusionPipeline

import diffusers_offload


def main(source: str, destination: str, count: str) -> None:
    torch.set_num_threads(1)
    DiffusionPipeline.from_pretrained(source)  # what the children need is imported now
    rng, duration = random.Random(7), 0.0
    for turn in range(int(count)):
        begin = time.perf_counter()
        child = os.fork()
        if not child:
            code = 1
            try:
                diffusers_offload.convert(source, destination)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        if turn:
            time.sleep(rng.uniform(0, duration))
            os.kill(child, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        duration = duration or time.perf_counter() - begin
        print(json.dumps({"killed": code == -signal.SIGKILL}), flush=True)
        sys.stdin.readline()


if __name__ == "__main__":
    main(*sys.argv[1:])
