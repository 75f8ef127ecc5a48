"""A study: one trained model, the digits that it never saw, and the ways to steer it that the experiments share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from actsteer import (
    And,
    LogisticDirection,
    LowRank,
    ProbeAbove,
    ProjectionAbove,
    Statistics,
    Steerer,
    SteeringVector,
    VectorBank,
    WhitenedMeanDifference,
    collect,
    optimize,
    record,
    sweep,
)
from reference.mnist.data import Mnist, Split
from reference.mnist.model import SITES
from reference.mnist.scores import Judge, Scores, balance, predict

Curve = list[dict[str, Any]]


@dataclass(frozen=True)
class Budget:
    """How long things train: the model, constant vectors at all sites, one at the last site, and a cascade's stages."""

    epochs: int = 10
    steps: int = 4000
    last_site_steps: int = 600
    stage_steps: int = 600
    stages: int = 5


STRENGTHS = sorted({sign * 0.25 * 1.15**power for sign in (-1, 0, 1) for power in range(51)})
"""From 0.25 to 271 in steps of 15 %, either sign, and zero: estimators differ in how large their directions are."""

BUDGETS = {"full": Budget(), "bundled": Budget(steps=800, stage_steps=200, stages=4)}


@dataclass(frozen=True)
class Edit:
    """One Steerer to be: what is added, how strongly, and for which rows."""

    vectors: SteeringVector | VectorBank | LowRank
    c: Any = 1.0
    gate: Any = None


@contextmanager
def steered(model: nn.Module, edits: Iterable[Edit]) -> Iterator[None]:
    """The model with these edits, in this order."""
    with ExitStack() as stack:
        for edit in edits:
            stack.enter_context(Steerer(model, edit.vectors, c=edit.c, gate=edit.gate))
        yield


