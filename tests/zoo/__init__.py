"""More real pipelines for the tests, chosen for how differently they are built: `build`, `call_kwargs`, `output`.

Like the demo's, at their tiny size: every weight random, a different one for each, nothing downloaded. A name
here says the family; what is odd about it stands at its builder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import send_to_device

from diffusers_offload.demo import pipelines as demo
from diffusers_offload.demo.maker import Maker

from .audio import SOUND
from .bypass import BYPASS
from .control import CONTROL
from .image import IMAGES
from .kandinsky import KANDINSKY
from .parts import Entry
from .unets import UNETS
from .video import VIDEOS

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PIPELINES: dict[str, Entry] = {**UNETS, **KANDINSKY, **IMAGES, **CONTROL, **VIDEOS, **SOUND, **BYPASS}
RESULTS = ("audios", "audio", "image_embeddings", "image_embeds", "negative_image_embeds")  # beside media


def build(
    name: str, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0
) -> DiffusionPipeline:
    """Return the pipeline `name` of PIPELINES in eval mode, made on the CPU, its weights following from `seed`."""
    pipe = PIPELINES[name].build(Maker("tiny", dtype, torch.device("cpu"), seed))
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def call_kwargs(name: str, device: str = "cpu") -> dict[str, Any]:
    """Return arguments for a short run of pipeline `name` on `device`; the caller adds a generator."""
    call = PIPELINES[name].call
    return send_to_device(dict(call() if callable(call) else call), device)


def output(result: Any) -> torch.Tensor:
    """All that the pipeline made, as one float32 tensor on the CPU: pictures, frames, sound, embeddings."""
    made = [torch.as_tensor(result[word]) for word in RESULTS if result.get(word) is not None]
    if "images" in result or "frames" in result:
        made.append(demo.output(result))
    return torch.cat([part.detach().to("cpu", torch.float32).flatten() for part in made])
