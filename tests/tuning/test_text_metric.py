"""TextMetric: what the model writes after each prompt, whatever else is in the batch."""

import pytest
import torch
from torch import nn

from actsteer import Steerer, SteeringVector, TextMetric, UnsupportedModelError
from tests.zoo import llama


class Letters:
    """A tokenizer of small letters."""

    pad_token_id, eos_token_id = None, 0

    def __call__(self, text):
        return {"input_ids": [ord(letter) - 96 for letter in text]}

    def batch_decode(self, ids, *, skip_special_tokens):
        return [" ".join(map(str, row.tolist())) for row in ids]


PROMPTS = ["abc", "a", "hello", "zz"]


def written(model, prompt, count):
    """By the model alone, without pads."""
    ids = torch.tensor([Letters()(prompt)["input_ids"]])
    made = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, pad_token_id=0
    )
    return " ".join(map(str, made[0, ids.shape[1] :].tolist()))


@pytest.fixture(scope="module")
def model():
    model = llama()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("c", [0.0, 3.0])
def test_a_continuation_is_the_one_that_the_prompt_has_alone(model, batch_size, c):
    v = SteeringVector(
        {"model.layers.0": torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(1))}
    )
    metric = TextMetric(
        tokenizer=Letters(),
        prompts=PROMPTS,
        score=lambda texts: [len(t) for t in texts],
        max_new_tokens=4,
        batch_size=batch_size,
    )
    with Steerer(model, v, c=c):
        found = metric.continuations(model)
        assert found == [written(model, prompt, 4) for prompt in PROMPTS]
        assert metric(model).tolist() == [float(len(text)) for text in found]


def test_it_writes_the_same_in_training_mode_and_whatever_the_models_own_beams(model):
    metric = TextMetric(tokenizer=Letters(), prompts=PROMPTS, score=lambda texts: [0.0] * 4, max_new_tokens=4)
    before = metric.continuations(model)
    model.train()
    model.generation_config.num_beams = 2
    try:
        assert metric.continuations(model) == before
        assert model.training
    finally:
        model.eval()
        model.generation_config.num_beams = 1


@pytest.mark.parametrize("wrong", [lambda texts: [1.0], lambda texts: torch.ones(2, 2)])
def test_a_score_that_is_no_number_for_every_text_is_refused(model, wrong):
    with pytest.raises(TypeError, match=r"TextMetric\.score: expected a number for each of 4 texts, got"):
        TextMetric(tokenizer=Letters(), prompts=PROMPTS, score=wrong, max_new_tokens=2)(model)


def test_a_model_that_writes_nothing_is_refused():
    with pytest.raises(UnsupportedModelError, match="Identity generates no text; give a language model"):
        TextMetric(tokenizer=Letters(), prompts=PROMPTS, score=len)(nn.Identity())
