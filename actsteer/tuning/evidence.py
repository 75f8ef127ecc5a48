"""Evidence: what was measured of a steering, kept in its vectors' metadata, and whether it still holds."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from actsteer.errors import FileFormatError
from actsteer.files.untrusted import DTYPES
from actsteer.sites import fingerprint
from actsteer.steering.interventions.ablate import Ablate
from actsteer.steering.interventions.add import Add
from actsteer.steering.plan import interventions_of
from actsteer.steering.steering import Steering
from actsteer.tuning.candidates import adds
from actsteer.tuning.told import PROJECTIONS, name_and_revision, projections, told_of, versions
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector

KEY = "evidence"
"""Where metadata has it, as JSON."""
_CLOSE = 1e-3  # of a norm: what rounding, of float16 even, does not reach


class Figure(NamedTuple):
    """A number, and where 95 % of bootstrap draws of it lie; None of a single number."""

    value: float
    low: float | None = None
    high: float | None = None

    def overlaps(self, other: Figure) -> bool:
        """Whether the intervals of two have something in common."""
        slack = 1e-6 * max(abs(self.value), abs(other.value))
        ends = [
            (own.value if own.low is None else own.low, own.value if own.high is None else own.high)
            for own in (self, other)
        ]
        return ends[0][0] - slack <= ends[1][1] and ends[1][0] - slack <= ends[0][1]

    def __str__(self) -> str:
        return f"{self.value:.4g}" if self.low is None else f"{self.value:.4g} ({self.low:.4g} to {self.high:.4g})"


class Held(NamedTuple):
    """One thing that was recorded: what it was, what it is now, and whether that is the same."""

    what: str
    recorded: str
    now: str
    holds: bool


@final
@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What was measured of a steering.

    `calibrate` puts it into the metadata of the vectors of its `best`, so that every format that keeps metadata keeps
    it, sealed with the rest, and `SteeringVector.metadata["evidence"]` is its text.

    Args:
        model: its fingerprint, as vectors have it; its name and revision, where it has them.
        data: name -> digest of the inputs.
        metric: what measured the effect, and `measure`: under which name it gave it.
        steering: "c", "dose" in typical norms, "positions", "intervention", "gate".
        directions: concept -> site -> "dtype", "norm", and "projections" on eight fixed random directions.
        effect, unsteered: of the steered and of the plain model.
        costs: name -> what was lost.
        controls: how many directions that mean nothing were tried; `percentile`: how many of them, in %, did less.
        curve: (c, effect, cost) at these sites, by c; the effect is None where it was not measured.
        versions: of the libraries and of the file's format.
    """

    model: Mapping[str, str]
    data: Mapping[str, str]
    metric: str
    measure: str
    steering: Mapping[str, Any]
    directions: Mapping[str, Mapping[str, Mapping[str, Any]]]
    effect: Figure
    unsteered: Figure
    costs: Mapping[str, Figure]
    controls: int
    percentile: float | None
    curve: Sequence[tuple[float, float | None, float]]
    versions: Mapping[str, str]

    @classmethod
    def of(cls, steering: Steering | VectorBank | SteeringVector) -> Evidence | None:
        """What vectors carry; None if they carry nothing.

        Raises:
            FileFormatError: it is not what `calibrate` writes.
            ValueError: they carry several; `evidences` gives each with its concepts.
        """
        found = evidences(steering)
        if len(found) > 1:
            concepts = [list(own.directions) for own, _ in found]
            raise ValueError(f"the vectors carry evidence of several measurements, of {concepts}; select the concepts")
        return found[0][0] if found else None

    @classmethod
    def read(cls, text: str) -> Evidence:
        """What `text` has written.

        Raises:
            FileFormatError: it is something else.
        """
        try:
            return cls(**_checked(json.loads(text)))
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"evidence: not what calibrate writes ({error!r}); calibrate anew") from None

    @property
    def text(self) -> str:
        """JSON."""
        return json.dumps(dataclasses.asdict(self), allow_nan=True)

    def on(self, steering: Steering) -> Steering:
        """The steering whose vectors carry this."""
        bank = VectorBank(
            {
                concept: SteeringVector({site: v[site] for site in v}, metadata=v.metadata | {KEY: self.text})
                for concept, v in steering.vectors.items()
            }
        )
        return replace(steering, vectors=bank)

    def compared(self, steering: Steering | VectorBank | SteeringVector, model: nn.Module | None) -> Iterator[Held]:
        """What the steering and the model are now, beside what was recorded of them.

        Of vectors the strength is the recorded one. What is added is compared as c · v: a vector that is twice as long,
        at half the strength, is the same steering. A wider dtype is, and so is another name for the only concept.
        """
        given = steering if isinstance(steering, Steering) else Steering(steering)
        c: Any = given.c if isinstance(steering, Steering) else self.steering["c"]
        recorded, now = list(self.directions), list(given.concepts)
        is_one = len(recorded) == len(now) == 1
        named = dict(zip(recorded, now, strict=True)) if is_one else {own: own for own in recorded if own in now}
        are_same = is_one or set(recorded) == set(now)
        yield Held("concepts", ", ".join(sorted(recorded)), ", ".join(sorted(now)), are_same)
        acts = dict(zip(now, interventions_of(given.vectors, given.intervention), strict=True))
        for concept, own in named.items():
            vector, told = given.vectors[own], self.directions[concept]
            yield Held(f"sites of {own}", ", ".join(sorted(told)), ", ".join(sorted(vector)), set(told) == set(vector))
            strength = c.get(own, 0.0) if isinstance(c, Mapping) else c
            if not isinstance(strength, int | float):
                yield Held(f"strength of {own}", f"{self.steering['c']:.4g}", "not one number", False)
                continue
            for site in sorted(set(told) & set(vector)):
                yield from self._direction(f"{own} at {site}", vector[site], told[site], strength, acts[own])
        for name, text in told_of(given).items():
            yield Held(name, str(self.steering[name]), text, self.steering[name] == text)
        if model is not None:
            for name, text in fingerprint.described(model).items():
                if name in self.model and name in ("model", "weights", "layers"):
                    yield Held(name, self.model[name], text, _is_same_model(name, self.model[name], text))

    def _direction(self, what: str, own: Tensor, told: Mapping[str, Any], c: float, act: Any) -> Iterator[Held]:
        dtype: torch.dtype = getattr(torch, told["dtype"])
        is_kept = own.to(dtype).to(own.dtype).equal(own) and torch.finfo(own.dtype).eps <= torch.finfo(dtype).eps
        yield Held(f"dtype of {what}", told["dtype"], str(own.dtype)[6:], is_kept)
        sign, before_c = 1.0, float(self.steering["c"])
        length, before = float(own.double().norm()), float(told["norm"])
        if adds(act):
            sign = math.copysign(1.0, c) * math.copysign(1.0, before_c)
            yield _close(f"‖c·v‖ of {what}", abs(before_c) * before, abs(c) * length)
        else:
            yield _close(f"strength of {what}", before_c, c)
            if not isinstance(act, Ablate) and not (isinstance(act, Add) and act.relative):  # for which v/‖v‖ counts
                yield _close(f"‖v‖ of {what}", before, length)
        given, known = sign * projections(own), torch.tensor(told["projections"], dtype=torch.float64)
        apart, reverse = (float((given - side * known).abs().max()) for side in (1.0, -1.0))
        is_it = apart <= _CLOSE or (isinstance(act, Ablate) and reverse <= _CLOSE)
        said = "as recorded" if is_it else "the reverse" if reverse <= _CLOSE else "another one"
        yield Held(f"direction of {what}", "as recorded", said, is_it)


