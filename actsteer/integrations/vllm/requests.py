"""Requests: what one request asks of the steering, checked before the engine sees it."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from actsteer.errors import ConceptNotFoundError, PositionsError, StrengthError, UnsupportedModelError, close_names
from actsteer.steering.numbers import finite
from actsteer.tokens import positions as tokens_positions
from actsteer.tokens.positions import Positions
from actsteer.tokens.tokens import Tokens

NAME = "actsteer"
"""Under which vLLM's `additional_config`, `extra_args` and `vllm_xargs` have what is ours."""
Strength: TypeAlias = float | Sequence[float]
"""One number, or one for each step of the generation (the prompt, the first token, ...), the last for all later."""


def steer(
    c: Strength | Mapping[str, Strength] | None = None, *, positions: Positions | Mapping[str, Positions] | None = None
) -> dict[str, Any]:
    """What a request asks for, as `SamplingParams(extra_args=steer({"polite": 1.5}))` and `vllm_xargs` take it.

    Args:
        c: the strength of all concepts, or concept -> strength, and what is not named is 0; a list has one for each
            step of the generation (0 for the prompt), and its last one holds from there on. Numbers of numpy and of
            torch are numbers, too. None: as the file says, or 1.
        positions: which tokens are steered, as for a `Steerer` or as in JSON ("2:", [True, False]), for all concepts or
            concept -> positions; a callable cannot be sent. None: as the file says, or all.

    Raises:
        StrengthError, PositionsError, TypeError, ValueError: what no engine could do.
        UnsupportedModelError: VLLM_PLUGINS keeps the plugin out, so that vLLM would answer unsteered.

    >>> steer({"polite": 1.5}, positions="generated")
    {'actsteer': '{"c": {"polite": 1.5}, "positions": "generated"}'}
    """
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and NAME not in allowed.split(","):
        raise UnsupportedModelError(
            f"VLLM_PLUGINS={allowed!r} keeps the plugin {NAME!r} out of vLLM, which would answer unsteered; add it"
        )
    said: dict[str, Any] = {}
    if c is not None:
        said["c"] = _each(c, _checked)
    if positions is not None:
        said["positions"] = _each(positions, lambda own, _: _sent(own if callable(own) else _received(own)))
    return {NAME: json.dumps(said)}


@final
@dataclass(frozen=True)
class Request:
    """What is to be done for one request; there is none for one that is not steered.

    Args:
        c: concept -> its strength in each step of the generation, the last one for all later steps; none is 0 in all.
        positions: concept -> its positions, of those that are not steered at all of them.
    """

    c: Mapping[str, tuple[float, ...]]
    positions: Mapping[str, Positions]

    @property
    def is_even(self) -> bool:
        """Whether every token gets the same, wherever the prompt ends."""
        return not self.positions and all(len(own) == 1 for own in self.c.values())

    def steady_from(self, prompt: int) -> float:
        """The token from which on all get the same, in a text whose prompt has this many; it may never come."""
        if self.is_even:
            return 0
        steps = max(len(own) for own in self.c.values())
        ends = [_end(own) for own in self.positions.values()]
        return max(prompt + max(0, steps - 2), *ends) if ends else prompt + max(0, steps - 2)

    def sent(self) -> dict[str, Any]:
        """As numbers, strings and lists, in one spelling."""
        positions = {name: _sent(own) for name, own in sorted(self.positions.items())}
        return {"c": {name: list(own) for name, own in sorted(self.c.items())}, "positions": positions}

    def salt(self, digest: str, prompt: int, given: str | None) -> str:
        """What keeps its keys and values apart, in the prefix cache, from those that another steering has made.

        Args:
            digest: of the bank.
            prompt: the number of the prompt's tokens, on which positions and steps depend.
            given: the caller's own salt.
        """
        parts = [digest, self.sent(), None if self.is_even else prompt, given]
        return f"{NAME}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()}"

    def check(self, prompt: int) -> None:
        """That its positions are there in a prompt of this many tokens.

        Raises:
            BatchError, ShapeError: the prompt is too short for an index; a mask of another length.
        """
        for own in self.positions.values():
            tokens_positions.chosen(own, Tokens(1, prompt, prompt=prompt, may_go_on=True))

    def amounts(self, concept: str, tokens: Tokens) -> Tensor:
        """The strength of a concept at each of these tokens of one text, (S,)."""
        steps, own = tokens.steps, self.c[concept]
        amounts = torch.tensor([own[min(step, len(own) - 1)] for step in steps])
        if concept in self.positions:
            amounts = torch.where(tokens_positions.chosen(self.positions[concept], tokens)[0], amounts, 0.0)
        return amounts


