"""Served: a steering as an engine computes it, for every token another strength: h + s (A h + b) U, site by site."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.errors import StrengthError, UnsupportedModelError
from actsteer.files.sealed import digest as digest_of
from actsteer.integrations.vllm.requests import Request, asked
from actsteer.sites.place import split_features
from actsteer.sites.resolve import select
from actsteer.steering.gates.cosine_above import CosineAbove
from actsteer.steering.gates.gate import AnyGate, Combination, Fitted, Gate, leaves
from actsteer.steering.gates.probe_above import ProbeAbove
from actsteer.steering.gates.projection_above import ProjectionAbove
from actsteer.steering.gates.soft import Soft
from actsteer.steering.interventions.ablate import Ablate
from actsteer.steering.interventions.add import Add
from actsteer.steering.interventions.affine import AffineAt
from actsteer.steering.interventions.chain import Chain
from actsteer.steering.interventions.clamp import Clamp
from actsteer.steering.interventions.intervention import Intervention, PerSite, at_site
from actsteer.steering.interventions.low_rank import LowRankAt
from actsteer.steering.norms import nonzero_unit
from actsteer.steering.plan import gates_of, interventions_of
from actsteer.steering.steering import Steering
from actsteer.vectors.bank import VectorBank, axes_of_bank, metadata_in, stack_of


@final
@dataclass(frozen=True)
class Stage:
    """One step of a site's edit: h + Σ s_k v_k or, of one concept, h + s_k Uᵀ(A h + b).

    Args:
        adds: U: (K, d), a row for each concept of the bank, zero for those that have no part; or (r, d) of one.
        places: of the concepts that have a part, in the bank.
        reads, offsets: A (r, d) and b (r,), of one concept.
    """

    adds: Float[Tensor, "r d"]
    places: tuple[int, ...]
    reads: Float[Tensor, "r d"] | None = None
    offsets: Float[Tensor, " r"] | None = None

    def tensors(self) -> dict[str, Tensor]:
        """By name."""
        known = {"adds": self.adds, "reads": self.reads, "offsets": self.offsets}
        return {name: own for name, own in known.items() if own is not None}


@final
@dataclass(frozen=True)
class Score:
    """What a gate reads of a token, h·w + b or h·w / ‖h‖; it fires above t, or weighs by σ((score - t) / width).

    Args:
        site, per: as of the gate.
        weight: w, (d,).
        offset, threshold, width: numbers; a width of 0 is a step.
        is_cosine: whether the score is divided by ‖h‖.
    """

    site: str
    per: str
    weight: Float[Tensor, " d"]
    offset: float
    threshold: float
    width: float
    is_cosine: bool

    def numbers(self) -> Tensor:
        """The offset, the threshold and the width, (3,)."""
        return torch.tensor([self.offset, self.threshold, self.width], dtype=torch.float32)

    def weights(
        self, rows: Float[Tensor, "n d"], weight: Float[Tensor, " d"], numbers: Float[Tensor, " 3"]
    ) -> Float[Tensor, " n"]:
        """The decision on rows in float32, with the tensors as they lie on the device."""
        offset, threshold, width = numbers.unbind()
        score = rows @ weight + offset
        if self.is_cosine:
            norm = torch.linalg.vector_norm(rows, dim=-1)
            score = score / torch.where(norm > 0, norm, 1)
        return torch.sigmoid((score - threshold) / width) if self.width else (score > threshold).to(rows.dtype)


Tree: TypeAlias = int | tuple[Combination, tuple["Tree", ...]]
"""The place of a gate's score among all, or how those of several are combined."""


