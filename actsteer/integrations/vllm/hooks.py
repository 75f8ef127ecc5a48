"""Hooks: the edits of a served steering on the modules of a model, with all that changes in tensors that stay in place.

They are plain torch: compiled code and CUDA graphs read the same tensors at the same addresses, whatever is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from actsteer.errors import GateError, ShapeError, SteeringNotApplied, UnsupportedModelError
from actsteer.integrations.vllm.served import Score, Served, Tree
from actsteer.integrations.vllm.sites import Where, find


@final
class Buffers:
    """What is written before each pass, and read by the hooks.

    Args:
        tokens, requests: the most tokens of a pass, and the most requests that a decision is kept of.
        served: the steering.
        device: of the model.
    """

    def __init__(self, served: Served, *, tokens: int, requests: int, device: torch.device) -> None:
        scores = len(served.scores)
        self.strengths: Float[Tensor, "T K"] = torch.zeros(tokens, len(served.concepts), device=device)
        self.decisions: Float[Tensor, "T L"] = torch.zeros(tokens, scores, device=device)
        self.slots: Int[Tensor, " T"] = torch.zeros(tokens, dtype=torch.int64, device=device)
        self.shares: Float[Tensor, "T 2"] = torch.zeros(tokens, 2, device=device)
        """How much a token counts in the mean over its prompt, and whether it is the prompt's last."""
        self.fresh: Bool[Tensor, " R"] = torch.zeros(requests, dtype=torch.bool, device=device)
        """Whether the prompt of a request is in this pass."""
        self.held: Float[Tensor, "R L"] = torch.zeros(requests, scores, device=device)
        """What was decided for each request, for the whole of its sequence."""


@final
class Hooks:
    """The hooks of all sites that this process has.

    Args:
        model: of vLLM.
        served: the steering.
        buffers: what they read.

    Raises:
        SiteNotFoundError, UnsupportedModelError: before anything is attached.
    """

    def __init__(self, model: nn.Module, served: Served, buffers: Buffers) -> None:
        sites = dict.fromkeys((*(score.site for score in served.scores), *served.stages))
        found = {site: find(model, site, reads=served.reads(site)) for site in sites}
        self._hooks: dict[str, _Hook] = {}
        for site, where in found.items():
            if where is not None:
                self._hooks[site] = _Hook(site, where, served, buffers, self._hooks, number=len(self._hooks))
        for site, hook in self._hooks.items():
            if missing := [own for own in hook.asks if own not in self._hooks]:
                raise UnsupportedModelError(
                    f"site {site!r}: its gate reads {missing[0]!r}, in another process of the pipeline; read in the "
                    "same one, or serve without a pipeline"
                )
        for hook in self._hooks.values():
            hook.put()

    @property
    def sites(self) -> tuple[str, ...]:
        """Those of this process."""
        return tuple(self._hooks)

    def replace(self, served: Served) -> None:
        """Another steering of the same shape, in the tensors that are there."""
        for hook in self._hooks.values():
            hook.fill(served)

    def check_fired(self) -> None:
        """After the model has run: that every hook has.

        Raises:
            SteeringNotApplied: some have, and others have not; where none has, compiled code came from a cache.
        """
        silent = [site for site, hook in self._hooks.items() if not hook.fired]
        if silent and len(silent) < len(self._hooks):
            raise SteeringNotApplied(f"the model ran, and these sites did not: {silent}; does vLLM call these modules?")


