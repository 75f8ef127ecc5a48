"""AtSites: a gate of its own at each steered site."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from os import PathLike
from typing import Any, final

from actsteer.errors import SiteNotFoundError, close_names
from actsteer.steering.alone import load_gate, save_gate
from actsteer.steering.gates.gate import AnyGate, Per, leaves
from actsteer.steering.gates.probe_above import ProbeAbove
from actsteer.steering.gates.soft import Soft
from actsteer.vectors.vector import SteeringVector


@final
class AtSites:
    """Steered site -> the gate that decides there, which may read there or at an earlier site.

    Args:
        gates: a gate for each site that is steered; one for a site that is not steered is not asked.

    Raises:
        TypeError: no gates, or something that is none.
        SiteNotFoundError: by a Steerer, a steered site for which there is none.

    >>> import torch
    >>> from torch import nn
    >>> from actsteer import ProjectionAbove, Steerer
    >>> v = SteeringVector({"0": torch.ones(1), "1": torch.ones(1)})
    >>> gate = AtSites({site: ProjectionAbove(v.select(site), t) for site, t in [("0", 2.0), ("1", 3.0)]})
    >>> with Steerer(nn.Sequential(nn.Identity(), nn.Identity()), v, gate=gate) as steerer:
    ...     steerer.model(torch.tensor([[1.5], [2.5]]))
    tensor([[1.5000],
            [4.5000]])
    """

    def __init__(self, gates: Mapping[str, AnyGate]) -> None:
        if not isinstance(gates, Mapping) or not gates:
            raise TypeError(f"expected a mapping site -> gate with one site or more, got {gates!r}")
        for gate in gates.values():
            list(leaves(gate))
        self._gates = dict(gates)

    @classmethod
    def soft(cls, vector: SteeringVector, *, per: Per | None = "token") -> AtSites:
        """The weight σ(h · w + b) at every site of a vector, which reads where it steers.

        `LogisticDirection` fits w and b of all sites in one call, from rows that are to be steered (positive) and rows
        that are to stay (negative), also in a stream; `WhitenedMeanDifference` from statistics, which merge. Where the
        paper takes principal components, these take ‖w‖² / 2 in the loss, and a shrunk covariance. `-w` gives one minus
        the weight.

        Args:
            vector: the weights w, with "offset SITE" in the metadata for the b of each site.
            per: what each gate reads, as for `ProbeAbove`.

        Raises:
            ValueError: the metadata has no offset of a site.

        Source: dynamically scaled activation steering (DSAS), Ferrando et al. 2025 (arXiv 2512.03661).

        >>> import torch
        >>> from torch import nn
        >>> from actsteer import LogisticDirection, Steerer, fit
        >>> model, steered, kept = nn.Sequential(nn.Identity()), torch.full((9, 2), 5.0), torch.full((9, 2), -5.0)
        >>> probe = LogisticDirection(streamed=True)
        >>> w = fit(model, positive=steered, negative=kept, sites="0", estimator=probe, progress=False)
        >>> with Steerer(model, SteeringVector({"0": torch.tensor([0.0, 1.0])}), gate=AtSites.soft(w)):
        ...     model(torch.tensor([[5.0, 5.0], [0.0, 0.0], [-5.0, -5.0]]))[:, 1].round(decimals=1)
        tensor([ 6.0000,  0.5000, -5.0000])
        """
        return cls({site: Soft(ProbeAbove(vector.select(site), per=per)) for site in vector})

    @property
    def sites(self) -> tuple[str, ...]:
        """The steered sites for which there is a gate."""
        return tuple(self._gates)

    def at(self, site: str) -> AnyGate:
        """The gate of one steered site.

        Raises:
            SiteNotFoundError: there is none.
        """
        if site not in self._gates:
            near = close_names(site, self._gates)
            raise SiteNotFoundError(f"no gate for the steered site {site!r}; leave it out with sites=. {near}")
        return self._gates[site]

    def saved(self) -> dict[str, Any]:
        """What it is made with; see `Saved`."""
        return {"gates": dict(self._gates)}

    save = save_gate

    @classmethod
    def load(cls, path: str | PathLike[str], *, kinds: Iterable[type] = ()) -> AtSites:
        """Read what `save` wrote; `kinds` are your own classes, of which it may be made."""
        return load_gate(cls, path, kinds=kinds)

    def __repr__(self) -> str:
        return f"AtSites({self._gates!r})"
