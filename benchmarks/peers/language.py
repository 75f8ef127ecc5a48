"""The language model of the rows: SmolLM2-135M, or a tiny Llama of as many blocks as are steered."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from reference.language import model as smollm2

STEERED = 10


def load() -> tuple[Any, Any]:
    """(model, tokenizer): SmolLM2-135M-Instruct in float32, by transformers 4 and 5 alike.

    Raises:
        ModelMissingError: it is neither in the cache nor installed.
    """
    home = smollm2.folder()
    model: Any = AutoModelForCausalLM.from_pretrained(home, dtype=torch.float32, local_files_only=True)
    model.generation_config.eos_token_id = None  # no answer ends early
    return model.eval(), PreTrainedTokenizerFast.from_pretrained(home)  # which transformers 4 would seek by a name of 5


def tiny() -> nn.Module:
    """A Llama with random weights."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": STEERED}
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    special: dict[str, Any] = {"vocab_size": 128, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(LlamaConfig(**sizes, **heads, **special, initializer_range=0.2))
    return model.eval()


def tiny_tokenizer() -> Any:
    """A token for every letter, for the tiny model."""
    letters = {letter: ord(letter) for letter in map(chr, range(1, 128))} | {"<pad>": 0}
    made = Tokenizer(WordLevel(letters, unk_token=" "))
    made.pre_tokenizer = Split("", "isolated")
    kind: Any = PreTrainedTokenizerFast  # untyped
    return kind(tokenizer_object=made, pad_token="<pad>")


def batches(tokenizer: Any, texts: list[str], *, size: int = 32) -> list[dict[str, Tensor]]:
    """The texts in this order, padded on the right."""
    options: dict[str, Any] = {"padding": True, "padding_side": "right", "return_tensors": "pt"}
    options |= {"return_token_type_ids": False}
    return [dict(tokenizer(texts[start : start + size], **options)) for start in range(0, len(texts), size)]


def last_tokens(activation: Tensor, mask: Tensor) -> Tensor:
    """The rows of each text's last token, where pads are on the right."""
    return activation[torch.arange(len(mask)), mask.sum(dim=1) - 1]