@final
class _Hook:
    """What is done at one site."""

    def __init__(
        self,
        site: str,
        where: Where,
        served: Served,
        buffers: Buffers,
        others: Mapping[str, _Hook],
        *,
        number: int,
    ) -> None:
        self.fired = False
        self._site, self._where, self._others, self._buffers = site, where, others, buffers
        self._prefix = f"actsteer_{number}_"
        stages = served.stages.get(site, ())
        self._stages = [(number, own.places[0] if own.reads is not None else None) for number, own in enumerate(stages)]
        self._adds_only = all(own.reads is None for own in stages)
        self._scores = [(column, score) for column, score in enumerate(served.scores) if score.site == site]
        steered = {place for own in stages for place in own.places}
        self._gates = [(place, tree) for place, tree in served.gates.items() if place in steered]
        self.asks = {served.scores[own].site for _, tree in self._gates for own in leaves_of(tree)}
        self._size = len(self._scores[0][1].weight) if self._scores else stages[0].adds.shape[1]
        self._constants = self._of(served)

    def put(self) -> None:
        """Attach it."""
        module = self._where.place.module
        shared = {name: own for name, own in vars(self._buffers).items() if isinstance(own, Tensor)}
        like = self._buffers.strengths
        for name, value in {**shared, **{name: own.to(like) for name, own in self._constants.items()}}.items():
            module.register_buffer(self._prefix + name, value, persistent=False)
        if self._where.place.side == "in":
            module.register_forward_pre_hook(self.before, with_kwargs=True)
        else:
            module.register_forward_hook(self.after)

    def fill(self, served: Served) -> None:
        """What is constant of another steering of the same shape."""
        for name, value in self._of(served).items():
            getattr(self._where.place.module, self._prefix + name).copy_(value)

    def _of(self, served: Served) -> dict[str, Tensor]:
        """What no pass changes."""
        known: dict[str, Tensor] = {}
        for number, stage in enumerate(served.stages.get(self._site, ())):
            known |= {f"{name}_{number}": own for name, own in stage.tensors().items()}
        for column, score in self._scores:
            known |= {f"weight_{column}": score.weight, f"numbers_{column}": score.numbers()}
        return known

    def after(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The edited output."""
        activation, beside = self._where.opened(output)
        edited = self._edited(module, activation, beside)
        return edited if isinstance(output, Tensor) else (edited, *output[1:])

    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The edited arguments."""
        place, name = self._where.argument
        beside = None
        if self._where.rest == "sum":
            at, key = self._where.residual
            beside = kwargs.get(key, args[at] if at < len(args) else None)
        if name in kwargs:
            return args, {**kwargs, name: self._edited(module, kwargs[name], beside)}
        return (*args[:place], self._edited(module, args[place], beside), *args[place + 1 :]), kwargs

    def _edited(self, module: nn.Module, activation: Tensor, beside: Tensor | None) -> Tensor:
        """The activation, or the part of it that is at hand, after the edit; where no strength is, as it was."""
        self.fired = True
        if activation.shape[-1] != self._size:
            raise ShapeError(
                f"site {self._site!r}: the activation has {activation.shape[-1]} features, the vector {self._size}; is "
                "it of another model, or does each process of a tensor-parallel group hold a part of the features?"
            )
        own: Callable[[str], Tensor] = lambda name: getattr(module, self._prefix + name)  # noqa: E731
        if activation.dim() != 2 and (activation.dim() != 3 or activation.shape[0] != 1):
            raise ShapeError(
                f"site {self._site!r}: expected an activation of shape (tokens, features), got {activation.dim()} "
                "dimensions, as heads or streams have; steer the module around it"
            )
        part = activation.flatten(0, -2)
        count = part.shape[0]
        rows = part.float() if beside is None else part.float() + beside.flatten(0, -2).float()
        for column, score in self._scores:
            self._decide(own, rows, column, score)
        if not self._stages:
            return activation
        strengths = own("strengths")[:count]
        if silent := [site for site in self.asks if not self._others[site].fired]:
            raise GateError(
                f"site {self._site!r}: its gate reads {silent[0]!r}, which runs later; read at the steered site or at "
                "an earlier one"
            )
        for place, tree in self._gates:
            weight = weight_of(tree, own("decisions")[:count])
            is_gated = torch.arange(strengths.shape[1], device=strengths.device) == place
            strengths = torch.where(is_gated, strengths * weight[:, None], strengths)
        if self._adds_only:
            return (part + (strengths @ own("adds_0")).to(part.dtype)).view(activation.shape)
        edited = rows
        for number, concept in self._stages:
            if concept is None:
                edited = edited + strengths @ own(f"adds_{number}")
            else:
                read = torch.addmm(own(f"offsets_{number}"), edited, own(f"reads_{number}").T)
                edited = edited + (strengths[:, concept, None] * read) @ own(f"adds_{number}")
        if beside is not None:
            edited = part.float() + (edited - rows)
        return edited.to(part.dtype).view(activation.shape)

    def _decide(self, own: Callable[[str], Tensor], rows: Float[Tensor, "n d"], column: int, score: Score) -> None:
        """Write what a gate decides of the tokens, where the sites that it is for find it."""
        weight, numbers, count = own(f"weight_{column}"), own(f"numbers_{column}"), rows.shape[0]
        decisions = own("decisions")[:count, column]
        if score.per == "token":
            decisions.copy_(score.weights(rows, weight, numbers))
            return
        slots, shares = own("slots")[:count], own("shares")[:count, 0 if score.per == "sequence" else 1]
        held = own("held")[:, column]
        read = rows.new_zeros(held.shape[0], rows.shape[1]).index_add_(0, slots, rows * shares[:, None])
        held.copy_(torch.where(own("fresh"), score.weights(read, weight, numbers), held))
        decisions.copy_(held[slots])


def leaves_of(tree: Tree) -> set[int]:
    """The places of the scores that a gate reads."""
    return {tree} if isinstance(tree, int) else set().union(*map(leaves_of, tree[1]))


def weight_of(tree: Tree, decisions: Float[Tensor, "n L"]) -> Float[Tensor, " n"]:
    """What a gate decides of each token."""
    if isinstance(tree, int):
        return decisions[:, tree]
    combined: Tensor = tree[0].combine([weight_of(inner, decisions) for inner in tree[1]])
    return combined