def asked(extra_args: Mapping[str, Any] | None, *, concepts: Sequence[str], usual: Request) -> Request | None:
    """What the extra arguments of a request ask for; None where nothing is to be steered.

    Args:
        concepts: those of the bank.
        usual: what is done where the request does not say.

    Raises:
        ConceptNotFoundError, StrengthError, PositionsError, TypeError, ValueError: with what was expected.
    """
    for key in extra_args or ():
        if key != NAME and "steer" in key.lower():
            raise ValueError(f"extra argument {key!r}: did you mean {NAME!r}? Here it is what steers")
    if (said := said_in(extra_args)) is None:
        return None
    given = said.get("c")
    if given is None:
        c: Mapping[str, Any] = usual.c
    else:
        c = given if isinstance(given, Mapping) else dict.fromkeys(concepts, given)
    where = said.get("positions")
    positions: Mapping[str, Any] = usual.positions
    if where is not None:
        positions = where if isinstance(where, Mapping) else dict.fromkeys(concepts, where)
    for name in (*c, *positions):
        if name not in concepts:
            raise ConceptNotFoundError(f"no concept {name!r} in the bank. {close_names(name, concepts)}")
    strengths = {name: _checked(own, name) for name, own in c.items()}
    each = {name: tuple(own if isinstance(own, list) else [own]) for name, own in strengths.items()}
    active = {name: own for name, own in each.items() if any(own)}
    chosen = {name: _received(own) for name, own in positions.items()}  # all, for what is wrong is said of any
    placed = {name: own for name, own in chosen.items() if name in active and not _is_all(own)}
    return Request(active, placed) if active else None


def said_in(extra_args: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """c and positions as the extra arguments of a request have them; None if they say nothing of a steering.

    Raises:
        TypeError, ValueError: they say it in another form, or under a name that is nearly right.
    """
    for key in extra_args or ():
        if key != NAME and difflib.get_close_matches(key.lower(), [NAME], cutoff=0.8):
            raise ValueError(f"extra argument {key!r}: did you mean {NAME!r}?")
    if extra_args is None or NAME not in extra_args:
        return None
    said = extra_args[NAME]
    if isinstance(said, str):
        try:
            said = json.loads(said)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected JSON such as {_EXAMPLE}, got {said[:80]!r}: {error}") from None
    if not isinstance(said, Mapping):
        raise TypeError(f"expected {_EXAMPLE}, got {str(said)[:80]!r}")
    return said if said.keys() <= {"c", "positions"} else {"c": said}


_EXAMPLE = '{"c": {"polite": 1.5}, "positions": "generated"}'


def _each(given: Any, checked: Callable[[Any, str | None], Any]) -> Any:
    """What was given for all concepts, or concept -> what was given, checked."""
    return (
        {name: checked(own, name) for name, own in given.items()}
        if isinstance(given, Mapping)
        else checked(given, None)
    )


def _checked(strength: Any, concept: str | None) -> float | list[float]:
    """A strength, or one for each step."""
    where = "c" if concept is None else f"c[{concept!r}]"
    if isinstance(strength, Tensor) or hasattr(strength, "__array__"):
        strength = strength.tolist()
    if isinstance(strength, Sequence) and not isinstance(strength, str):
        if not strength:
            raise StrengthError(f"{where}: expected a number for each step of the generation, got none")
        return [_number(own.item() if hasattr(own, "item") else own, where) for own in strength]
    return _number(strength, where)


def _number(strength: Any, where: str) -> float:
    """One finite number, within the range of float32, in which the engine computes."""
    if isinstance(strength, bool) or not isinstance(strength, int | float):
        raise StrengthError(f"{where}: expected a number, or a list with one for each step, got {strength!r}")
    try:
        number = finite(strength, where)
    except ValueError as error:
        raise StrengthError(str(error)) from None
    if abs(number) > (largest := torch.finfo(torch.float32).max):
        raise StrengthError(f"{where}: expected a number of at most {largest:.4g}, as in float32, got {number:.4g}")
    return number


def _is_all(positions: Positions) -> bool:
    return isinstance(positions, str) and positions == "all"


def _end(positions: Positions) -> float:
    """The token from which on positions choose all, or none; those of the prompt end with it."""
    match positions:
        case slice(stop=None, step=None | 1):
            return max(positions.start or 0, 0)
        case slice(stop=None):
            return math.inf
        case slice():
            return max(int(positions.stop), 0)
        case int():
            return positions + 1
        case Sequence() if tokens_positions.are_indices(positions):
            return max(positions) + 1
    return 0


def _sent(positions: Positions) -> Any:
    """Positions as JSON has them: a slice as "start:stop:step", a mask as a list of bools."""
    if callable(positions):
        raise PositionsError("positions: a callable cannot be sent to the engine; give a mask, a slice or indices")
    tokens_positions.check(positions, steers=True)
    match positions:
        case slice():
            parts = (positions.start, positions.stop, positions.step)
            return ":".join("" if part is None else str(part) for part in parts)
        case Tensor():
            if positions.ndim != 1:
                raise PositionsError(
                    f"positions: a request is one text; expected a mask (S,), got {tuple(positions.shape)}"
                )
            return positions.tolist()
        case str() | int():
            return positions
        case _:
            assert isinstance(positions, Sequence)
            if not tokens_positions.are_indices(positions):
                raise PositionsError(f"positions: a request is one text; expected a list of indices, got {positions!r}")
            return list(positions)


def _received(sent: Any) -> Positions:
    """The positions that `_sent` has made, or that a client has written."""
    if isinstance(sent, str):
        return tokens_positions.from_text(sent)
    if isinstance(sent, list) and sent and all(isinstance(own, bool) for own in sent):
        return torch.tensor(sent)
    tokens_positions.check(sent, steers=True)
    found: Positions = sent
    return found
