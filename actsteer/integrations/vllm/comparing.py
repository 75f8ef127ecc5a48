"""Comparing: whether a vLLM engine answers prompts as the hooked model does, token by token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from actsteer.errors import UnsupportedModelError
from actsteer.integrations.vllm.requests import NAME, steer
from actsteer.steering.steerer import Steerer

_SLACK, _LEAST, _MOST = 3.0, 1e-3, 0.05


class Answer(NamedTuple):
    """The tokens that a model gives greedily, with their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]


@final
@dataclass(frozen=True)
class Comparison:
    """How far an engine is from the hooked model.

    Args:
        dtype: in which both computed.
        prompts: how many were answered.
        equal: to how many the answers have the same tokens.
        furthest: the largest difference of log-probabilities, as far as the tokens are the same.
        parted: where they part, how much likelier the hooked model's token is to it than the engine's, at most.
        plain: the larger of both where nothing is steered, which is what the two differ by anyway.
        moved: the largest difference between the hooked model's steered and its plain answers.
    """

    dtype: str
    prompts: int
    equal: int
    furthest: float
    parted: float
    plain: float
    moved: float

    @property
    def tolerance(self) -> float:
        """What the steered answers may differ by: 3 times what the plain ones do, and 0.001 at least."""
        return max(_LEAST, _SLACK * self.plain)

    @property
    def failure(self) -> str | None:
        """Why they are not the same, or not proved to be; None if they are."""
        if self.plain > _MOST:
            return (
                f"unsteered answers differ by {self.plain:.3g} in {self.dtype}, beyond {_MOST}, and nothing is proved; "
                "compare in float32 (--dtype float32), and see whether both load the same model"
            )
        if self.parted > self.tolerance:
            return (
                f"tokens differ, and no tie explains it: the hooked model's are likelier by {self.parted:.3g}, where "
                f"unsteered answers differ by {self.plain:.3g}; {_HINT}"
            )
        if self.furthest > self.tolerance:
            return (
                f"the log-probabilities differ by {self.furthest:.3g}, where unsteered ones do by {self.plain:.3g}; "
                f"{_HINT}"
            )
        if self.moved <= self.tolerance:
            return (
                f"the steering moves the log-probabilities by {self.moved:.3g} at most, and nothing is proved; give "
                "other prompts, or a larger c"
            )
        return None


_HINT = "is the plugin kept out by VLLM_PLUGINS, or the bank another one?"


def compare(
    steerer: Steerer, prompts: Sequence[Sequence[int]], *, model: str, bank: str, tokens: int = 16
) -> Comparison:
    """Have vLLM and the hooked model answer the same prompts, steered and not, greedily, both in the latter's dtype.

    Args:
        steerer: of the transformers model.
        prompts: token ids.
        model, bank: what vLLM is to load.
        tokens: how many each answer has.

    Raises:
        UnsupportedModelError: vLLM is not installed.
    """
    try:
        from vllm import LLM, SamplingParams
    except ImportError:
        raise UnsupportedModelError("vLLM is not installed here; pip install vllm") from None
    ours = [greedy(steerer.model, prompt, tokens) for prompt in prompts]
    with steerer:
        ours += [greedy(steerer.model, prompt, tokens) for prompt in prompts]
    dtype = str(next(steerer.model.parameters()).dtype).removeprefix("torch.")
    llm = LLM(model, dtype=dtype, additional_config={NAME: {"bank": bank}})
    c: Any = dict(steerer.c) if isinstance(steerer.c, Mapping) else dict.fromkeys(steerer.bank, steerer.c)
    params = [
        SamplingParams(max_tokens=tokens, min_tokens=tokens, temperature=0, logprobs=0, extra_args=extra)
        for extra in (None, steer(c))
        for _ in prompts
    ]
    outputs = llm.generate([{"prompt_token_ids": list(prompt)} for prompt in (*prompts, *prompts)], params)
    theirs = [
        Answer(list(own.outputs[0].token_ids), [next(iter(step.values())).logprob for step in own.outputs[0].logprobs])
        for own in outputs
    ]
    return compared(ours, theirs, dtype=dtype)


def compared(ours: Sequence[tuple[Answer, Tensor]], theirs: Sequence[Answer], *, dtype: str) -> Comparison:
    """The hooked model's answers, with all log-probabilities (S, V), and the engine's: first plain, then steered."""
    count = len(ours) // 2
    apart = [_apart(own, given) for own, given in zip(ours, theirs, strict=True)]
    return Comparison(
        dtype,
        count,
        equal=sum(own[0].tokens == given.tokens for own, given in zip(ours[count:], theirs[count:], strict=True)),
        furthest=max(far for far, _ in apart[count:]),
        parted=max(part for _, part in apart[count:]),
        plain=max(max(own) for own in apart[:count]),
        moved=max(max(_apart(ours[place + count], ours[place][0])) for place in range(count)),
    )


def _apart(ours: tuple[Answer, Tensor], theirs: Answer) -> tuple[float, float]:
    """The largest difference of log-probabilities up to where the tokens part, and how much likelier ours is there."""
    answer, known = ours
    worst = 0.0
    for place, (one, other) in enumerate(zip(answer.tokens, theirs.tokens, strict=True)):
        worst = max(worst, abs(float(known[place, other]) - theirs.logprobs[place]))
        if one != other:
            return worst, answer.logprobs[place] - float(known[place, other])
    return worst, 0.0


@torch.no_grad()
def greedy(model: Any, prompt: Sequence[int], tokens: int) -> tuple[Answer, Tensor]:
    """What a transformers model answers greedily, as it is or as it is steered, and all log-probabilities, (S, V).

    An answer has as many tokens as asked for, and none that would end it.
    """
    ids = torch.tensor([list(prompt)], device=next(model.parameters()).device)
    limits = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
    told = {"output_logits": True, "return_dict_in_generate": True, "attention_mask": torch.ones_like(ids)}
    made = model.generate(ids, **limits, **told)
    known = torch.stack([own[0].float().log_softmax(-1) for own in made.logits]).cpu()
    found = made.sequences[0, len(prompt) :].tolist()
    return Answer(found, [float(known[place, token]) for place, token in enumerate(found)]), known
