"""What a request asks for, without vLLM: parsing, one spelling, salts, and the strength of each token."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from actsteer import (
    BatchError,
    ConceptNotFoundError,
    PositionsError,
    ShapeError,
    StrengthError,
    UnsupportedModelError,
)
from actsteer.integrations.vllm import steer
from actsteer.integrations.vllm.requests import NAME, Request, asked
from actsteer.tokens.positions import chosen, from_text
from actsteer.tokens.tokens import Tokens

CONCEPTS = ("polite", "brief", "c")
USUAL = Request({"polite": (2.0,)}, {"polite": "generated"})
POSITIONS: list[Any] = [
    "prompt",
    "generated",
    "last",
    3,
    14,
    -2,
    [0, 15],
    slice(2, None),
    slice(1, 9, 3),
    slice(-3, None),
]


def ask(said: Any) -> Request | None:
    return asked({NAME: said}, concepts=CONCEPTS, usual=USUAL)


def strengths(request: Request, concept: str, *, start: int, length: int, prompt: int) -> list[float]:
    return request.amounts(concept, Tokens(1, length, start=start, prompt=prompt, may_go_on=True)).tolist()


def test_a_request_says_it_in_short_in_full_and_as_json() -> None:
    full = ask({"c": {"polite": 1.5}})
    assert full == ask({"polite": 1.5}) == ask(json.dumps({"polite": 1.5})) == ask(steer({"polite": 1.5})[NAME])
    assert full == Request({"polite": (1.5,)}, {"polite": "generated"})  # the positions that the file says


def test_what_a_request_does_not_say_is_what_the_file_says() -> None:
    assert ask(steer()[NAME]) == USUAL
    assert ask(steer(3)[NAME]) == Request(dict.fromkeys(CONCEPTS, (3.0,)), {"polite": "generated"})
    assert ask(steer(positions="all")[NAME]) == Request({"polite": (2.0,)}, {})


def test_nothing_is_steered_with_strength_0() -> None:
    assert ask({"polite": 0.0, "brief": [0, 0]}) is None
    assert asked(None, concepts=CONCEPTS, usual=USUAL) is asked({"other": 1}, concepts=CONCEPTS, usual=USUAL) is None


def test_a_concept_may_be_called_c() -> None:
    assert ask({"c": {"c": 1.0}}) == Request({"c": (1.0,)}, {})


@pytest.mark.parametrize(
    ("said", "error", "message"),
    [
        ({"polte": 1.0}, ConceptNotFoundError, "Close names: 'polite'"),
        ({"c": {"polite": 1.0}, "positions": {"brif": "all"}}, ConceptNotFoundError, "Close names: 'brief'"),
        ({"polite": "much"}, StrengthError, "expected a number"),
        ({"polite": True}, StrengthError, "expected a number"),
        ({"polite": float("nan")}, StrengthError, "finite"),
        ({"polite": 1e39}, StrengthError, "float32"),
        ({"polite": []}, StrengthError, "got none"),
        ("{polite: 1}", ValueError, "^expected JSON"),  # the plugin says whose it is
        ("[1]", TypeError, "^expected"),
        ({"c": {"polite": 1.0}, "positions": "everywhere"}, ValueError, "expected all, last, prompt"),
        ({"c": {"polite": 1.0}, "positions": "5:1:-1"}, ValueError, "forward"),
        ({"c": {"polite": 1.0}, "positions": "::0"}, ValueError, "forward"),
        *(
            ({"c": {"polite": 1.0}, "positions": own}, ValueError, "no text is as long")
            for own in (10**30, -(10**400), [3, 10**30], "0:99999999999999999999999", "99999999999:", "::9999999999")
        ),
        ({"c": {"polite": 1.0}, "positions": {"brief": "junk"}}, ValueError, "expected all, last, prompt"),
        ({"c": {"polite": 1.0, "brief": 0}, "positions": {"brief": 10**30}}, ValueError, "no text is as long"),
        ({"c": {"polite": 0}, "positions": "junk"}, ValueError, "expected all, last, prompt"),
        ({"c": {"polite": 1.0}, "positions": {"polite": {}}}, TypeError, "positions"),
    ],
)
def test_what_is_wrong_says_so(said: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ask(said)


def test_a_name_that_is_nearly_right_is_not_ignored() -> None:
    with pytest.raises(ValueError, match="did you mean 'actsteer'"):
        asked({"actster": {"polite": 1.0}}, concepts=CONCEPTS, usual=USUAL)


@pytest.mark.parametrize("name", ["steer", "activation_steering", "Steering", "acsteer"])
def test_whatever_else_is_called_steer_is_not_ignored(name: str) -> None:
    with pytest.raises(ValueError, match="did you mean 'actsteer'"):
        asked({name: {"polite": 1.0}}, concepts=CONCEPTS, usual=USUAL)


def test_steer_takes_numbers_of_numpy_and_of_torch_and_positions_as_in_json() -> None:
    numbers = (np.float32(0.5), np.float64(0.5), torch.tensor(0.5), np.array(0.5))
    assert all(steer(own) == steer(0.5) for own in numbers)
    assert steer(np.int64(2)) == steer(torch.tensor(2)) == steer(2)
    schedules = ([np.float32(1), torch.tensor(0.5)], np.array([1.0, 0.5]), torch.tensor([1.0, 0.5]))
    assert all(steer({"polite": own}) == steer({"polite": [1.0, 0.5]}) for own in schedules)
    for wrong in (np.bool_(True), torch.tensor(True), torch.ones(2, 2), np.float32("nan"), torch.tensor([])):
        with pytest.raises(StrengthError):
            steer(wrong)
    assert steer(positions="2:") == steer(positions=slice(2, None))
    assert steer(positions=[True, False]) == steer(positions=torch.tensor([True, False]))
    for wrong in ("::0", slice(None, None, 0), 10**30, "some"):
        with pytest.raises(ValueError, match="positions"):
            steer(positions=wrong)


def test_steer_checks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StrengthError):
        steer({"polite": float("inf")})
    with pytest.raises(PositionsError, match="callable"):
        steer(1, positions=lambda batch: batch)
    with pytest.raises(PositionsError, match="one text"):
        steer(1, positions=torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(PositionsError, match="one text"):
        steer(1, positions=[[0], [1]])
    monkeypatch.setenv("VLLM_PLUGINS", "other")
    with pytest.raises(UnsupportedModelError, match="VLLM_PLUGINS"):
        steer(1)


@pytest.mark.parametrize("positions", [*POSITIONS, torch.tensor([True, False, True])], ids=str)
def test_positions_come_as_they_were_sent(positions: Any) -> None:
    request = ask(steer({"polite": 1.0}, positions=positions)[NAME])
    assert request is not None
    came = request.positions["polite"]
    tokens = Tokens(1, 3, prompt=3, may_go_on=True) if isinstance(positions, torch.Tensor) else _long()
    assert torch.equal(chosen(came, tokens), chosen(positions, tokens))


def _long() -> Tokens:
    return Tokens(1, 20, prompt=10, may_go_on=True)


@given(
    st.sampled_from(POSITIONS),
    st.lists(st.sampled_from([0.0, 1.0, -0.5]), min_size=1, max_size=3).filter(any),
    st.integers(6, 10),
    st.lists(st.integers(1, 5), max_size=5),
)
def test_passes_of_any_length_give_each_token_the_same(
    positions: Any, c: list[float], prompt: int, chunks: list[int]
) -> None:
    request = Request({"polite": tuple(c)}, {"polite": positions})
    whole = strengths(request, "polite", start=0, length=20, prompt=prompt)
    places, start = [], 0
    for length in [*chunks, 20]:
        length = min(length, 20 - start)
        if length > 0:
            places += strengths(request, "polite", start=start, length=length, prompt=prompt)
        start += max(length, 0)
    assert places == whole
    steady = request.steady_from(prompt)
    assert len(set(whole[int(min(steady, 20)) :])) <= 1


def test_a_schedule_counts_the_steps_of_the_generation() -> None:
    request = Request({"polite": (3.0, 2.0, 1.0)}, {})
    assert strengths(request, "polite", start=0, length=7, prompt=3) == [3.0, 3.0, 3.0, 2.0, 1.0, 1.0, 1.0]


def test_positions_beyond_the_prompt_are_refused() -> None:
    with pytest.raises(BatchError, match="-4"):
        Request({"polite": (1.0,)}, {"polite": -4}).check(3)
    with pytest.raises(ShapeError):
        Request({"polite": (1.0,)}, {"polite": torch.ones(4, dtype=torch.bool)}).check(3)
    Request({"polite": (1.0,)}, {"polite": 7}).check(3)  # may be generated


def test_the_salt_tells_apart_what_makes_other_keys_and_values() -> None:
    one, other = Request({"polite": (1.0,)}, {}), Request({"polite": (1.5,)}, {})
    placed = Request({"polite": (1.0,)}, {"polite": from_text("generated")})
    salts = [
        one.salt("a", 3, None),
        other.salt("a", 3, None),
        one.salt("b", 3, None),
        one.salt("a", 3, "mine"),
        placed.salt("a", 3, None),
        placed.salt("a", 4, None),  # where the prompt ends matters to these positions
    ]
    assert len(set(salts)) == len(salts)
    assert one.salt("a", 3, None) == one.salt("a", 4, None)  # and not to these
    assert all(len(salt) < 128 for salt in salts)
