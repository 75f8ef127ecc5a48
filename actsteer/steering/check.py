"""check: what a pass over inputs tells of a steering: how large the activations are, and whether an edit arrives."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

from actsteer.collecting.batches import Batches, call, iterate
from actsteer.collecting.eval_mode import buffers_kept, eval_mode
from actsteer.collecting.moments import Moments, exact
from actsteer.collecting.observe import Observation, Step
from actsteer.collecting.statistics import Statistics
from actsteer.errors import OutputError
from actsteer.sites import tap
from actsteer.sites.containers import is_opaque, tensors_in
from actsteer.sites.lens import Lens
from actsteer.steering.edit import SiteEdit, is_in_place
from actsteer.steering.interventions.ablate import Ablate
from actsteer.steering.norms import norms, typical

FAR = 3.0
"""Standard deviations from 0 from which on a mean projection is far from it."""
_DRAWS = (1.0, 1.0, 1.0, 10.0, 10.0, 10.0, 100.0, 100.0)  # of numbers at a site, beside the activation

Edits: TypeAlias = Mapping[str, SiteEdit]
_Outputs: TypeAlias = list[tuple[Tensor, Node | None]]
"""The tensors that a model returns, each with what made it."""


@dataclass(frozen=True)
class Seen:
    """How large the activations of one site are, and where they lie along each direction u.

    Args:
        norm: the typical ‖h‖, its median; of statistics, which have no median, the root of the mean of its square;
            0 if there are no rows.
        along: the mean and the standard deviation of h·u; empty if there are fewer than two rows, or no covariance.
    """

    norm: float
    along: Mapping[int, tuple[float, float]]


@dataclass(frozen=True)
class Check:
    """What was seen at every site, and which of them the model's answers do not depend on."""

    seen: Mapping[str, Seen]
    unreached: Sequence[str]

    def warnings(self, edits: Edits, concepts: Sequence[str]) -> Iterator[str]:
        """What the user is to be warned of."""
        for site in self.unreached:
            yield (
                f"site {site!r}: nothing that the model returns depends on it, but the activation itself; on these "
                "inputs an edit there changes no answer; choose an earlier site, or the tensor that is read, by a key"
            )
        for site, edit in edits.items():
            for own, index in enumerate(edit.concepts):
                if isinstance(intervention := edit.interventions[own], Ablate) and own in self.seen[site].along:
                    mean, spread = self.seen[site].along[own]
                    if intervention.around is None and abs(mean) > FAR * spread:
                        yield far_from_zero(site, concepts[index], f"at {mean:.3g} ± {spread:.2g}")


def far_from_zero(site: str, concept: str, where: str) -> str:
    """The warning that Ablate at this site sets the activations to a value far from their own."""
    return (
        f"site {site!r}: along {concept!r} the activations lie {where}, and Ablate sets all of them to 0, which is far "
        "from there; Ablate(around={site: mean}), with the mean activation, sets them to their mean instead"
    )


def checked(
    model: nn.Module, edits: Edits, inputs: Batches | Statistics, *, batch_size: int, where: Mapping[str, Any]
) -> Check:
    """Run all inputs to see how large the activations are, and the first call to see which sites are not reached.

    Statistics are read instead, without a pass; they do not tell which sites are reached.
    """
    units = {site: _units(edit) for site, edit in edits.items()}
    if isinstance(inputs, Statistics):
        return Check({site: _seen_in(inputs[site], units[site]) for site in edits}, [])
    calls = list(iterate(inputs, batch_size=batch_size, progress=False, label=""))
    sums = {site: Moments.empty(len(units[site]), covariance="diagonal") for site in edits}
    sizes: dict[str, list[Tensor]] = {site: [] for site in edits}

    def keep(site: str, rows: Tensor, owners: Tensor) -> None:
        own = exact(rows)
        sums[site].update(own @ torch.stack([*units[site].values()], dim=1).to(own) if units[site] else own[:, :0])
        sizes[site].append(norms(rows)[:, 0].cpu())

    with buffers_kept(model):
        Observation(model, edits, **where, positions="all", stop=True).run(Step(batch, keep) for batch in calls)
    seen = {site: _seen_by(sizes[site], sums[site], list(units[site])) for site in edits}
    return Check(seen, unreached(model, edits, calls[0]))


def _seen_by(sizes: Sequence[Tensor], columns: Moments, own: Sequence[int]) -> Seen:
    """From every ‖h‖, and the moments of h·u, a column for each direction."""
    norm = typical(sizes)
    if columns.count < 2:
        return Seen(norm, {})
    pairs = zip(columns.mean.tolist(), columns.variance.sqrt().tolist(), strict=True)
    return Seen(norm, dict(zip(own, pairs, strict=True)))


def _seen_in(moments: Moments, units: Mapping[int, Tensor]) -> Seen:
    """From the moments of h itself."""
    along: dict[int, tuple[float, float]] = {}
    if moments.has_covariance and moments.count > 1:
        mean, covariance = moments.mean, moments.covariance
        for own, unit in ((own, unit.to(mean)) for own, unit in units.items()):
            along[own] = float(mean @ unit), math.sqrt(max(0.0, float(unit @ covariance @ unit)))
    return Seen(moments.rms_norm, along)


