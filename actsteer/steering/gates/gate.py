"""Gate: whether, or how much, each row of the batch or each token is steered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Literal, NamedTuple, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from actsteer.errors import GateError
from actsteer.private_names import is_functorch_wrapped
from actsteer.steering.strength import without_autocast

Per: TypeAlias = Literal["sequence", "last", "token"]
"""What a gate reads: once for a sequence the mean over its prompt, or the prompt's last token; or each token anew."""


@runtime_checkable
class Gate(Protocol):
    """A decision per row or per token, read at the gate's site: the steered one, or one that runs before it.

    A class of your own that has these three members does all that ours do. With `per = "sequence"` it decides once
    for each row of the batch, from the mean over the tokens of its prompt, pads left out, and that holds for what is
    generated after it; with `per = "last"` likewise from the prompt's last token, as for a direction that was fitted
    there; with `per = "token"` it is given every token as a row. Rows come in float32 at least, outside of autocast.
    For a type checker, write `per: Literal["token"] = "token"`.

    >>> import torch
    >>> from torch import nn
    >>> from actsteer import Steerer, SteeringVector
    >>> class FirstIsPositive:
    ...     site, per = "0", "sequence"
    ...
    ...     def __call__(self, rows):
    ...         return rows[:, 0] > 0
    >>> model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.ones(2)})
    >>> with Steerer(model, v, gate=FirstIsPositive()):
    ...     model(torch.tensor([[1.0, 0.0], [-1.0, 0.0]]))
    tensor([[ 2.,  1.],
            [-1.,  0.]])
    """

    @property
    def site(self) -> str:
        """The name of the module whose activation the gate reads."""
        ...

    @property
    def per(self) -> Per:
        """Whether it decides once per "sequence" or on its "last" token, or for each "token"."""
        ...

    def __call__(self, rows: Float[Tensor, "rows d"], /) -> Tensor:
        """A bool, or a finite weight that multiplies c, per row: shape (rows,)."""
        ...


@runtime_checkable
class PreparedGate(Gate, Protocol):
    """A gate that does once whatever does not depend on the rows' numbers; optional, and faster.

    >>> import torch
    >>> from actsteer import ProjectionAbove, SteeringVector
    >>> gate = ProjectionAbove(SteeringVector({"2": torch.tensor([2.0, 0.0])}), 1.0)
    >>> isinstance(gate, PreparedGate), gate.prepare(torch.empty(0, 2))(torch.tensor([[3.0, 0.0], [0.0, 3.0]]))
    (True, tensor([ True, False]))
    """

    def prepare(self, like: Float[Tensor, "rows d"], /) -> Callable[[Float[Tensor, "rows d"]], Tensor]:
        """What `__call__` gives, as a function of rows of this dtype, device and number of features."""
        ...


@runtime_checkable
class Fitted(Protocol):
    """A gate whose vector was fitted: a Steerer checks that it was on this model, and `explain` shows where."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """The vector's metadata: "model" and the like, and "positions" where these were not all."""
        ...


@runtime_checkable
class ScoredGate(Gate, Protocol):
    """A gate that compares a number per row with a threshold; `Soft` makes a weight of the two."""

    @property
    def threshold(self) -> float:
        """The gate fires where the score exceeds it."""
        ...

    def score(self, rows: Float[Tensor, "rows d"], /) -> Float[Tensor, " rows"]:
        """The number of each row."""
        ...


@runtime_checkable
class Combination(Protocol):
    """A gate made of gates, each of which reads at its site: `And`, `Or`, `Not`, or a class of your own.

    >>> import torch
    >>> from torch import nn
    >>> from actsteer import ProjectionAbove, Steerer, SteeringVector
    >>> class Either:
    ...     def __init__(self, *gates):
    ...         self.gates = gates
    ...
    ...     def combine(self, weights):
    ...         return weights[0] ^ weights[1]
    >>> one, other = (ProjectionAbove(SteeringVector({"0": v}), 0.0) for v in torch.eye(2))
    >>> model, v = nn.Sequential(nn.Identity()), SteeringVector({"0": torch.ones(2)})
    >>> with Steerer(model, v, gate=Either(one, other)):
    ...     model(torch.tensor([[1.0, 1.0], [1.0, -1.0]]))
    tensor([[1., 1.],
            [2., 0.]])
    """

    @property
    def gates(self) -> tuple[AnyGate, ...]:
        """The gates whose decisions are combined."""
        ...

    def combine(self, weights: Sequence[Tensor], /) -> Tensor:
        """The decision, from one of each gate: bools or weights, all of one shape, (rows,) or (rows, tokens)."""
        ...


@runtime_checkable
class GatePerSite(Protocol):
    """A gate that is another one at each steered site: `AtSites`, or a class of your own; it goes wherever a gate does.

    >>> import torch
    >>> from torch import nn
    >>> from actsteer import ProjectionAbove, Steerer, SteeringVector
    >>> class Higher:
    ...     def __init__(self, v):
    ...         self.sites, self.v = v.sites, v
    ...
    ...     def at(self, site):
    ...         return ProjectionAbove(self.v.select(site), 2.0 + self.sites.index(site))
    >>> model = nn.Sequential(nn.Identity(), nn.Identity())
    >>> v = SteeringVector({"0": torch.ones(1), "1": torch.ones(1)})
    >>> with Steerer(model, v, gate=Higher(v)):
    ...     model(torch.tensor([[1.5], [2.5]]))
    tensor([[1.5000],
            [4.5000]])
    """

    @property
    def sites(self) -> tuple[str, ...]:
        """The steered sites for which it has a gate."""
        ...

    def at(self, site: str, /) -> AnyGate:
        """The gate of one steered site, which may read there or at an earlier site.

        Raises:
            SiteNotFoundError: it has none there.
        """
        ...


