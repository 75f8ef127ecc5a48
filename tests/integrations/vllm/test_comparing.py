"""The verdict on an engine's answers, by answers that are made up."""

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from actsteer import Steerer, SteeringVector
from actsteer.integrations.vllm.comparing import Answer, compare, compared, greedy

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
    found = compared([PLAIN, STEERED], [shifted(PLAIN[0], 1e-4), shifted(STEERED[0], 3e-4)], dtype="float32")
    assert found.failure is None
    assert found.equal == found.prompts == 1
    assert found.plain == pytest.approx(1e-4, abs=1e-6)
    assert found.furthest == pytest.approx(3e-4, abs=1e-6)


def test_an_engine_that_answers_unsteered_fails() -> None:
    found = compared([PLAIN, STEERED], [PLAIN[0], PLAIN[0]], dtype="float32")
    assert found.failure is not None
    assert "VLLM_PLUGINS" in found.failure
    assert found.equal == 0


def test_a_steering_that_does_nothing_proves_nothing() -> None:
    found = compared([PLAIN, PLAIN], [PLAIN[0], PLAIN[0]], dtype="float32")
    assert found.failure is not None
    assert "nothing is proved" in found.failure


def test_half_precision_may_differ_as_far_as_it_does_unsteered() -> None:
    plain = shifted(PLAIN[0], 0.01)
    assert compared([PLAIN, STEERED], [plain, shifted(STEERED[0], 0.025)], dtype="bfloat16").failure is None
    assert compared([PLAIN, STEERED], [plain, shifted(STEERED[0], 0.05)], dtype="bfloat16").failure is not None


def parting(by: float) -> tuple[tuple[Answer, Tensor], Answer]:
    """An answer, and one whose last token is another, less likely by so much."""
    known = torch.tensor([[2.0, 0.0], [2.0, 0.0], [by, 0.0]]).log_softmax(-1)
    answer = Answer([0, 0, 0], known[:, 0].tolist())
    return (answer, known), Answer([0, 0, 1], [*answer.logprobs[:2], float(known[2, 1])])


def test_tokens_that_differ_decide_unless_it_is_a_tie() -> None:
    for by, same in ((5e-4, True), (0.02, False)):
        steered, other = parting(by)
        plain = (Answer([1, 1, 1], steered[1][:, 1].tolist()), steered[1])
        found = compared([plain, steered], [plain[0], other], dtype="float32")
        assert (found.equal, found.furthest) == (0, 0.0)
        assert found.parted == pytest.approx(by, abs=1e-5)
        assert (found.failure is None) is same
        assert same or "no tie explains it" in str(found.failure)


def test_where_plain_answers_are_far_apart_nothing_is_proved() -> None:
    for plain in (shifted(PLAIN[0], 0.1), Answer([3 - own for own in PLAIN[0].tokens], PLAIN[0].logprobs)):
        found = compared([PLAIN, STEERED], [plain, STEERED[0]], dtype="bfloat16")
        assert "nothing is proved; compare in float32" in str(found.failure)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_engine_is_loaded_in_the_dtype_of_the_hooked_model(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = transformers.LlamaForCausalLM(config).eval().to(dtype)
    seen: dict[str, Any] = {}

    class LLM:
        def __init__(self, model: str, **options: Any) -> None:
            seen.update(options)

        def generate(self, prompts: list[dict[str, list[int]]], params: list[Any]) -> list[Any]:
            made = []
            for own in prompts:
                answer, _ = greedy(model, own["prompt_token_ids"], 4)
                steps = [{0: SimpleNamespace(logprob=value)} for value in answer.logprobs]
                made.append(SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer.tokens, logprobs=steps)]))
            return made

    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace(LLM=LLM, SamplingParams=SimpleNamespace))
    steerer = Steerer(model, SteeringVector({"model.layers.1": torch.ones(16)}, concept="v"), c=1.0)
    found = compare(steerer, [[1, 2, 3]], model="here", bank="v.safetensors", tokens=4)
    assert seen["dtype"] == found.dtype == str(dtype).removeprefix("torch.")
    assert found.plain == 0