@final
@dataclass(frozen=True)
class Served:
    """A steering whose edits are all of the form h + s (A h + b) U, and whose gates read dot products.

    Args:
        concepts: those of the bank, in its order.
        stages: site -> the steps of its edit, one after another.
        gates: place of a concept -> its gate.
        scores: what the gates read, each once.
        usual: what is done where a request does not say.
        made_for: (what, metadata), of vectors and gates.
    """

    concepts: tuple[str, ...]
    stages: Mapping[str, tuple[Stage, ...]]
    gates: Mapping[int, Tree]
    scores: tuple[Score, ...]
    usual: Request
    made_for: tuple[tuple[str, Mapping[str, str]], ...]

    @cached_property
    def digest(self) -> str:
        """Tells what it does from what others do."""
        tensors = {
            f"{site} {number} {name}": own
            for site, stages in self.stages.items()
            for number, stage in enumerate(stages)
            for name, own in stage.tensors().items()
        }
        for number, score in enumerate(self.scores):
            tensors |= {f"score {number}": score.weight, f"numbers {number}": score.numbers()}
        return digest_of(tensors, repr((self.concepts, self.shape, self.usual.sent())))

    @property
    def shape(self) -> str:
        """Of all that the hooks are made for; what has the same shape can take its place in a running engine.

        Where nothing is gated, concepts may add at other sites than those of before.
        """
        stages = {
            site: [
                (
                    [place for place in stage.places if place in self.gates or stage.reads is not None],
                    {name: tuple(own.shape) for name, own in stage.tensors().items()},
                )
                for stage in own
            ]
            for site, own in self.stages.items()
        }
        scores = [(own.site, own.per, tuple(own.weight.shape), bool(own.width), own.is_cosine) for own in self.scores]
        return repr((len(self.concepts), stages, scores, sorted((place, _shown(t)) for place, t in self.gates.items())))

    @property
    def key(self) -> str:
        """The shape, in few letters."""
        return hashlib.sha256(self.shape.encode()).hexdigest()

    @property
    def decides_once(self) -> bool:
        """Whether a gate decides for a whole sequence, from its prompt."""
        return any(score.per != "token" for score in self.scores)

    def reads(self, site: str) -> bool:
        """Whether an edit there, or a gate, depends on the activation."""
        stages = self.stages.get(site, ())
        return any(own.reads is not None for own in stages) or any(score.site == site for score in self.scores)

    @cached_property
    def sizes(self) -> Float[Tensor, "K 2"]:
        """At strength 1: the largest number that a concept adds, summed over sites; the largest factor of a ‖h‖."""
        sizes = torch.zeros(len(self.concepts), 2, dtype=torch.float64)
        for stage in (own for stages in self.stages.values() for own in stages):
            adds = stage.adds.double().abs()
            if stage.reads is None or stage.offsets is None:
                sizes[:, 0] += adds.amax(dim=1)
                continue
            (place,) = stage.places
            sizes[place, 0] += (stage.offsets.double().abs() @ adds).amax()
            sizes[place, 1] = max(sizes[place, 1], (stage.reads.double().norm(dim=1) @ adds).amax())
        return sizes

    def check_sizes(self, request: Request, dtype: torch.dtype) -> None:
        """That no number overflows by what is added: what that leaves behind, other requests would read.

        Raises:
            StrengthError: what is added, summed over the sites, exceeds a 16th of what the dtype holds, or of the root
                of what float32 does (norms square); or what an activation is multiplied by exceeds the root of that.
        """
        most = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max ** 0.5) / 16
        given = torch.tensor(
            [max(map(abs, request.c.get(name, (0.0,)))) for name in self.concepts], dtype=torch.float64
        )
        added, factor = (given @ self.sizes).tolist()
        for found, limit, what in (
            (added, most, "adds numbers of up to {:.3g}, summed over the sites"),
            (factor, most**0.5, "multiplies activations by up to {:.3g}"),
        ):
            if found > limit:
                raise StrengthError(
                    f"c: what is asked for {what.format(found)}; in {dtype} at most {limit:.3g} is served, for numbers "
                    "that overflow would reach other requests; take a smaller strength"
                )

    def asked(self, extra_args: Mapping[str, Any] | None) -> Request | None:
        """What a request asks for; None if it is not to be steered. See `asked`."""
        return asked(extra_args, concepts=self.concepts, usual=self.usual)


def served(steering: Steering) -> Served:
    """The steering, as an engine computes it.

    Raises:
        UnsupportedModelError: an edit of another form, or a gate that reads otherwise.
        StrengthError: a strength for each row, of which a request has but one.
    """
    bank = steering.vectors
    sites = bank.sites
    if steering.sites is not None:
        sites = select(dict.fromkeys(sites, nn.Identity()), steering.sites, owner="the bank", model=nn.Identity())
    interventions, gates = interventions_of(bank, steering.intervention), gates_of(bank, steering.gate)
    scores = {id(leaf): leaf for gate in gates.values() for leaf in leaves(gate)}
    places = {key: place for place, key in enumerate(scores)}
    made_for = [(f"the vector {name!r}", metadata) for name, metadata in metadata_in(bank).items()]
    made_for += [(f"the gate {leaf!r}", leaf.metadata) for leaf in scores.values() if isinstance(leaf, Fitted)]
    for site in (*sites, *(leaf.site for leaf in scores.values())):
        if split_features(site)[1]:
            raise UnsupportedModelError(
                f"site {site!r}: whole activations are served, and no part of their features; give the whole site a "
                "vector with zeros elsewhere"
            )
    for site in sites:
        if (axis := axes_of_bank(bank, [site]).get(f"axis {site}", "-1")) not in ("-1", "2"):
            raise UnsupportedModelError(
                f"site {site!r}: its features lie on axis {axis}, and in vLLM every token's features lie in a row"
            )
    return Served(
        concepts=bank.concepts,
        stages={site: _stages(bank, site, interventions) for site in sites},
        gates={bank.concepts.index(concept): _tree(gate, places) for concept, gate in gates.items()},
        scores=tuple(_score(leaf) for leaf in scores.values()),
        usual=_usual(steering),
        made_for=tuple(made_for),
    )


