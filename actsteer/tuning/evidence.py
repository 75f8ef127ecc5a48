"""Evidence: what was measured of a steering, kept in its vectors' metadata, and whether it still holds."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.collecting.resume import code_of, digest_of
from actsteer.errors import FileFormatError
from actsteer.files.sealed import VERSION
from actsteer.sites import fingerprint
from actsteer.sites.wrappers import unwrapped
from actsteer.steering.plan import gates_of, interventions_of
from actsteer.steering.steering import Steering
from actsteer.tuning.metrics import Metric, OutputMetric
from actsteer.tuning.retained import digest
from actsteer.tuning.text_metric import TextMetric
from actsteer.vectors.bank import VectorBank
from actsteer.vectors.vector import SteeringVector

KEY = "evidence"
"""Where metadata has it, as JSON."""
_CLOSE = 1e-3  # of a norm: what rounding, of float16 even, does not reach
_PROJECTIONS = 8


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
        metric: what measured the effect.
        steering: "c", "dose" in typical norms, "positions", "intervention", "gate".
        directions: concept -> site -> "dtype", "norm", and "projections" on eight fixed random directions.
        effect, unsteered: of the steered and of the plain model.
        costs: name -> what was lost.
        controls: how many directions that mean nothing were tried, and at which percentile of them the effect lies.
        curve: (c, effect, cost) at these sites, by c; the effect is None where it was not measured.
        versions: of the libraries and of the file's format.
    """

    model: Mapping[str, str]
    data: Mapping[str, str]
    metric: str
    steering: Mapping[str, Any]
    directions: Mapping[str, Mapping[str, Mapping[str, Any]]]
    effect: Figure
    unsteered: float
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
        """
        vectors = steering.vectors if isinstance(steering, Steering) else steering
        every = [vectors] if isinstance(vectors, SteeringVector) else [vector for _, vector in vectors.items()]
        text = next((own.metadata[KEY] for own in every if KEY in own.metadata), None)
        return None if text is None else cls.read(text)

    @classmethod
    def read(cls, text: str) -> Evidence:
        """What `text` has written.

        Raises:
            FileFormatError: it is something else.
        """
        try:
            found = json.loads(text)
            named = {field.name: found[field.name] for field in dataclasses.fields(cls)}
            named["effect"] = _figure(named["effect"])
            named["costs"] = {str(name): _figure(own) for name, own in named["costs"].items()}
            named["curve"] = [(float(c), None if e is None else float(e), float(cost)) for c, e, cost in named["curve"]]
            for name in ("model", "data", "steering", "directions", "versions"):
                named[name] = dict(named[name])
            for sites in named["directions"].values():
                for told in dict(sites).values():
                    float(told["norm"]), str(told["dtype"]), torch.tensor(told["projections"], dtype=torch.float64)
            float(named["steering"]["c"]), float(named["unsteered"]), int(named["controls"])
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise FileFormatError(f"evidence: not what calibrate writes ({error!r}); calibrate anew") from None
        return cls(**named)

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
        """What the file and the model are now, beside what was recorded of them.

        Of vectors alone the strength is the recorded one. A vector that is twice as long, at half the strength, is the
        same steering, and so is one in a wider dtype.
        """
        steering = steering if isinstance(steering, Steering) else Steering(steering)
        c = self.steering["c"] if steering.is_plain else steering.c
        recorded = {concept: list(sites) for concept, sites in self.directions.items()}
        now = {concept: list(vector) for concept, vector in steering.vectors.items()}
        yield Held("concepts", ", ".join(sorted(recorded)), ", ".join(sorted(now)), recorded.keys() == now.keys())
        for concept in [concept for concept in recorded if concept in now]:
            sites = sorted(recorded[concept]), sorted(now[concept])
            yield Held(f"sites of {concept}", ", ".join(sites[0]), ", ".join(sites[1]), sites[0] == sites[1])
            strength = c.get(concept, 0.0) if isinstance(c, Mapping) else c
            for site in [site for site in sites[0] if site in sites[1]]:
                own = steering.vectors[concept][site]
                yield from self._direction(f"{concept} at {site}", own, self.directions[concept][site], strength)
        for name, told in _told(steering).items():
            yield Held(name, str(self.steering[name]), told, self.steering[name] == told)
        if model is not None:
            for name, told in fingerprint.described(model).items():
                if name in self.model and name in ("model", "weights"):
                    yield Held(name, self.model[name], told, _is_same_model(name, self.model[name], told))

    def _direction(self, what: str, own: Tensor, told: Mapping[str, Any], c: Any) -> Iterator[Held]:
        lossless = own.to(getattr(torch, told["dtype"])).to(own.dtype).equal(own)
        is_kept = lossless and torch.finfo(own.dtype).eps <= torch.finfo(getattr(torch, told["dtype"])).eps
        yield Held(f"dtype of {what}", told["dtype"], str(own.dtype)[6:], is_kept)
        if not isinstance(c, int | float):
            yield Held(f"strength of {what}", f"{self.steering['c']:.4g}", "not one number", False)
            return
        norm, before = abs(c) * float(own.double().norm()), abs(self.steering["c"]) * told["norm"]
        yield Held(f"‖c·v‖ of {what}", f"{before:.4g}", f"{norm:.4g}", abs(norm - before) <= _CLOSE * before)
        sign = math.copysign(1.0, c) * math.copysign(1.0, self.steering["c"])
        given, known = sign * projections(own), torch.tensor(told["projections"], dtype=torch.float64)
        apart = float((given - known).abs().max()) if given.shape == known.shape else math.inf
        reverse = float((given + known).abs().max()) if given.shape == known.shape else math.inf
        said = "as recorded" if apart <= _CLOSE else "the reverse" if reverse <= _CLOSE else "another one"
        yield Held(f"direction of {what}", "as recorded", said, apart <= _CLOSE)


def evidence(
    steering: Steering,
    model: nn.Module,
    *,
    metric: str,
    data: Mapping[str, str],
    row: Mapping[str, Any],
    unsteered: float,
    controls: int,
    percentile: float | None,
    curve: Sequence[tuple[float, float | None, float]],
) -> Evidence:
    """The evidence for a steering of one strength, from the row of a calibration's table."""
    return Evidence(
        model=fingerprint.described(model) | _named(model),
        data=dict(data),
        metric=metric,
        steering={"c": steering.c, "dose": row["dose"], **_told(steering)},
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
        versions=_versions(),
    )


