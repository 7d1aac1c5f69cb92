"""Text encoders, each with its tokenizer: few layers, of the width that the denoiser's size asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .maker import Maker
from .tokenizers import clip_tokenizer, gemma_tokenizer, llama_tokenizer, qwen_tokenizer, t5_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Pair = tuple[PreTrainedTokenizerBase, PreTrainedModel]

# Hidden sizes. The full ones are the published ones, because the full-size denoisers take them as input.
WIDTHS = {
    "tiny": {"clip-l": 24, "clip-g": 40, "t5": 80, "umt5": 64, "qwen": 64, "llama": 64, "gemma": 48},
    "full": {
        "clip-l": 768,
        "clip-g": 1280,
        "t5": 4096,
        "umt5": 4096,
        "qwen": 3584,
        "llama": 4096,
        "gemma": 2304,
    },
}


def clip(make: Maker, role: str, kind: str = "clip-l", projection: bool = False) -> Pair:
    """CLIP's text tower, "clip-l" or "clip-g"; with `projection` it also projects the pooled output."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    tokens = clip_tokenizer(pad_token="<|endoftext|>" if kind == "clip-l" else "!")
    shape = layers(make, kind, 3)
    config = CLIPTextConfig(
        **shape,
        **special_ids(tokens),
        projection_dim=shape["hidden_size"],
        hidden_act="quick_gelu" if kind == "clip-l" else "gelu",
    )
    return tokens, make(role, CLIPTextModelWithProjection if projection else CLIPTextModel, config)


def t5(make: Maker, role: str, kind: str = "t5") -> Pair:
    """The encoder of T5 v1.1 ("t5") or UMT5 ("umt5")."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    cls, config_cls = (T5EncoderModel, T5Config) if kind == "t5" else (UMT5EncoderModel, UMT5Config)
    tokens = t5_tokenizer()
    shape = layers(make, kind, 3)
    config = config_cls(
        vocab_size=len(tokens),
        d_model=shape["hidden_size"],
        d_kv=shape["hidden_size"] // shape["num_attention_heads"],
        d_ff=shape["intermediate_size"],
        num_layers=shape["num_hidden_layers"],
        num_heads=shape["num_attention_heads"],
        feed_forward_proj="gated-gelu",
    )
    return tokens, make(role, cls, config)


def llama(make: Maker, role: str) -> Pair:
    """Llama without its head."""
    from transformers import LlamaConfig, LlamaModel

    tokens = llama_tokenizer()
    # The pipeline takes the third hidden state from the end: four layers make two that count.
    return tokens, make(role, LlamaModel, LlamaConfig(**layers(make, "llama", 4), **special_ids(tokens)))


def gemma(make: Maker, role: str) -> Pair:
    """Gemma 2 without its head."""
    from transformers import Gemma2Config, Gemma2Model

    tokens = gemma_tokenizer()
    shape = layers(make, "gemma", 3)
    head = shape["hidden_size"] // shape["num_attention_heads"]
    config = Gemma2Config(**shape, **special_ids(tokens), head_dim=head, query_pre_attn_scalar=head)
    return tokens, make(role, Gemma2Model, config)


def qwen(make: Maker, role: str) -> Pair:
    """Qwen 2.5 VL, with its vision tower and language head, neither of which text alone runs."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokens = qwen_tokenizer()
    shape = layers(make, "qwen", 3)
    head = shape["hidden_size"] // shape["num_attention_heads"]
    sections = [head // 8, 3 * head // 16, 3 * head // 16]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    vision = {"depth": 3, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2}
    config = Qwen2_5_VLConfig(
        text_config={**shape, **special_ids(tokens), "rope_parameters": rope},
        vision_config={**vision, "out_hidden_size": shape["hidden_size"], "fullatt_block_indexes": [1]},
        tie_word_embeddings=False,
    )
    return tokens, make(role, Qwen2_5_VLForConditionalGeneration, config)


def layers(make: Maker, kind: str, count: int) -> dict[str, int]:
    """The shape of `count` layers, in the names most configs use."""
    width = WIDTHS[make.size][kind]
    heads = max(4, width // 64)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": count}
    shape["num_attention_heads"] = heads
    if kind in ("qwen", "llama", "gemma"):
        shape["num_key_value_heads"] = heads // 2
    return shape


def special_ids(tokens: PreTrainedTokenizerBase) -> dict[str, int | None]:
    """What a model's config must repeat of its tokenizer."""
    return {
        "vocab_size": len(tokens),
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
    }
