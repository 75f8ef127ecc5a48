"""Fold: write a steering into a model's weights, and prove that nothing else has changed."""

from __future__ import annotations

import copy
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from itertools import chain
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from actsteer.collecting.batches import Batches, call
from actsteer.collecting.eval_mode import buffers_kept, eval_mode
from actsteer.errors import AttachedError, NotFoldable
from actsteer.folding import pretrained
from actsteer.folding.affine import AffineMap, affine_maps, same_projections
from actsteer.folding.layers import changed_by, obstacle, write_input, write_output
from actsteer.folding.proof import Proof
from actsteer.folding.ties import Ties
from actsteer.folding.trace import Run, Trace
from actsteer.folding.undo import Undo
from actsteer.sites.axes import Axes, Layout
from actsteer.sites.lens import Lens
from actsteer.sites.listen import listen
from actsteer.sites.place import Place, split_features
from actsteer.sites.resolve import Sites, resolve
from actsteer.sites.shards import is_gathered_now_and_then
from actsteer.sites.wrappers import named_modules, unwrapped
from actsteer.steering import in_bias
from actsteer.steering.attached import steerers
from actsteer.steering.interventions.replace import Replace
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import Interventions, Steerable, steering_of
from actsteer.steering.strength import Strengths, strengths_of

Model = TypeVar("Model", bound=nn.Module)
_folded: WeakKeyDictionary[nn.Module, list[Undo]] = WeakKeyDictionary()


def fold(
    model: Model,
    vectors: Steerable,
    c: Strengths | None = None,
    *,
    verify_on: Batches,
    intervention: Interventions | None = None,
    sites: Sites | None = None,
    axis: Axes | None = None,
    untie: bool = False,
    inplace: bool = False,
) -> Model:
    """A copy of the model whose weights carry the steering: it runs anywhere, at no cost, without this library.

    What is added to an activation goes into the bias of the layer that makes it or, in a residual stream, of the last
    one that writes to it; or, behind a nonlinearity, into the biases of the layers that read it, b + W (c v). What
    mixes features, as `Ablate` does, goes into the weights, (I - c v vᵀ) W with v of norm 1, of all layers that the
    activation is the sum of. Any affine edit can be folded: `LowRank`, `Affine`, `Replace`, `Clamp` to one value.
    `Ablate` at all `residual_writers(model)` takes a direction out of the whole residual stream.

    It is not assumed that this is the same. One pass shows which layers make and read the activation, and then the
    outputs on `verify_on` must be those of the hooked model, as near as rounding at the sites lets them be. What the
    pass cannot show is not proved: a branch that other inputs take (layers that did not run are warned about), what a
    comparison decides, or a call that goes past the layer, as `inputs_embeds` goes past an embedding.

    For vectors that know their model the copy is that model still; what `deepcopy` or a file makes of it is not.

    Args:
        model: any `nn.Module`; it is not changed, unless `inplace`.
        vectors, c, intervention, sites, axis: as for `Steerer`, with one strength for all rows. A `Steering` with a
            gate or positions is refused, for weights steer every row and token alike.
        verify_on: inputs, on which it is proved: a tensor, a tuple or a mapping, or an iterable of these. Pads, as an
            attention_mask shows them, are left out; folded weights steer them too, which changes no answer at a token.
        untie: where the weight of an embedding, or of a head, has to change that both share, give the head, an
            `nn.Linear`, weights of its own; the config of a Hugging Face model says so. `unfold` ties them again.
        inplace: change the model itself, until `unfold`.

    Raises:
        NotFoldable: no layer can carry it, with the name of what stands between; the model is as it was.
        AttachedError: a Steerer is attached to the model: inside its block, say.
        ActsteerError: and what `Steerer` raises.

    Warns:
        UserWarning: some layers did not run on `verify_on`; give inputs that reach them.

    Source: directional ablation by weight orthogonalisation, Arditi et al. 2024.

    >>> from actsteer import SteeringVector
    >>> model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    >>> v, x = SteeringVector({"1": torch.tensor([1.0, 2.0])}), torch.randn(4, 2)
    >>> folded = fold(model, v, 3, verify_on=x)
    >>> with Steerer(model, v, c=3):
    ...     bool(torch.allclose(model(x), folded(x), atol=1e-5))
    True
    """
    steerer, maps = affine_steering(model, vectors, c, intervention=intervention, sites=sites, axis=axis)
    target = model if inplace else _copied(model)
    undo = Undo()
    if maps:
        try:
            with buffers_kept(model), buffers_kept(target):
                proof = Proof(steerer, verify_on)
                ties = Ties(unwrapped(target), untie=untie)
                folding = _Folding(target, steerer, maps, proof, ties)
                folding.run(undo)
                pretrained.adapt(unwrapped(target), undo, untied=ties.parted())
                if (failure := proof.failure(target)) is not None:
                    raise NotFoldable(f"with what its config asks for now, {failure}")
        except BaseException:
            undo.run()
            raise
        if folding.idle:
            names = ", ".join(name or "the model" for name in folding.idle[:3]) + " and more" * (len(folding.idle) > 3)
            warnings.warn(
                f"{names} did not run on verify_on, and whether they would be steered is not proved; give inputs that "
                "reach them",
                UserWarning,
                stacklevel=2,
            )
    if inplace:
        undo.leave()
        _folded.setdefault(model, []).append(undo)
    return target