def unreached(model: nn.Module, edits: Edits, batch: Any) -> list[str]:
    """The sites on which nothing depends that the model returns, but the activation itself.

    One pass shows it, by what autograd sees. Where that is nothing it is tried: a site is not reached if the answers
    stay the same, bit for bit, though other numbers stand there.
    """
    made: dict[str, set[Node]] = {}

    def mark(site: str, raw: Tensor) -> Tensor:
        marked = raw + torch.zeros((), dtype=raw.dtype, device=raw.device, requires_grad=True)
        made.setdefault(site, set()).update([] if marked.grad_fn is None else [marked.grad_fn])
        return marked

    seen: _Outputs = []
    with ExitStack() as stack:
        for block in (suppress(Exception), torch.inference_mode(mode=False), torch.enable_grad()):
            stack.enter_context(block)
        stack.enter_context(saved_tensors_hooks(forget, forget))
        seen = _outputs(model, edits, batch, mark)  # unless it cannot, and then autograd does not tell
    trial = _Trial(model, batch, seen, made)
    doubtful = {site: edit for site, edit in edits.items() if not _depends(seen, made.get(site, set()))}
    with suppress(Exception):  # of a model in which nothing can be tried, nothing is known
        if len(doubtful) > 1 and not trial.moves(doubtful):
            return list(doubtful)
        return [site for site, edit in doubtful.items() if not trial.moves({site: edit})]
    return []


def _depends(outputs: _Outputs, nodes: set[Node]) -> bool:
    """Whether an output comes from these nodes: the first of all, or another that is not one of them."""
    return any(
        node is not None and (index == 0 or node not in nodes) and bool(nodes & _behind(node))
        for index, (_, node) in enumerate(outputs)
    )


class _Trial:
    """Other numbers at sites, and whether other answers come of it.

    Args:
        seen, made: what a pass has shown that autograd followed, and what each activation was made by in it.
    """

    def __init__(self, model: nn.Module, batch: Any, seen: _Outputs, made: Mapping[str, set[Node]]) -> None:
        self._model, self._batch, self._seen, self._made = model, batch, seen, made
        self._generator = torch.Generator().manual_seed(0)

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def moves(self, edits: Edits) -> bool:
        """Whether the outputs change, the activations themselves aside, or whether that cannot be told.

        Numbers are drawn several times, larger and larger, for an answer may be one of a few.
        """
        ran: set[str] = set()

        def scramble(size: float, site: str, raw: Tensor) -> Tensor:
            ran.add(site)
            noise = torch.randn(raw.shape, generator=self._generator).to(raw)
            return raw + size * noise * raw.square().mean().sqrt().clamp(min=1.0)

        plain = [tensor for tensor, _ in _outputs(self._model, edits, self._batch, partial(scramble, 0.0))]
        if ran != edits.keys() or not plain:
            return True
        nodes = set[Node]().union(*(self._made.get(site, set()) for site in edits))
        itself = [node in nodes for _, node in self._seen] if len(self._seen) == len(plain) else [False] * len(plain)
        for size in _DRAWS:
            moved = [tensor for tensor, _ in _outputs(self._model, edits, self._batch, partial(scramble, size))]
            if [own.shape for own in plain] != [own.shape for own in moved]:
                return True
            answers = [pair for pair, is_it in zip(zip(plain, moved, strict=True), itself, strict=True) if not is_it]
            if not all(torch.equal(one.nan_to_num(), other.nan_to_num()) for one, other in answers):
                return True
        return False


def _outputs(model: nn.Module, edits: Edits, batch: Any, change: Callable[[str, Tensor], Tensor]) -> _Outputs:
    """What the model returns where the activations are changed."""
    with ExitStack() as stack:
        stack.enter_context(eval_mode(model))
        stack.enter_context(buffers_kept(model))
        for site, edit in edits.items():
            is_input = edit.place.side == "in"
            when: tap.When = "before" if is_input else "after"
            callback = partial(_changed, edit.lens, partial(change, site), is_input)
            stack.callback(tap.take_off, edit.place.module, when, callback)
            tap.put(edit.place.module, when, callback, owner=None)
        output = call(model, batch)
        if is_opaque(output):
            raise OutputError(f"a {type(output).__name__} holds what is no tensor, and cannot be compared")
        return [(tensor.detach().clone(), tensor.grad_fn) for tensor in tensors_in(output)]


def _changed(
    lens: Lens, change: Callable[[Tensor], Tensor], is_input: bool, module: nn.Module, args: Any, value: Any
) -> Any:
    view = lens.heard(module, args, value)
    whole = view.write_raw(change(view.raw))
    if is_in_place(module, value, whole):
        return value.copy_(whole)  # its caller may look there
    return tuple(whole) if is_input else whole


def _behind(node: Node) -> set[Node]:
    """All that a node was made from, itself included."""
    found, stack = {node}, [node]
    while stack:
        for other, _ in stack.pop().next_functions:
            if other is not None and other not in found:
                found.add(other)
                stack.append(other)
    return found


def _units(edit: SiteEdit) -> dict[int, Tensor]:
    """The directions that are not zero, at norm 1."""
    rows = edit.directions.detach().double()
    return {own: row / row.norm() for own, row in enumerate(rows) if bool(row.any())}


def forget(_: Any) -> Any:
    """Keep nothing for a backward pass, of a graph that is only looked at."""
    return None
