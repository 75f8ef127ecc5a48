"""A tiny language model, letters as its tokens, and two concepts."""

import socket

import pytest
import torch

from actsteer import SteeringVector, VectorBank
from tests.zoo import llama


class Letters:
    """A tokenizer: a letter is a token."""

    pad_token_id, eos_token_id = 2, None

    def __call__(self, text):
        return {"input_ids": [3 + ord(letter) % 32 for letter in text]}

    def decode(self, ids, *, skip_special_tokens):
        assert skip_special_tokens
        return "".join(chr(96 + int(token)) for token in ids)


@pytest.fixture
def letters():
    return Letters()


@pytest.fixture
def model():
    """Its texts have no end."""
    return llama(vocab_size=35, eos_token_id=None)


@pytest.fixture
def bank():
    generator = torch.Generator().manual_seed(3)

    def v():
        sites = ("model.layers.0", "model.layers.1")
        return SteeringVector({site: torch.randn(16, generator=generator, dtype=torch.float64) for site in sites})

    return VectorBank({"love": v(), "calm": v()})


@pytest.fixture
def port():
    """A free one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]