def projections(direction: Float[Tensor, " d"]) -> Float[Tensor, " 8"]:
    """The unit direction on eight random ones of norm sqrt(d), the same for ever: what tells it from any other."""
    own = direction.double().cpu()
    generator = torch.Generator().manual_seed(len(own))
    fixed = torch.randint(0, 2, (_PROJECTIONS, len(own)), generator=generator).double() * 2 - 1
    unit: Tensor = own / own.norm().clamp(min=torch.finfo(torch.float64).tiny)
    return fixed @ unit


def name_of(metric: Metric) -> str:
    """module:function of what makes the numbers."""
    own: Any = metric.score if isinstance(metric, OutputMetric | TextMetric) else metric
    return f"{getattr(own, '__module__', '')}:{getattr(own, '__qualname__', type(own).__qualname__)}"


def digests_of(metric: Metric) -> dict[str, str]:
    """Of the data of the effect, where the metric says which they are."""
    if isinstance(metric, TextMetric):
        return {"effect": digest_of(metric.prompts)}
    return {"effect": digest(metric.inputs, metric.inputs)} if isinstance(metric, OutputMetric) else {}


def code_of_metric(metric: Metric | None) -> str:
    """A digest of what a metric does, by its code and what it holds."""
    if metric is None:
        return ""
    own: Any = metric.score if isinstance(metric, OutputMetric | TextMetric) else metric
    held = dict(getattr(metric, "__dict__", {}))
    return f"{name_of(metric)} {code_of(own)} {digest_of([held])} {digests_of(metric)}"


def _figure(found: Any) -> Figure:
    value, low, high = found
    return Figure(float(value), None if low is None else float(low), None if high is None else float(high))


def _told(steering: Steering) -> dict[str, str]:
    """How and where it steers, in words that are alike where it does the same."""
    positions, gates = steering.positions, gates_of(steering.vectors, steering.gate)
    named = positions if isinstance(positions, Mapping) else dict.fromkeys(steering.concepts, positions)
    every = {concept: "all" if named.get(concept) is None else named[concept] for concept in steering.concepts}
    acts = dict(zip(steering.concepts, interventions_of(steering.vectors, steering.intervention), strict=True))
    return {
        "positions": _alike({concept: own if isinstance(own, str) else repr(own) for concept, own in every.items()}),
        "intervention": _alike({concept: repr(own) for concept, own in acts.items()}),
        "gate": _alike({concept: repr(gates.get(concept)) for concept in steering.concepts}),
    }


def _alike(told: Mapping[str, str]) -> str:
    return (
        next(iter(told.values()))
        if len({*told.values()}) == 1
        else ", ".join(f"{c}: {own}" for c, own in sorted(told.items()))
    )


def _is_same_model(name: str, recorded: str, now: str) -> bool:
    """Of weights, by a dtype that both know."""
    if name != "weights":
        return recorded == now
    one, other = (dict(part.split(":", 1) for part in text.split() if ":" in part) for text in (recorded, now))
    shared = [dtype for dtype in one if dtype in other]
    return bool(shared) and one[shared[0]] == other[shared[0]]


def _named(model: nn.Module) -> dict[str, str]:
    """The name and the revision of a Hugging Face model."""
    config = vars(unwrapped(model)).get("config")
    name = str(getattr(config, "name_or_path", None) or "")
    name = Path(name).name if Path(name).is_dir() else name  # where it lies here is nobody else's matter
    found = {"name": name, "revision": str(getattr(config, "_commit_hash", None) or "")}
    return {key: own for key, own in found.items() if own}


def _versions() -> dict[str, str]:
    found = {"format": str(VERSION), "python": platform.python_version()}
    for package in ("actsteer", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # transformers is not needed
            continue
    return found
