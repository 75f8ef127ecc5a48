"""calibrate: which sites, how strongly, and whether it does more than directions that mean nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import chain
from os import PathLike
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from actsteer.collecting.batches import Batches
from actsteer.collecting.resume import digest_of, weights
from actsteer.errors import AttachedError, SiteNotFoundError, StrengthError, close_names
from actsteer.estimators.estimator import Estimator
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.sites import fingerprint
from actsteer.sites.axes import Axes
from actsteer.sites.resolve import Sites
from actsteer.steering import saving
from actsteer.steering.attached import steerers
from actsteer.steering.gates.gate import ScoredGate
from actsteer.steering.interventions.intervention import Edit, Intervention, PerSite
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import Gates, Steerable, Steering, steering_of
from actsteer.tokens.positions import Positions
from actsteer.tokens.whose import Masks
from actsteer.tuning.budget import Budget
from actsteer.tuning.calibration import Calibration, place_of
from actsteer.tuning.candidates import Candidate, settings
from actsteer.tuning.controls import Labelled, check_rows, random_banks, shuffled_banks
from actsteer.tuning.doses import has_independent_rows
from actsteer.tuning.evidence import KEY, Figure, evidence
from actsteer.tuning.measuring import Measuring
from actsteer.tuning.memory import Memory, number
from actsteer.tuning.metrics import Figures, Metric, OutputMetric
from actsteer.tuning.retained import Retained
from actsteer.tuning.search import Point, search
from actsteer.tuning.told import code_of_metric, digests_of, name_of
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector


def calibrate(
    model: nn.Module,
    vectors: Steerable,
    *,
    evaluate: Metric,
    retain: Batches,
    budget: float | Mapping[str, float] = 0.05,
    confirm: Metric | None = None,
    rows: Labelled | Mapping[str, Labelled] | None = None,
    estimator: Estimator[Any] | None = None,
    controls: int = 99,
    doses: Sequence[float] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
    interventions: Sequence[Intervention | PerSite] | None = None,
    positions: Sequence[Positions] | None = None,
    gate: Gates | None = None,
    sites: Sites | None = None,
    axis: Axes | None = None,
    row_axis: Axes | None = None,
    token_axis: Axes | None = None,
    mask: Masks | None = None,
    refine: int = 3,
    steps: int = 8,
    batch_size: int = 256,
    checkpoint: str | PathLike[str] | None = None,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> Calibration:
    """Find the sites and the strength with the largest effect whose cost stays in the budget, and whether it is real.

    Every site, then groups of neighbours around the best one, then all of them are steered at coarse strengths, and the
    best of these more finely. What is chosen is chosen on one half of the data, drawn by chance, and reported on the
    other. Directions that mean nothing go through the same search; what does not beat each of them, within the budget,
    is given strength 0.

    The strength is searched in units of the activation's typical (median) norm, so that it means the same on every
    model; `best.c` is the raw c of a Steerer. One strength is sought for all concepts of a bank; for one each, call it
    for each.

    Args:
        vectors: as for `Steerer`, without an edit that has its sites; of a Steering all but its strength.
        evaluate: makes numbers of the model that it is given, larger ones for more of what is wanted: one number or,
            better, a number for every example in a tensor (n,), so that it can be halved; or name -> one of these, of
            which the first that is not in the budget is the effect. An `OutputMetric` runs several strengths at once.
            Of a language model measure what it writes: how likely it finds the texts that a vector was made of says
            little of that.
        retain: inputs on which the model is to answer as before, as for `collect`. The cost is KL(unsteered ‖ steered)
            = Σ p log(p/q) in nats, of the logits that the model returns, for every row or, where there are tokens,
            every token. For positions="generated" every token but the first counts as generated. What the model
            returns for all of `retain` is kept in memory.
        budget: the bound on the mean cost; or name -> bound, of "mean", "p95" (the 95th percentile) and of metrics of
            `evaluate`. A strength is within it if the upper end of the interval on the half that chooses is; where the
            other half says otherwise, the verdict does too.
        confirm: the same metric on other data, where `evaluate` gives one number: what is reported is then of these.
        rows: (positive, negative), each site -> (n, d) as `record` gives it, of which the vector was made; or concept
            -> such a pair. As many directions are then fitted on shuffled labels too, and steer at the same c: that a
            fit to noise is small is a part of what it is.
        estimator: what made the vectors of `rows`; `MeanDifference()` unless given.
        controls: how many random directions, drawn like activations at the norms of the vectors, go through the same
            search; 0 for none.
        doses: the coarse strengths, in units of the typical norm where something is added, else in c; negative ones
            too, if they are wanted. 0.05, 0.1, ... 3.2, or 0.25, 0.5, 0.75, 1.
        groups: the groups of sites that are tried, in the place of those above.
        interventions, positions: which of them are tried, each with each; one as the vectors have it, unless given.
        gate, sites, axis, row_axis, token_axis, mask: as for `Steerer`.
        refine: how many of the groups are searched more finely.
        steps: in how many steps each.
        batch_size: how many rows are fed at a time, those of all strengths that go together counted; where fewer than
            two batches fit, every strength has a pass of its own. Strengths go together where a trial with the first
            batch shows that no row's outputs depend on other rows, but for a thousandth.
        checkpoint: a `.safetensors` file that keeps what has been measured; if it is there, the search goes on. A
            metric is known again by its code and by what it holds, not by globals that it reads.
        generator: of the halves and the controls; one with seed 0, unless given.

    Raises:
        AttachedError: the model is steered already.
        TypeError, ValueError: `evaluate` gives no finite numbers, or others in number than for the unsteered model; or
            the budget names what it does not give.
        OutputError: the model returns no logits, and the budget bounds the KL.
        ActsteerError: and what `Steerer` and `collect` raise.

    Source: for the halves, sample splitting (Cox 1975); for the controls, a Monte Carlo test (Barnard 1963).

    >>> from actsteer import OutputMetric, SteeringVector
    >>> _ = torch.manual_seed(0)
    >>> model, x = nn.Sequential(nn.Identity()), torch.randn(200, 8)
    >>> v = SteeringVector({"0": torch.eye(8)[0]})
    >>> up = OutputMetric(inputs=x, score=lambda logits: logits[:, 0].double())  # how large the first number is
    >>> result = calibrate(model, v, evaluate=up, retain=torch.randn(200, 8), budget=0.5, controls=19, progress=False)
    >>> result.found, result.percentile, 0.4 < result.chosen["cost"] < 0.6
    (True, 100.0, True)
    """
    if there := steerers(model):
        raise AttachedError(f"the model is steered already, by {there[0]!r}; leave its block, to measure it unsteered")
    if isinstance(vectors, ScoredGate):
        raise TypeError(f"vectors: got a gate, {vectors!r}; calibrate_gate(model, gate, retain=...) sets its threshold")
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    bounds, doses = Budget(budget), None if doses is None else [float(dose) for dose in doses]
    steering = steering_of(vectors, {"gate": gate, "sites": sites})
    where: dict[str, Any] = {"axis": axis, "row_axis": row_axis, "token_axis": token_axis, "mask": mask}
    placed = Steerer(model, steering, c=0.0, **where).sites  # all is checked before anything runs
    steering = _at(steering, placed)
    _check(vectors, controls=controls, refine=refine, steps=steps, doses=doses, groups=groups, sites=placed)
    bank, fitter = steering.vectors, MeanDifference() if estimator is None else estimator
    labelled = None if rows is None else check_rows(bank, rows, fitter)
    asked: dict[str, Any] = {"doses": doses, "groups": groups, "interventions": interventions, "positions": positions}
    asked |= {"steering": steering.parts(), "refine": refine, "steps": steps, "controls": controls}
    job = {name: " ".join(saving.told(own)) for name, own in asked.items()}
    job |= {"evaluate": code_of_metric(evaluate), "confirm": code_of_metric(confirm), "budget": repr(bounds.bounds)}
    job |= {"generator": digest_of([generator.get_state()]), "rows": digest_of([labelled]), "estimator": repr(fitter)}
    retained = Retained(
        model,
        retain,
        placed,
        controls=controls * len(bank),
        where={name: own for name, own in where.items() if name != "mask"},
        mask=mask,
        batch_size=batch_size,
        generator=generator,
        keep_outputs=bool(bounds.of_kl),
        progress=progress,
    )
    job |= {
        "model": weights(model),
        "architecture": repr(fingerprint.described(model)),
        "vectors": _digest(bank),
        "retain": retained.digest,
    }
    memory = Memory(checkpoint, job)
    measuring = Measuring(
        model,
        retained,
        evaluate=evaluate,
        confirm=confirm,
        budget=bounds,
        where=where,
        batch_size=batch_size,
        together=_may_go_together(model, retained, evaluate),
        generator=generator,
        memory=memory,
    )
    how: dict[str, Any] = {"sites": placed, "groups": groups, "doses": doses, "refine": refine, "steps": steps}
    how |= {"units": bank, "norms": retained.norms}
    steerings = settings(steering, interventions=interventions, positions=positions)
    bar = tqdm(total=1 + controls * (1 if labelled is None else 2), desc="calibrate", disable=not progress, delay=2.0)

    def measure(candidate: Candidate, doses: Sequence[float]) -> list[Point]:
        bar.set_postfix_str(" ".join(candidate.sites), refresh=False)
        return measuring.measure(candidate, doses)

    def control(other: VectorBank) -> Figures:
        own = [replace(one, vectors=other) for one in steerings]
        best = max(search(own, partial(measuring.measure, remember=False), **how), key=lambda point: point.rank)
        return number((measuring.reported(best) if best.feasible else measuring.unsteered())[0])

    with bar:
        points = search(steerings, measure, **how)
        bar.update()
        others = random_banks(bank, retained.drawn, controls)
        if labelled is not None:
            others = chain(others, shuffled_banks(bank, labelled, fitter, count=controls, generator=generator))
        effects: list[float] = []
        for place, other in enumerate(others):
            effects.append(float(memory.once(f"control {place}", partial(control, other))["number"]))
            bar.update()
    memory.write()
    best = max(points, key=lambda point: point.rank)
    table = [measuring.row(point, is_best=point is best) for point in points]
    (plain, plain_interval), chosen = measuring.unsteered(), table[points.index(best)] if best.feasible else None
    is_found = chosen is not None and chosen["effect"] > max([plain, *effects])
    percentile = _percentile(chosen, effects)
    at_best = _at(best.candidate.steering, best.candidate.sites)
    found = replace(_without_evidence(at_best), c=chosen["c"] if chosen is not None and is_found else 0.0)
    if chosen is not None and is_found:
        known = evidence(
            found,
            model,
            metric=name_of(evaluate),
            measure=measuring.effect,
            data={"retain": retained.digest} | digests_of(evaluate),
            row=chosen,
            unsteered=Figure(plain, *(plain_interval or ())),
            controls=len(effects),
            percentile=percentile,
            curve=sorted(
                ((row["c"], row["effect"], row["cost"]) for row in table if place_of(row) == place_of(chosen)),
                key=lambda point: point[0],
            ),
        )
        found = known.on(found)
    return Calibration(
        best=found,
        table=table,
        chosen=chosen,
        unsteered=plain,
        unsteered_interval=plain_interval,
        controls=tuple(effects),
        percentile=percentile,
        budget=bounds.bounds,
        reported_on_choice=not measuring.is_halved,
    )


def _check(
    vectors: Steerable,
    *,
    controls: int,
    refine: int,
    steps: int,
    doses: Sequence[float] | None,
    groups: Sequence[Sequence[str]] | None,
    sites: Sequence[str],
) -> None:
    if isinstance(vectors, Edit) and controls:
        raise TypeError(f"vectors: a {type(vectors).__name__} has no direction to compare with others; give controls=0")
    if controls < 0 or refine < 0 or steps < 2:
        raise ValueError(
            f"expected controls and refine of 0 or more, and steps of 2 or more, got {controls, refine, steps}"
        )
    if doses is not None and (not doses or not all(dose and math.isfinite(dose) for dose in doses)):
        raise StrengthError(f"doses: expected several finite strengths, none of them 0, got {doses!r}")
    for group in groups or ():
        if isinstance(group, str) or not group:
            raise TypeError(f"groups: expected sequences of sites, as [['2'], ['2', '5']], got {group!r}")
        for site in group:
            if site not in sites:
                raise SiteNotFoundError(f"groups: {site!r} is not steered. {close_names(site, sites)}")


def _may_go_together(model: nn.Module, retained: Retained, evaluate: Metric) -> bool:
    """Whether several strengths may go in one pass."""
    if not has_independent_rows(model, retained.batches, batch_size=retained.batch_size):
        return False
    if not isinstance(evaluate, OutputMetric):
        return True
    return has_independent_rows(model, evaluate.inputs, batch_size=evaluate.batch_size)


def _without_evidence(steering: Steering) -> Steering:
    bank = {
        concept: SteeringVector({s: v[s] for s in v}, metadata={k: own for k, own in v.metadata.items() if k != KEY})
        for concept, v in steering.vectors.items()
    }
    return replace(steering, vectors=VectorBank(bank))


def _digest(bank: VectorBank) -> str:
    return digest_of([concept, *((site, vector[site]) for site in vector)] for concept, vector in bank.items())


def _percentile(chosen: dict[str, Any] | None, effects: Sequence[float]) -> float | None:
    if chosen is None or not effects:
        return None
    effect: float = chosen["effect"]
    return 100.0 * sum(own < effect for own in effects) / len(effects)


def _at(steering: Steering, sites: Sequence[str]) -> Steering:
    """The same by the vectors at these sites alone."""
    here = {concept: [site for site in vector if site in sites] for concept, vector in steering.vectors.items()}
    chosen = steering.select(*(concept for concept, own in here.items() if own))
    bank = VectorBank({concept: vector.select(*here[concept]) for concept, vector in chosen.vectors.items()})
    return replace(chosen, vectors=bank, sites=None)