def affine_steering(
    model: nn.Module,
    vectors: Steerable,
    c: Strengths | None,
    *,
    intervention: Interventions | None,
    sites: Sites | None,
    axis: Axes | None,
) -> tuple[Steerer, dict[str, AffineMap]]:
    """The Steerer, and site -> what it does there as an affine map; sites at which it does nothing are left out.

    Raises:
        NotFoldable: it depends on the row or the token, or otherwise than affinely on the activation; or the model is
            sharded.
        AttachedError: a Steerer is attached to the model.
        ActsteerError: and what `Steerer` raises.
    """
    steering = steering_of(vectors, {"c": c, "intervention": intervention, "sites": sites})
    for part, own in {"gate": steering.gate, "positions": steering.positions}.items():
        if own is not None and not (isinstance(own, str) and own == "all"):
            raise NotFoldable(f"{part}: weights steer every row and token alike, and not by {own!r}; keep the Steerer")
    steerer = Steerer(model, steering, axis=axis)
    given = strengths_of(steerer.c, {concept: place for place, concept in enumerate(steerer.bank)})
    strengths = [given[place] for place in range(len(given))]
    if any(not isinstance(own, Tensor) or own.ndim for own in strengths):
        raise NotFoldable(
            "c: weights have one strength for all rows and steps; give one number, or one for each concept"
        )
    maps = affine_maps(steerer.edits, [own for own in strengths if isinstance(own, Tensor)])
    if (name := next((n for n, m in named_modules(model) if is_gathered_now_and_then(m)), None)) is not None:
        raise NotFoldable(f"{name or 'the model'}: its parameters are sharded; fold the model before FSDP shards it")
    _check_unsteered(model)
    return steerer, {site: own for site, own in maps.items() if not own.is_identity}


def unfold(model: nn.Module) -> None:
    """Take out, bit for bit, what `fold(..., inplace=True)` wrote last into this model.

    Raises:
        NotFoldable: nothing is folded into it in place (of a folded copy the plain model is the one that was copied),
            or what was folded into has been changed since, by training perhaps.
        AttachedError: the fold backend has changed its biases.
    """
    undone = _folded.get(model)
    if not undone:
        raise NotFoldable(f"nothing is folded into this {type(model).__name__} in place; of a copy, use the original")
    _check_free(model)
    undone[-1].check()
    undone.pop().run()


def _check_unsteered(model: nn.Module) -> None:
    if attached := steerers(model):
        raise AttachedError(
            f"the model is being steered, by {attached[0]!r}, and its weights do not have that; leave the block, or "
            "detach it, first"
        )


def _check_free(model: nn.Module) -> None:
    if any(in_bias.is_folded(module) for module in model.modules()):
        raise AttachedError("a Steerer with backend='fold' is attached to this model; detach it first")


def _copied(model: Model) -> Model:
    try:
        return copy.deepcopy(model)
    except RuntimeError as error:
        raise NotFoldable(f"{type(model).__name__} cannot be copied ({error}); fold with inplace=True") from None