def evidences(steering: Steering | VectorBank | SteeringVector) -> list[tuple[Evidence, Any]]:
    """Every evidence that vectors carry, and the steering, or the vectors, by the concepts that carry it.

    Raises:
        FileFormatError: it is not what `calibrate` writes.
    """
    if isinstance(steering, SteeringVector):
        text = steering.metadata.get(KEY)
        return [] if text is None else [(Evidence.read(text), steering)]
    bank = steering.vectors if isinstance(steering, Steering) else steering
    carried: dict[str, list[str]] = {}
    for concept, vector in bank.items():
        if KEY in vector.metadata:
            carried.setdefault(vector.metadata[KEY], []).append(concept)
    every = len(carried) == 1
    return [(Evidence.read(text), steering if every else steering.select(*own)) for text, own in carried.items()]


def evidence(
    steering: Steering,
    model: nn.Module,
    *,
    metric: str,
    measure: str,
    data: Mapping[str, str],
    row: Mapping[str, Any],
    unsteered: Figure,
    controls: int,
    percentile: float | None,
    curve: Sequence[tuple[float, float | None, float]],
) -> Evidence:
    """The evidence for a steering of one strength, from the row of a calibration's table."""
    return Evidence(
        model=fingerprint.described(model) | name_and_revision(model),
        data=dict(data),
        metric=metric,
        measure=measure,
        steering={"c": float(row["c"]), "dose": float(row["dose"]), **told_of(steering)},
        directions={
            concept: {
                site: {
                    "dtype": str(vector[site].dtype)[6:],
                    "norm": float(vector[site].double().norm()),
                    "projections": projections(vector[site]).tolist(),
                }
                for site in vector
            }
            for concept, vector in steering.vectors.items()
        },
        effect=Figure(row["effect"], *(row["effect_interval"] or ())),
        unsteered=unsteered,
        costs={name: Figure(value, *(interval or ())) for name, (value, interval) in row["costs"].items()},
        controls=controls,
        percentile=percentile,
        curve=list(curve),
        versions=versions(),
    )