def _usual(steering: Steering) -> Request:
    """What is done where a request does not say."""
    c = steering.c if isinstance(steering.c, Mapping) else dict.fromkeys(steering.vectors.concepts, steering.c)
    numbers: dict[str, tuple[float, ...]] = {}
    for concept, own in c.items():
        if not isinstance(own, int | float):
            raise StrengthError(
                f"c[{concept!r}]: a request is one row, and its steps are given by steer({{...: [...]}}); save one "
                f"number, got {own!r}"
            )
        numbers[concept] = (float(own),)
    given = steering.positions
    positions = given if isinstance(given, Mapping) else dict.fromkeys(c, given)
    return Request(numbers, {name: "all" if own is None else own for name, own in positions.items()})


def _stages(bank: VectorBank, site: str, interventions: Sequence[Intervention | PerSite]) -> tuple[Stage, ...]:
    stack = stack_of(bank, site)
    stages: list[Stage] = []
    for concept, direction in zip(stack.concepts, stack.rows().double(), strict=True):
        for reads, adds, offsets in _forms(at_site(interventions[concept], site), direction, where=f"site {site!r}"):
            if reads is not None:
                stages.append(Stage(adds.float(), (concept,), reads.float(), offsets.float()))
                continue
            if not stages or stages[-1].reads is not None:
                stages.append(Stage(torch.zeros(len(bank), stack.size), ()))
            stages[-1].adds[concept] += (offsets @ adds).float()
            stages[-1] = replace(stages[-1], places=(*stages[-1].places, concept))
    return tuple(stages)


Form: TypeAlias = tuple[Tensor | None, Tensor, Tensor]
"""A (r, d), or None for 0; U (r, d); b (r,), in float64."""


def _forms(intervention: Intervention, direction: Float[Tensor, " d"], *, where: str) -> list[Form]:
    """The edits h + s Uᵀ(A h + b) that the intervention makes, one after another.

    Raises:
        UnsupportedModelError: it is of another form.
    """
    match intervention:
        case Add(relative=False):
            return [(None, direction[None], direction.new_ones(1))]
        case Ablate(one_sided=False):
            along = nonzero_unit(direction, by=intervention)
            middle = direction.new_zeros(1) if intervention.around is None else intervention.middle(along)[None]
            return [(-along[None], along[None], middle)]
        case Clamp():
            along = nonzero_unit(direction, by=intervention)
            return [(-along[None], along[None], direction.new_full((1,), intervention.target))]
        case LowRankAt():
            return [(intervention.reads.double(), intervention.adds.double(), intervention.offsets.double())]
        case AffineAt():
            one = torch.eye(len(direction), dtype=torch.float64)
            return [(intervention.weight.double() - one, one, intervention.bias.double())]
        case Chain():
            each = [at_site(own, where) for own in intervention.interventions]
            return [form for own in each for form in _forms(own, direction, where=where)]
    raise UnsupportedModelError(
        f"{where}: {intervention!r} is not of the form h + s·(A h + b)U, with s the strength of each token, which is "
        "what is served: Add, Ablate, Clamp, LowRank, Affine and chains of them"
    )


def _score(gate: Gate) -> Score:
    """What a gate reads.

    Raises:
        UnsupportedModelError: a gate of another kind.
    """
    inside, width = (gate.gate, gate.width) if isinstance(gate, Soft) else (gate, 0.0)
    if not isinstance(inside, ProjectionAbove | CosineAbove | ProbeAbove):
        raise UnsupportedModelError(
            f"gate {gate!r}: what is served are ProjectionAbove, CosineAbove, ProbeAbove, Soft around one, and And, Or "
            "and Not of them"
        )
    return Score(
        site=gate.site,
        per=gate.per,
        weight=inside.direction.float(),
        offset=inside.offset if isinstance(inside, ProbeAbove) else 0.0,
        threshold=inside.threshold,
        width=width,
        is_cosine=isinstance(inside, CosineAbove),
    )


def _tree(gate: AnyGate, places: Mapping[int, int]) -> Tree:
    if isinstance(gate, Combination):
        return gate, tuple(_tree(inner, places) for inner in gate.gates)
    return places[id(gate)]


def _shown(tree: Tree) -> Any:
    return tree if isinstance(tree, int) else (type(tree[0]).__name__, [_shown(inner) for inner in tree[1]])
