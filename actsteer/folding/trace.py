"""Trace: what makes the activation at a site, and what reads it, as one forward pass shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node, saved_tensors_hooks

from actsteer.collecting.batches import call
from actsteer.collecting.eval_mode import eval_mode
from actsteer.errors import NotFoldable
from actsteer.folding.layers import kind_of
from actsteer.sites import tap
from actsteer.sites.axes import Layout
from actsteer.sites.containers import Arguments, tensors_in
from actsteer.sites.lens import Lens
from actsteer.sites.place import Place
from actsteer.sites.wrappers import named_modules
from actsteer.steering.check import forget

_VIEWS = frozenset(
    f"{name}Backward0"
    for name in (
        *("View", "UnsafeView", "ReshapeAlias", "Alias", "Clone", "ToCopy", "Unsqueeze", "Squeeze", "Transpose", "T"),
        *("Permute", "Expand", "Select", "Slice", "Detach", "Unbind", "Split"),
    )
) | {"SqueezeBackward1", "SqueezeBackward2"}


@dataclass(eq=False)
class Run:
    """One call of a module: when, with what and to what end."""

    order: int
    name: str
    module: nn.Module
    inputs: list[Node] = field(default_factory=list)
    output: Node | None = None

    def __str__(self) -> str:
        return f"{self.name or 'the model'} ({type(self.module).__name__})"


class Trace:
    """One forward pass of a model with its places, in evaluation mode; the model is left as it was.

    Raises:
        NotFoldable: a site that did not run, or not once, or outside of what autograd sees.
    """

    def __init__(self, model: nn.Module, places: Mapping[str, Place], batch: Any) -> None:
        self.sites: dict[str, Node] = {}
        self._runs: list[Run] = []
        self._order: dict[str, int] = {}
        self._site_at: dict[Node, str] = {}
        if any(parameter.is_inference() for parameter in model.parameters()):
            raise NotFoldable("the model was made in inference mode, where nothing can be traced; make it outside")
        with ExitStack() as stack:
            stack.enter_context(eval_mode(model))
            stack.enter_context(_gradients(model))
            stack.enter_context(saved_tensors_hooks(forget, forget))  # there is no backward pass
            inputs = {site: place for site, place in places.items() if place.side == "in"}
            for site, place in inputs.items():  # before the module's own inputs are looked at
                _put(stack, place.module, "before", self._noticing(site, place))
            for name, module in {id(m): (n, m) for n, m in reversed(list(named_modules(model)))}.values():
                self._follow(stack, name, module)
            for site, place in places.items():
                if site not in inputs:
                    _put(stack, place.module, "after", self._noticing(site, place))
            output = call(model, _tracked(batch))
        if missing := [site for site in places if site not in self.sites]:
            raise NotFoldable(
                f"sites {missing} did not run on verify_on, or without gradients; nothing is known of them"
            )
        self.returned = {tensor.grad_fn for tensor in tensors_in(output) if tensor.grad_fn is not None}
        counts = self.returned | _reversed(self.returned).keys()
        if cut := [site for site, node in self.sites.items() if node not in counts]:
            raise NotFoldable(f"sites {cut}: the outputs do not depend on them in a way that autograd sees")
        self._read_by = _reversed(self.returned | {run.output for run in self._runs if run.output is not None})
        ran = {id(run.module) for run in self._runs}
        self.idle = [name for name, module in _unused(model, self._read_by) if id(module) not in ran]
        self._made: dict[Node, list[Run]] = {}
        for run in self._runs:
            if run.output is not None:
                self._made.setdefault(run.output, []).append(run)
        self._counts = Counter(id(run.module) for run in self._runs)

    def in_order(self) -> list[str]:
        """The sites in the order in which they ran."""
        return sorted(self._order, key=self._order.__getitem__)

    def times(self, run: Run) -> int:
        """How often the run's module ran in the pass."""
        return self._counts[id(run.module)]

    def writers(self, site: str, *, settled: Set[str]) -> tuple[list[Run], list[str]]:
        """The layers whose outputs sum to the activation, the last one first; and what else is in that sum.

        A layer whose output is read elsewhere too counts as something else, if no other site is settled.

        Args:
            settled: sites past which nothing need be known, and perhaps the site itself.
        """
        found: list[Run] = []
        others: list[str] = []
        stack: list[tuple[Node, Run | None]] = [(self.sites[site], None)]
        seen: set[Node] = set()
        while stack:
            node, maker = stack.pop()
            if node in seen or (self._site_at.get(node, site) != site and self._site_at[node] in settled):
                continue
            seen.add(node)
            runs = self._made.get(node, ())
            maker = next((run for run in runs if not list(run.module.children())), maker)
            is_sum = node.name() == "AddBackward0" and getattr(node, "_saved_alpha", 1) == 1
            if is_sum and any(other is None for other, _ in node.next_functions):
                others.append("something that autograd does not see")
            if layers := [run for run in runs if kind_of(run.module) is not None]:
                found.append(layers[0])
            elif node.name() in _VIEWS or is_sum:
                stack += [(other, None if is_sum else maker) for other, _ in node.next_functions if other is not None]
            else:
                others.append(self._described(node) if maker is None else str(maker))
        if settled <= {site}:
            elsewhere = {run: self._read_elsewhere(run, site, within=seen) for run in found}
            others += [f"{reader}, which reads {run} too" for run, reader in elsewhere.items() if reader is not None]
            found = [run for run in found if elsewhere[run] is None]
        return sorted(found, key=lambda run: -run.order), others

    def _read_elsewhere(self, run: Run, site: str, *, within: set[Node]) -> str | None:
        """What reads a layer's output past the site; None if all of it comes to the site."""
        stack = [run.output] if run.output is not None else []
        while stack:
            node = stack.pop()
            if node is self.sites[site]:
                continue
            if node in self.returned:
                return "the output"
            for reader in self._read_by.get(node, ()):
                if reader not in within:
                    known = [r for r in self._runs if node in r.inputs and reader in _product(r)]
                    return str(known[0]) if known else self._described(reader)
                stack.append(reader)
        return None

    def readers(self, site: str) -> tuple[list[Run], list[str]]:
        """The layers that read the activation; and what else reads it."""
        closure = self._views_of(self.sites[site])
        found = [run for run in self._runs if kind_of(run.module) is not None and closure & set(run.inputs)]
        inside = {node for run in found for node in _product(run)}
        others = []
        for node in closure:
            if node in self.returned:
                others.append("the model returns it")
            for reader in self._read_by.get(node, ()):
                if reader not in closure and reader not in inside:
                    others.append(self._reader(closure, reader))
        return found, list(dict.fromkeys(others))

    def _views_of(self, node: Node) -> set[Node]:
        closure, stack = {node}, [node]
        while stack:
            for reader in self._read_by.get(stack.pop(), ()):
                if reader.name() in _VIEWS and reader not in closure:
                    closure.add(reader)
                    stack.append(reader)
        return closure

    def _described(self, node: Node) -> str:
        runs = self._made.get(node, ())
        if not runs:
            return "a parameter" if "AccumulateGrad" in node.name() else f"an operation ({node.name()})"
        experts = any(own is not None and own.ndim > 2 for own in runs[0].module._parameters.values())
        return f"{runs[0]}{' with its fused experts' if experts else ''}"

    def _reader(self, closure: set[Node], reader: Node) -> str:
        inner = [run for run in self._runs if closure & set(run.inputs) and not list(run.module.children())]
        return str(inner[0]) if inner and kind_of(inner[0].module) is None else self._described(reader)

    def _follow(self, stack: ExitStack, name: str, module: nn.Module) -> None:
        started: list[Run] = []

        def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            nodes = [tensor.grad_fn for tensor in tensors_in(Arguments(args, kwargs))]
            started.append(Run(len(self._runs), name, module, [node for node in nodes if node is not None]))

        def after(_: nn.Module, __: tuple[Any, ...], output: Any) -> None:
            run = started.pop()
            run.order = len(self._runs)
            first = next(iter(tensors_in(output)), None)
            run.output = None if first is None else first.grad_fn
            self._runs.append(run)

        _put(stack, module, "before", before)
        _put(stack, module, "after", after)

    def _noticing(self, site: str, place: Place) -> Any:
        lens = Lens(place, Layout(None))

        def notice(_: nn.Module, args: tuple[Any, ...], value: Any) -> Any:
            view = lens.heard(place.module, args, value)
            copied = view.raw.clone()  # a node of its own, so that who reads it has not read what it came from
            if site in self.sites:
                raise NotFoldable(f"site {site!r} runs more than once in one pass, and has one set of weights")
            if copied.grad_fn is not None:
                self.sites[site] = copied.grad_fn
                self._site_at[copied.grad_fn] = site
                self._order[site] = len(self._runs)
            whole = view.write_raw(copied)
            return tuple(whole) if place.side == "in" else whole

        return notice