AnyGate: TypeAlias = Gate | Combination | GatePerSite
"""What a Steerer takes as a gate."""


class Combined(NamedTuple):
    """A combination, and what it combines at one site."""

    gate: Combination
    parts: tuple[GateTree, ...]


GateTree: TypeAlias = Gate | Combined
"""What decides at one site."""


def tree_at(gate: AnyGate, site: str) -> GateTree:
    """What decides at one steered site.

    Raises:
        SiteNotFoundError: a gate that is another one at each site has none there.
    """
    if isinstance(gate, Combination):
        return Combined(gate, tuple(tree_at(inner, site) for inner in gate.gates))
    return tree_at(gate.at(site), site) if isinstance(gate, GatePerSite) else gate


def gates_in(tree: GateTree) -> Iterator[Gate]:
    """The gates that read, in order."""
    if isinstance(tree, Combined):
        for part in tree.parts:
            yield from gates_in(part)
    else:
        yield tree


def leaves(gate: AnyGate) -> Iterator[Gate]:
    """The gates that read at a site, in order.

    Raises:
        TypeError: something that is no gate.
        ValueError: a gate whose `per` is no known word.
    """
    if isinstance(gate, type):
        raise TypeError(f"gate: expected an object, got the class {gate.__name__}; call it first")
    if isinstance(gate, Combination):
        for inner in gate.gates:
            yield from leaves(inner)
        return
    if isinstance(gate, GatePerSite):
        for site in gate.sites:
            yield from leaves(gate.at(site))
        return
    if not isinstance(gate, Gate):
        missing = [name for name in ("site", "per", "__call__") if not hasattr(gate, name)]
        raise TypeError(
            f"gate: expected one such as ProjectionAbove, with site, per and __call__(rows), got "
            f"{type(gate).__name__}, which has no {', no '.join(missing)}"
        )
    check_per(gate.per)
    yield gate


def check_per(per: str) -> None:
    """ValueError unless it is a known word."""
    if per not in get_args(Per):
        raise ValueError(f"per: expected one of {', '.join(map(repr, get_args(Per)))}, got {per!r}")


def decide(gate: Gate, rows: Float[Tensor, "rows d"]) -> Tensor:
    """The gate's decision on rows in float32 at least, outside of autocast: one bool or finite weight for each.

    Raises:
        GateError: another shape; or a number that is not finite, which is looked for on the CPU alone.
    """
    with without_autocast(rows.device.type):
        weights = gate(wide(rows))
    _check_shape(weights, gate, rows)
    check_weights(weights, gate)
    return weights


def _check_shape(weights: object, gate: Gate, rows: Tensor) -> None:
    if not isinstance(weights, Tensor) or weights.shape != rows.shape[:1]:
        got = f"shape {tuple(weights.shape)}" if isinstance(weights, Tensor) else f"a {type(weights).__name__}"
        raise GateError(
            f"gate at site {gate.site!r}: expected one weight for each of {len(rows)} rows, got {got}; return a tensor "
            "of shape (rows,)"
        )


def prepared_gate(gate: Gate, like: Float[Tensor, "rows d"]) -> Callable[[Float[Tensor, "rows d"]], Tensor]:
    """`decide` for rows such as these, with all that does not depend on their numbers done once."""
    kind = like.device.type
    if not isinstance(gate, PreparedGate) or like.dtype not in _WIDE or torch.compiler.is_compiling():
        return partial(decide, gate)
    ready, casts = gate.prepare(like), kind != "meta" and torch.amp.is_autocast_available(kind)

    _check_shape(ready(like), gate, like)

    def prepared(rows: Tensor) -> Tensor:
        if casts and torch.is_autocast_enabled(kind):
            return decide(gate, rows)
        weights = ready(rows)
        if weights.dtype is not torch.bool:
            check_weights(weights, gate)
        return weights

    return prepared


def check_weights(weights: Tensor, gate: AnyGate) -> None:
    """GateError if a weight is not finite; looked at on the CPU alone, and not in compiled code."""
    if not weights.is_floating_point() or not weights.is_cpu or torch.compiler.is_compiling():
        return
    if is_functorch_wrapped(weights):
        return
    plain = weights.detach()
    # one that is not finite shows in the sum, which is the quicker; but the sum of large ones may be infinite too
    if not (math.isfinite(float(plain.sum())) or bool(plain.isfinite().all())):
        raise GateError(
            f"gate {gate!r}: expected finite weights, got {plain.flatten().tolist()[:8]}; is the activation that it "
            "reads finite?"
        )


def wide(rows: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
    """The rows in float32 at least."""
    return rows if rows.dtype in _WIDE else rows.to(torch.float32)


_WIDE = (torch.float32, torch.float64)
