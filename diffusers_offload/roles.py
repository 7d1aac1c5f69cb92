"""What a component is for: an autoencoder, a CLIP-like encoder, a T5-like one; found by what it is.

Names differ between pipelines (`text_encoder` is a T5 in Wan and a CLIP in Flux), so they are asked last.
"""

from __future__ import annotations

from torch import nn

AUTOENCODER = "vae"
CLIP = "clip"
T5 = "t5"

# In the model type of an encoder that was trained to match text with something.
_CONTRASTIVE = ("clip", "clap", "siglip")
_NAMES = {"vae": AUTOENCODER, "vqvae": AUTOENCODER, "image_encoder": CLIP, "text_encoder": T5}


def role_of(name: str, model: nn.Module | type) -> str | None:
    """The role of component `name`: "vae", "clip", "t5" or None.

    Args:
        name: what the pipeline calls it; used only where `model` tells nothing.
        model: the component, or its class while there is none.

    Returns:
        "vae" for what encodes or decodes latents. Of transformers' models: "clip" for text encoders of CLIP's
        kind and for those of images, "t5" for all others that read text (T5, UMT5, Llama, Qwen-VL ...). None for
        the rest: denoisers, ControlNets, encoders of sound, vocoders.
    """
    model = getattr(model, "_orig_mod", model)  # what torch.compile wrapped itself around
    if callable(getattr(model, "encode", None)) or callable(getattr(model, "decode", None)):
        return AUTOENCODER
    kind = getattr(getattr(model, "config_class", None), "model_type", None)
    if isinstance(kind, str):  # a model of transformers; Diffusers' own have no `config_class`
        reads = getattr(model, "main_input_name", "input_ids")
        if reads == "pixel_values" or any(word in kind.lower() for word in _CONTRASTIVE):
            return CLIP
        return T5 if reads == "input_ids" else None
    return _NAMES.get(name.rstrip("0123456789").rstrip("_"))