class _Folding:
    """The sites one by one, each by the first way that is right."""

    def __init__(
        self, target: nn.Module, steerer: Steerer, maps: Mapping[str, AffineMap], proof: Proof, ties: Ties
    ) -> None:
        self._target, self._steerer, self._maps, self._proof, self._ties = target, steerer, maps, proof, ties
        self._batch = proof.batches[0]
        self._trace = Trace(target, resolve(target, maps), self._batch)
        self.idle = self._trace.idle
        """The layers that had no part in any pass."""
        for batch in proof.batches[1:]:
            if self.idle:
                also = set(Trace(target, {}, batch).idle)
                self.idle = [name for name in self.idle if name in also]
        self._why: defaultdict[str, list[str]] = defaultdict(list)
        self._same = same_projections(maps)

    def run(self, undo: Undo) -> None:
        """Fold all sites, or raise."""
        ways = {site: self._ways_of(site) for site in self._trace.in_order()}
        likeliest: dict[str, Callable[[Undo], None]] = {}
        for site, own in ways.items():
            if (first := next(own, None)) is None:
                raise NotFoldable(self._message(site))
            likeliest[site] = first
        for way in likeliest.values():  # most often it is right everywhere
            way(undo)
        if self._proof.failure(self._target) is None:
            return
        undo.run()
        rest = list(ways)
        for site, others in ways.items():
            rest.remove(site)
            for way in chain([likeliest[site]], others):
                before = undo.mark()
                way(undo)
                if (failure := self._failure(rest)) is None:
                    break
                self._why[site].append(failure)
                undo.run(before)
            else:
                raise NotFoldable(self._message(site))

    def _failure(self, rest: list[str]) -> str | None:
        """What is wrong where some sites are folded and the rest still hooked."""
        if not rest:
            return self._proof.failure(self._target)
        with self._steerer.on(self._target, sites=rest):
            return self._proof.failure(self._target)

    def _message(self, site: str) -> str:
        why = "; ".join(list(dict.fromkeys(self._why[site]))[:5]) or "no layer makes or reads it"
        return f"site {site!r} cannot be folded: {why}. Keep the Steerer, or choose another site"

    def _ways_of(self, site: str) -> Iterator[Callable[[Undo], None]]:
        """How the site could be folded, the likeliest first."""
        for into in (self._into_writers, self._into_readers):
            if (way := into(site, self._maps[site])) is not None:
                yield way

    def _into_writers(self, site: str, edit: AffineMap) -> Callable[[Undo], None] | None:
        writers, others = self._trace.writers(site, settled=self._same[site])
        if not edit.mixes:
            last = next((run for run in writers if self._can(site, run, edit, at="output")), None)
            self._why[site].extend(f"{other} stands between" for other in others)
            return None if last is None else partial(self._write, [last], edit)
        self._why[site].extend(f"{other} has a part in it" for other in others)
        able = [self._can(site, run, edit, at="output") for run in writers]
        return None if others or not all(able) or not writers else partial(self._write, writers, edit)

    def _write(self, writers: list[Run], edit: AffineMap, undo: Undo) -> None:
        """Into the layers whose sum it is; what is added, into the first of them."""
        for index, run in enumerate(writers):
            self._keep(run, edit, undo)
            write_output(run.module, edit, bias=index == 0)

    def _keep(self, run: Run, edit: AffineMap, undo: Undo) -> None:
        """Before a layer is written to."""
        keys = changed_by(edit, run.module)
        if "weight" in keys:
            self._ties.part(run.module, undo)
        undo.keep(run.module, run.name, *keys)

    def _into_readers(self, site: str, edit: AffineMap) -> Callable[[Undo], None] | None:
        readers, others = self._trace.readers(site)
        self._why[site].extend(f"{other} reads it" for other in others)
        able = [self._can(site, run, edit, at="input") for run in readers]
        if others or not all(able) or not readers:
            return None
        constants = self._constants(site, edit, readers)
        if constants is None:
            self._why[site].append("its readers see it reshaped, or not alike in every row")
            return None

        def write(undo: Undo) -> None:
            for run in readers:
                self._keep(run, edit, undo)
                write_input(run.module, edit, constants[run])

        return write

    def _can(self, site: str, run: Run, edit: AffineMap, *, at: Any) -> bool:
        why = obstacle(run.module, edit, at=at) or self._ties.obstacle(run.module, changed_by(edit, run.module))
        if why is None and self._trace.times(run) > 1:
            why = f"it runs {self._trace.times(run)} times in one pass"
        if why is not None:
            self._why[site].append(f"{run}: {why}")
        return why is None

    @torch.no_grad()
    def _constants(self, site: str, edit: AffineMap, readers: list[Run]) -> dict[Run, Tensor] | None:
        """What comes to each reader where the activation is m: one row, float64; None if the rows differ."""
        seen: dict[Run, Tensor] = {}

        def notice(run: Run, lens: Lens, module: nn.Module, args: Any, kwargs: Any) -> None:
            seen[run] = lens.heard(module, args, kwargs).raw.detach().clone()

        whole = site if self._steerer.edits[site].place.features is None else split_features(site)[0]
        constant = Replace({whole: edit.bias})
        axes = {whole: self._steerer.axes[site]} if site in self._steerer.axes else None
        with ExitStack() as stack:
            stack.enter_context(eval_mode(self._target))
            stack.enter_context(Steerer(self._target, constant, axis=axes, strict=False))
            for run in readers:  # after the steering
                place = Place(site=f"{run.name}:in", name=run.name, module=run.module, side="in")
                stack.callback(listen(place, partial(notice, run, Lens(place, Layout(None)))))
            call(self._target, self._batch)
        found: dict[Run, Tensor] = {}
        for run in readers:
            if run not in seen:
                return None
            rank = weight.ndim if (weight := run.module._parameters["weight"]) is not None else 2
            came = seen[run] if rank == 2 else seen[run].movedim(1 - rank, -1)  # a convolution's channels last
            rows = came.reshape(-1, came.shape[-1])
            if not bool((rows == rows[0]).all()):
                return None
            exact = len(rows[0]) == len(edit.bias) and bool((rows[0] == edit.bias.to(rows)).all())
            if not exact and edit.mixes:
                return None
            found[run] = edit.bias if exact else rows[0].double()
        return found