def _checked(found: dict[str, Any]) -> dict[str, Any]:
    """The fields, each of its kind."""
    steering: dict[str, Any] = {name: _number(found["steering"][name]) for name in ("c", "dose")}
    steering |= {name: str(found["steering"][name]) for name in ("positions", "intervention", "gate")}
    directions = {
        str(concept): {str(site): _checked_direction(told) for site, told in sites.items()}
        for concept, sites in found["directions"].items()
    }
    return {
        **{name: {str(k): str(own) for k, own in found[name].items()} for name in ("model", "data", "versions")},
        **{name: str(found[name]) for name in ("metric", "measure")},
        "steering": steering,
        "directions": directions,
        "effect": _figure(found["effect"]),
        "unsteered": _figure(found["unsteered"]),
        "costs": {str(name): _figure(own) for name, own in found["costs"].items()},
        "controls": int(_number(found["controls"])),
        "percentile": None if found["percentile"] is None else _number(found["percentile"]),
        "curve": [(_number(c), None if e is None else _number(e), _number(cost)) for c, e, cost in found["curve"]],
    }


def _checked_direction(told: dict[str, Any]) -> dict[str, Any]:
    if told["dtype"] not in {str(dtype)[6:] for dtype in DTYPES}:
        raise ValueError(f"an unknown dtype {told['dtype']!r}")
    numbers = [_number(own) for own in told["projections"]]
    if len(numbers) != PROJECTIONS:
        raise ValueError(f"expected {PROJECTIONS} projections, got {len(numbers)}")
    return {"dtype": told["dtype"], "norm": _number(told["norm"]), "projections": numbers}


def _number(found: Any) -> float:
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise TypeError(f"expected a number, got {found!r}")
    return float(found)


def _figure(found: Any) -> Figure:
    value, low, high = found
    if (low is None) != (high is None):
        raise ValueError(f"an interval with one end, {found}")
    return Figure(_number(value), None if low is None else _number(low), None if high is None else _number(high))


def _close(what: str, before: float, now: float) -> Held:
    return Held(what, f"{before:.4g}", f"{now:.4g}", abs(now - before) <= _CLOSE * abs(before))


def _is_same_model(name: str, recorded: str, now: str) -> bool:
    """Of weights, by a dtype that both know."""
    if name != "weights":
        return recorded == now
    one, other = (dict(part.split(":", 1) for part in text.split() if ":" in part) for text in (recorded, now))
    shared = [dtype for dtype in one if dtype in other]
    return bool(shared) and one[shared[0]] == other[shared[0]]
