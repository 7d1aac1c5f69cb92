"""What a pipeline returns, as one tensor or one picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def output(result: Any) -> torch.Tensor:
    """The images `[batch, channel, height, width]` or videos `[batch, frame, channel, height, width]`.

    Takes a pipeline's return value (output object or tuple) of output type "pt", "np" or "pil"; gives
    float32 on the CPU, from 0 to 1.
    """
    media = result[0] if isinstance(result, tuple) else getattr(result, "images", None)
    if media is None:
        media = result.frames
    if isinstance(media, torch.Tensor):
        return media.detach().to("cpu", torch.float32)
    return as_tensor(media)


def as_tensor(media: Any) -> torch.Tensor:
    """A channel-last array, a PIL image or a (nested) list of these, as a channel-first float32 tensor."""
    import numpy as np

    if isinstance(media, (list, tuple)):
        return torch.stack([as_tensor(item) for item in media])
    array = np.asarray(media)
    scale = 255.0 if array.dtype == np.uint8 else 1.0
    return torch.from_numpy(array.astype(np.float32) / scale).movedim(-1, -3)


def save_preview(result: Any, path: str | Path) -> None:
    """Write the first image, or the frames of the first video side by side, as a PNG file."""
    from PIL import Image

    first = output(result)[0]
    picture = first if first.ndim == 3 else torch.cat(list(first), dim=-1)
    pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1)
    Image.fromarray(pixels.numpy()).save(path, format="PNG")