@dataclass
class Study:
    """A model, the data, and the judges: `held_out` for every choice, `test` once for each finished method."""

    model: nn.Module
    data: Mnist
    new: tuple[int, ...]
    seed: int
    budget: Budget
    held_out: Judge = field(init=False)
    test: Judge = field(init=False)

    def __post_init__(self) -> None:
        self.held_out = Judge(self.model, self.data.held_out, new=self.new)
        self.test = Judge(self.model, self.data.test, new=self.new)

    @property
    def old(self) -> tuple[int, ...]:
        """The digits that the model was trained on."""
        return tuple(digit for digit in range(10) if digit not in self.new)

    def report(self, *edits: Edit) -> Scores:
        """The test scores under these edits."""
        with steered(self.model, edits):
            return self.test(self.model)

    def judged(self, *edits: Edit) -> Scores:
        """The held-out scores under these edits."""
        with steered(self.model, edits):
            return self.held_out(self.model)

    # --- ways to steer -------------------------------------------------------------------------------------------
    def strongest(self, vectors: SteeringVector | VectorBank, strengths: Sequence[Any]) -> tuple[Edit, Curve]:
        """A fixed direction at the strength that balances best on the held-out rows, and the curve over strengths."""
        curve = sweep(self.model, vectors, c=strengths, evaluate=self.held_out, progress=False)
        return Edit(vectors, max(curve, key=lambda row: (balance(row), row["overall"]))["c"]), curve

    def trained(
        self,
        data: Split,
        *,
        sites: Sequence[str] = SITES,
        steps: int | None = None,
        gate: ProjectionAbove | None = None,
        on: Sequence[Edit] = (),
        concept: str | None = None,
    ) -> SteeringVector:
        """Directions trained by gradient on these rows, the weights frozen, on top of the edits `on`."""
        with steered(self.model, on):
            return optimize(
                self.model,
                data.x,
                targets=data.y,
                sites=list(sites),
                loss=F.cross_entropy,
                steps=steps or self.budget.steps,
                gate=gate,
                concept=concept,
                generator=torch.Generator().manual_seed(self.seed),
                progress=False,
            )

    def low_rank(self, data: Split, *, rank: int, concept: str | None = None) -> LowRank:
        """An edit h + Rᵀ(W h + b - R h) at all four sites, trained by gradient on these rows, the weights frozen."""
        return optimize(
            self.model,
            data.x,
            targets=data.y,
            sites=list(SITES),
            loss=F.cross_entropy,
            train=LowRank(rank=rank),
            steps=self.budget.steps,
            lr=0.01,
            concept=concept,
            generator=torch.Generator().manual_seed(self.seed),
            progress=False,
        )

    def dependence(self, edit: LowRank) -> float:
        """How far an edit is from plain steering: the share of what it adds that differs from row to row.

        The mean over sites of Σ ‖Δ(h) - mean Δ‖² / Σ ‖Δ(h)‖² over the held-out rows as the unsteered model has them.
        A vector adds the same to every row: 0.
        """
        rows = record(self.model, self.data.held_out.x, sites=SITES, batch_size=2048, progress=False)
        shares: list[float] = []
        for site in SITES:
            reads, adds, offsets = edit[site]
            added = (rows[site] @ reads.T + offsets) @ adds
            shares.append(float((added - added.mean(dim=0)).square().sum() / added.square().sum()))
        return sum(shares) / len(shares)

    def discriminant(
        self, positive: Tensor, negative: Tensor, site: str, *, on: Sequence[Edit] = ()
    ) -> ProjectionAbove:
        """A gate between two sets of images: the LDA direction at one site, and the threshold between the classes."""
        with steered(self.model, on):
            toward, away = (self._statistics(x, site) for x in (positive, negative))
        direction = WhitenedMeanDifference(shrinkage=1e-3)(positive=toward, negative=away)
        return ProjectionAbove.between(direction, positive=toward, negative=away)

    def probed(self, digit: int, site: str, *, C: float) -> And:  # noqa: N803
        """A gate for one digit: a logistic probe against each other digit at one site, all of which must fire."""
        rows = record(self.model, self.data.train.x, sites=site, batch_size=2048, progress=False)[site]
        of = {other: [{site: rows[self.data.train.y == other]}] for other in range(10)}
        probe = LogisticDirection(C=C, tolerance=1e-6)
        return And(
            *(ProbeAbove(probe(positive=of[digit], negative=of[other])) for other in range(10) if other != digit)
        )

    def best_threshold(self, edit: Edit, *, width: float = 1.0) -> Edit:
        """The same gated edit with the threshold, within `width` of where it is, that scores best overall held-out."""
        gate: ProjectionAbove = edit.gate
        direction = SteeringVector({gate.site: gate.direction})
        thresholds = [gate.threshold + width * step / 10 for step in range(-10, 11)]
        edits = [Edit(edit.vectors, edit.c, ProjectionAbove(direction, threshold)) for threshold in thresholds]
        return max(edits, key=lambda candidate: self.judged(candidate)["overall"])

    def cascade(self, data: Split, *, on: Sequence[Edit], stages: int, sites: Sequence[str] = ("5", "8")) -> list[Edit]:
        """Gated edits on top of `on`, each between a new digit and the one that it is most often confused with.

        Each stage fits its gate on the activations as steered so far, trains vectors at the gate's site and the later
        ones on the rows where it fires, and stays only if the held-out accuracy does not fall.
        """
        edits = list(on)
        best = self.judged(*edits)["overall"]
        tried: set[tuple[int, int]] = set()
        for _ in range(stages):
            pair = self._most_confused(data, edits, tried)
            tried.add(pair)
            for site in sites:
                gate = self.discriminant(data.of(pair[0]).x, data.of(pair[1]).x, site, on=edits)
                edit = self._stage(data, gate, edits)
                score = self.judged(*edits, edit)["overall"]
                if score >= best:
                    best, edits = score, [*edits, edit]
                    break
        return edits

    def _stage(self, data: Split, gate: ProjectionAbove, on: Sequence[Edit]) -> Edit:
        with steered(self.model, on):
            fires = gate(record(self.model, data.x, sites=gate.site, batch_size=2048, progress=False)[gate.site])
        later = SITES[SITES.index(gate.site) :]
        rows = Split(data.x[fires], data.y[fires])
        return Edit(self.trained(rows, sites=later, steps=self.budget.stage_steps, gate=gate, on=on), gate=gate)

    def _most_confused(self, data: Split, edits: Sequence[Edit], tried: set[tuple[int, int]]) -> tuple[int, int]:
        with steered(self.model, edits):
            found = predict(self.model, data.x)
        pairs = [(new, other) for new in self.new for other in range(10) if other != new and (new, other) not in tried]
        return max(pairs, key=lambda pair: _errors(found, data.y, *pair))

    def _statistics(self, x: Tensor, site: str) -> Statistics:
        return collect(self.model, x, sites=site, covariance=True, batch_size=2048, progress=False)


def _errors(found: Tensor, truth: Tensor, a: int, b: int) -> int:
    return int((((found == a) & (truth == b)) | ((found == b) & (truth == a))).sum())