def _put(stack: ExitStack, module: nn.Module, when: tap.When, callback: Callable[..., Any]) -> None:
    """By a tap, as a steering: what the module's hooks do comes before its input, and after its output."""
    stack.callback(tap.take_off, module, when, callback)
    tap.put(module, when, callback, owner=None)


def _unused(model: nn.Module, read_by: Mapping[Node, object]) -> Iterator[tuple[str, nn.Module]]:
    """The modules that have parameters, of which autograd has seen none."""
    used = {id(getattr(node, "variable", None)) for node in read_by}
    for name, module in named_modules(model):
        own = [p for p in module._parameters.values() if p is not None and p.is_floating_point()]
        if own and not any(id(p) in used for p in own):
            yield name, module


@contextmanager
def _gradients(model: nn.Module) -> Iterator[None]:
    frozen = [p for p in model.parameters() if not p.requires_grad and p.is_floating_point() and p.is_leaf]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        with torch.inference_mode(mode=False), torch.enable_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _tracked(batch: Any) -> Any:
    """The batch with floating inputs that autograd follows."""
    if isinstance(batch, Tensor):
        return batch.detach().clone().requires_grad_().clone() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {key: _tracked(value) for key, value in batch.items()}
    return type(batch)(_tracked(value) for value in batch) if type(batch) in (tuple, list) else batch


def _product(run: Run) -> set[Node]:
    """The nodes of one layer's computation, back to where its input enters."""
    found: set[Node] = set()
    stack = [run.output] if run.output is not None else []
    while stack:
        node = stack.pop()
        found.add(node)
        stack += [o for o, _ in node.next_functions if o is not None and o not in found and o not in run.inputs]
    return found


def _reversed(outputs: Iterable[Node]) -> dict[Node, set[Node]]:
    """Node -> the nodes that read what it made."""
    readers: dict[Node, set[Node]] = {}
    stack, seen = list(outputs), set(outputs)
    while stack:
        node = stack.pop()
        for other, _ in node.next_functions:
            if other is not None:
                readers.setdefault(other, set()).add(node)
                if other not in seen:
                    seen.add(other)
                    stack.append(other)
    return readers
