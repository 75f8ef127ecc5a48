"""live: a model that several people try at once, each in a thread that is steered alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from actsteer.collecting.record import record
from actsteer.collecting.texts import GREEDY, input_device, pad_of, text_batches
from actsteer.errors import BatchError, OutputError, ShapeError, StrengthError, UnsupportedModelError
from actsteer.looking.turns import Turns
from actsteer.sites.wrappers import class_name
from actsteer.steering.interventions.add import Add
from actsteer.steering.norms import norms, typical
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import AllPositions, Steerable
from actsteer.steering.strength import Strengths

PROMPT = "List three animals:"
_REACH = 4.0  # of a slider, where it is not known how large the activations are


class Slider(NamedTuple):
    """What a concept's strength is chosen with."""

    concept: str
    c: float
    """The strength to begin with."""
    reach: float
    """How far it goes, to either side of 0."""
    shares: Mapping[str, float]
    """Site -> ‖v‖ as a share of the typical ‖h‖ of a prompt, where that is known."""


@final
class Live:
    """A model and a steering of it; whoever asks does so in a thread, and is steered in that thread alone.

    One thread at a time runs the model, and hands it on after every token. `steerer` is a person's steering: it is
    attached with `with`, and its `c` may be set while it is, from any thread.

    Args:
        model: a language model of transformers or, with `image`, any classifier of images; in evaluation mode.
        steering: what the Steerer takes.
        tokenizer: the model's, for text.
        c: the strengths to begin with, where not those of the steering; one number per concept.
        image: (height, width) in pixels of a model that takes (rows, height · width); (1, height, width) of one that
            takes (rows, 1, height, width).
        mean, std: what is taken off the pixels, which are from 0, black, to 1, white, and what they are divided by.
        chat: apply the tokenizer's chat template.

    Raises:
        SiteNotFoundError, ShapeError, StrengthError: the steering does not fit the model.
        UnsupportedModelError: the model neither generates text nor takes such images; or it is in training mode.

    >>> from actsteer import SteeringVector
    >>> model = nn.Sequential(nn.Linear(4, 2)).eval()
    >>> live = Live(model, SteeringVector({"0": torch.tensor([0.0, 9.0])}, concept="right"), image=(2, 2))
    >>> with live.steerer(c={"right": 1.0}) as steerer:
    ...     before = live.classes([0.0, 0.0, 0.0, 0.0])[1]
    ...     steerer.c = 0.0
    ...     before > 0.99 > live.classes([0.0, 0.0, 0.0, 0.0])[1]
    True
    """

    def __init__(
        self,
        model: nn.Module,
        steering: Steerable,
        *,
        tokenizer: Any = None,
        c: Strengths | None = None,
        image: Sequence[int] | None = None,
        mean: float = 0.0,
        std: float = 1.0,
        chat: bool = False,
    ) -> None:
        self.model, self._steering, self._tokenizer, self._chat = model, steering, tokenizer, chat
        self._turns, self._scale = Turns(), (mean, std)
        self._first = self.steerer(c=c)  # whether it fits
        self.concepts = self._first.bank.concepts
        self.sites = self._first.sites
        self.c = _numbers(self._first.c, self.concepts)
        self._shape = None if image is None else _shape(image)
        self.size = None if image is None else (image[-2], image[-1])
        if model.training:
            raise UnsupportedModelError(f"{class_name(model)} is in training mode; call model.eval() first")
        if self.size is not None:
            self._check_image()
        elif not (hasattr(model, "generate") and hasattr(model, "config")):
            raise UnsupportedModelError(
                f"{class_name(model)} generates no text; give a language model or, for a classifier, the size of its "
                "images, as in 28x28"
            )
        elif tokenizer is None:
            raise UnsupportedModelError(f"{class_name(model)} generates text, and there is no tokenizer; give its own")

    def steerer(
        self, *, c: Strengths | None = None, sites: Sequence[str] | None = None, positions: AllPositions | None = None
    ) -> Steerer:
        """A steering of the thread that will attach it; what is not given is as in the steering."""
        return Steerer(self.model, self._steering, c=c, sites=sites, positions=positions, scope="context")

    def change(self, steerer: Steerer, c: Strengths) -> None:
        """Other strengths, between two tokens, of a steering that is attached.

        Raises:
            ConceptNotFoundError, StrengthError: as `Steerer`.
        """
        with self._turns:
            steerer.c = c

    def answer(self, prompt: str, *, length: int, say: Callable[[str], bool]) -> str:
        """The continuation of a prompt by the likeliest tokens.

        Args:
            length: how many tokens at most.
            say: what is called with the text so far after every token, while others have their turn; whether to go on.
                What it raises ends the generation too.

        Raises:
            BatchError: a prompt without tokens, or a length below 1.
        """
        from transformers import StoppingCriteria, StoppingCriteriaList

        if length < 1:
            raise BatchError(f"length: expected a number of tokens, 1 or more, got {length}")
        model: Any = self.model
        start, turns, tokenizer = 1, self._turns, self._tokenizer

        class Told(StoppingCriteria):
            """What tells of every token."""

            def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
                text = tokenizer.decode(input_ids[0, start:], skip_special_tokens=True)
                with turns.left():
                    goes_on = say(text)
                return torch.full((len(input_ids),), not goes_on, dtype=torch.bool, device=input_ids.device)

        with turns:
            batch = self._batch(prompt)
            if not model.config.is_encoder_decoder:
                start = batch["input_ids"].shape[1]
            how = {"max_new_tokens": length, "pad_token_id": pad_of(tokenizer)}
            ids = model.generate(**batch, **GREEDY, **how, stopping_criteria=StoppingCriteriaList([Told()]))
            text: str = tokenizer.decode(ids[0, start:], skip_special_tokens=True)
            return text

    @torch.no_grad()
    def classes(self, image: Sequence[float]) -> list[float]:
        """The softmax of what the model returns for an image, its pixels row by row.

        Raises:
            ShapeError: another number of pixels.
        """
        assert self.size is not None and self._shape is not None
        if len(image) != math.prod(self.size):
            raise ShapeError(f"image: expected {self.size[0]} x {self.size[1]} pixels, got {len(image)}")
        mean, std = self._scale
        weights = next((own for own in self.model.parameters() if own.is_floating_point()), torch.zeros(()))
        pixels = (torch.tensor(image, dtype=torch.float32) - mean) / std
        with self._turns:
            output = self.model(pixels.reshape(self._shape).to(weights.dtype).to(input_device(self.model)))
        logits = getattr(output, "logits", output)
        if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
            got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise OutputError(f"expected a row with a number for each class, got {got}")
        found: list[float] = logits[0].double().softmax(dim=0).tolist()
        return found

    def sliders(self) -> list[Slider]:
        """One for each concept, in order."""
        shares = self._shares() if self.size is None else {}
        return [Slider(name, c, _reach(c, shares.get(name, {})), shares.get(name, {})) for name, c in self.c.items()]

    def _batch(self, prompt: str) -> dict[str, Tensor]:
        (batch,) = text_batches(self._tokenizer, [prompt], chat=self._chat, device=input_device(self.model))
        return batch

    def _shares(self) -> dict[str, dict[str, float]]:
        """Concept -> site -> ‖v‖ / ‖h‖, of those that are added."""
        model: Any = self.model
        if model.config.is_encoder_decoder:
            return {}
        with self._turns:
            acts = record(model, self._batch(PROMPT), sites=self.sites, axis=self._first.axes, progress=False)
        found: dict[str, dict[str, float]] = {}
        for site, edit in self._first.edits.items():
            for own, place in enumerate(edit.concepts):
                how, size = edit.interventions[own], typical([norms(acts[site])[:, 0]])
                if isinstance(how, Add) and not how.relative and size:
                    share = float(edit.directions[own].norm()) / size
                    found.setdefault(self.concepts[place], {})[site] = share
        return found

    def _check_image(self) -> None:
        assert self.size is not None
        try:
            self.classes([0.0] * math.prod(self.size))
        except (RuntimeError, ValueError, TypeError) as error:
            raise UnsupportedModelError(
                f"{class_name(self.model)} does not take an image as {self._shape}: {error}; give its height and "
                "width, as in 28x28, or with a channel before them, as in 1x28x28"
            ) from error


