"""Tokenizers with one token per character, made in memory."""

from __future__ import annotations

import string
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"


def clip_tokenizer(pad_token: str) -> PreTrainedTokenizerBase:
    """CLIP's: lower case, byte level, 77 tokens with start and end."""
    from transformers import CLIPTokenizer

    letters = byte_alphabet()
    tokens = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(numbered(tokens), merges=[], pad_token=pad_token, model_max_length=77)


def t5_tokenizer(max_length: int = 512) -> PreTrainedTokenizerBase:
    """T5's and UMT5's: a unigram model that ends each text with `</s>`."""
    from transformers import T5TokenizerFast

    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    letters = [(letter, -2.0) for letter in SPACE + printable()]
    return T5TokenizerFast(special + letters, extra_ids=0, model_max_length=max_length)


def qwen_tokenizer() -> PreTrainedTokenizerBase:
    """Qwen 2's: byte level, with the tokens of its chat template."""
    from transformers import Qwen2Tokenizer

    tokens = [*byte_alphabet(), "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    chat = ["<|im_start|>", "<|im_end|>"]
    return Qwen2Tokenizer(numbered(tokens), merges=[], additional_special_tokens=chat, model_max_length=2048)


def llama_tokenizer() -> PreTrainedTokenizerBase:
    """Llama's, with the tokens of its chat template."""
    from transformers import LlamaTokenizerFast

    chat = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokens = ["<unk>", "<s>", "</s>", *chat, SPACE, *printable()]
    return LlamaTokenizerFast(
        numbered(tokens),
        merges=[],
        pad_token="</s>",
        additional_special_tokens=chat,
        padding_side="right",
        model_max_length=2048,
    )


def gemma_tokenizer() -> PreTrainedTokenizerBase:
    """Gemma's."""
    from transformers import GemmaTokenizer

    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", SPACE, *printable()]
    return GemmaTokenizer(numbered(tokens), merges=[], model_max_length=2048)


def byte_alphabet() -> list[str]:
    """The 256 characters that stand for bytes in a byte-level vocabulary, in a fixed order."""
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


def printable() -> str:
    """The ASCII characters of a prompt, without the space (the vocabularies write it as `SPACE`)."""
    return string.ascii_letters + string.digits + string.punctuation + "\n"


def numbered(tokens: list[str]) -> dict[str, int]:
    """A vocabulary: each token with its index."""
    return {token: index for index, token in enumerate(tokens)}
