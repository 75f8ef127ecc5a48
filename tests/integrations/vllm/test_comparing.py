"""The verdict on an engine's answers, by answers that are made up."""

import pytest
import torch
from torch import Tensor

from actsteer.integrations.vllm.comparing import Answer, compared

VOCABULARY = 4


def known(seed: int) -> Tensor:
    return torch.randn(3, VOCABULARY, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


def ours(seed: int) -> tuple[Answer, Tensor]:
    logprobs = known(seed)
    tokens = logprobs.argmax(dim=1).tolist()
    return Answer(tokens, logprobs.max(dim=1).values.tolist()), logprobs


def shifted(answer: Answer, by: float) -> Answer:
    return Answer(answer.tokens, [own + by for own in answer.logprobs])


PLAIN, STEERED = ours(0), ours(4)


def test_an_engine_that_answers_the_same_passes() -> None:
    found = compared([PLAIN, STEERED], [shifted(PLAIN[0], 1e-4), shifted(STEERED[0], 3e-4)])
    assert found.failure is None
    assert found.equal == found.prompts == 1
    assert found.plain == pytest.approx(1e-4, abs=1e-6)
    assert found.furthest == pytest.approx(3e-4, abs=1e-6)


def test_an_engine_that_answers_unsteered_fails() -> None:
    found = compared([PLAIN, STEERED], [PLAIN[0], PLAIN[0]])
    assert found.failure is not None
    assert "VLLM_PLUGINS" in found.failure
    assert found.equal == 0


def test_a_steering_that_does_nothing_proves_nothing() -> None:
    found = compared([PLAIN, PLAIN], [PLAIN[0], PLAIN[0]])
    assert found.failure is not None
    assert "nothing is proved" in found.failure


def test_half_precision_may_differ_as_far_as_it_does_unsteered() -> None:
    assert compared([PLAIN, STEERED], [shifted(PLAIN[0], 0.01), shifted(STEERED[0], 0.03)]).failure is None
    assert compared([PLAIN, STEERED], [shifted(PLAIN[0], 0.01), shifted(STEERED[0], 0.05)]).failure is not None