def _numbers(c: Strengths, concepts: Sequence[str]) -> dict[str, float]:
    """Concept -> strength.

    Raises:
        StrengthError: one that is not one number.
    """
    given: Mapping[str, Any] = c if isinstance(c, Mapping) else dict.fromkeys(concepts, c)
    found = {concept: given.get(concept, 0.0) for concept in concepts}
    for concept, own in found.items():
        if not isinstance(own, Real):
            raise StrengthError(f"c[{concept!r}]: a slider has one number, got {type(own).__name__}; give c, a number")
    return {concept: float(own) for concept, own in found.items()}


def _shape(image: Sequence[int]) -> tuple[int, ...]:
    """In which shape the model takes an image."""
    if len(image) not in (2, 3) or min(image) < 1 or (len(image) == 3 and image[0] != 1):
        raise ShapeError(f"image: expected (height, width), or (1, height, width), got {tuple(image)}")
    return (1, math.prod(image)) if len(image) == 2 else (1, *image)


def _reach(c: float, shares: Mapping[str, float]) -> float:
    """How far a slider goes: to where c · v is as large as the activation, a round number, and twice as far as c."""
    least = max(2 * abs(c), 1 / max(shares.values()) if any(shares.values()) else _REACH)
    unit = 10.0 ** math.floor(math.log10(least))
    return next(unit * step for step in (1.0, 2.0, 5.0, 10.0) if unit * step >= least * (1 - 1e-9))
