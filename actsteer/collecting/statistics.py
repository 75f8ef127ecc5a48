"""Statistics: the moments at every site, which merge, travel between processes, and are saved."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import final

import actsteer.html as html
from actsteer.collecting import moments_file
from actsteer.collecting.moments import Moments
from actsteer.collecting.processes import reduce
from actsteer.errors import SiteNotFoundError, StatisticsError, close_names
from actsteer.sites.shards import Group


@final
class Statistics:
    """Site -> Moments, and where they come from. A value: what is taken out of it can be updated without changing it.

    Args:
        moments: site -> moments.
        metadata: the model's fingerprint; the feature axis and the positions where they are not the usual ones.
        replicas: the ranks of the processes that saw these same rows, as in a tensor-parallel group: `all_reduce`
            counts them once.

    >>> import torch
    >>> stats = Statistics({"2": Moments.of(torch.zeros(3, 2))})
    >>> stats.sites, stats["2"].count
    (('2',), 3)
    """

    __slots__ = ("_metadata", "_moments", "_replicas")

    def __init__(
        self,
        moments: Mapping[str, Moments],
        *,
        metadata: Mapping[str, str] | None = None,
        replicas: Sequence[int] = (),
    ) -> None:
        self._moments = {site: own.copy() for site, own in moments.items()}
        self._metadata = dict(metadata or {})
        self._replicas = tuple(replicas)

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, in module order."""
        return tuple(self._moments)

    @property
    def metadata(self) -> dict[str, str]:
        """A copy of the metadata: the model's fingerprint, the feature axis where it is not the last, the positions."""
        return dict(self._metadata)

    def __getitem__(self, site: str) -> Moments:
        if site not in self._moments:
            raise SiteNotFoundError(f"no statistics for site {site!r}. {close_names(site, self._moments)}")
        return self._moments[site].copy()

    def __iter__(self) -> Iterator[str]:
        return iter(self._moments)

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._moments)

    def __len__(self) -> int:
        return len(self._moments)

    def merge(self, other: Statistics) -> Statistics:
        """The statistics of both parts together; both cover the same sites of one model.

        Raises:
            SiteNotFoundError, StatisticsError: other sites; another model, other axes or positions.
        """
        if set(self._moments) != set(other._moments):
            raise SiteNotFoundError(f"sites {self.sites} against {other.sites}; collect both parts at the same sites")
        metadata, theirs = self._beside(other), other._beside(self)
        if metadata != theirs:
            raise StatisticsError(f"{metadata} against {theirs}; collect both parts on one model, in one way")
        merged = {site: own.merge(other._moments[site]) for site, own in self._moments.items()}
        return Statistics(merged, metadata=metadata, replicas=sorted({*self._replicas, *other._replicas}))

    def all_reduce(self, group: Group = None) -> Statistics:
        """The statistics of all processes' rows together, the same on every process of the group.

        A collective call: every process makes it. Processes that saw the same rows, as tensor parallelism has them,
        count once; and so the result may be reduced again. What was loaded from a file counts on every process that has
        it. A process without any batches has a share of nothing. Outside of torch.distributed it is `self`.

        Raises:
            DistributedError: on every process, if one of them failed to collect, did not come, or came with other
                sites, another model, another covariance. A failure is final: all later calls raise it too, until the
                process group is made anew.

        >>> import torch
        >>> stats = Statistics({"2": Moments.of(torch.zeros(3, 2))})
        >>> stats.all_reduce()["2"].count  # one process
        3
        """
        own = {None: self._moments}
        reduced, metadata, ranks = reduce(own, self._metadata, self._replicas, by_class=False, group=group)
        return Statistics(reduced[None], metadata=metadata, replicas=ranks)

    def __neg__(self) -> Statistics:
        """The statistics of the negated activations."""
        return Statistics({s: -m for s, m in self._moments.items()}, metadata=self._metadata, replicas=self._replicas)

    @property
    def is_empty(self) -> bool:
        """Whether there are no rows at any site: a share of nothing."""
        return not any(own.count for own in self._moments.values())

    def _beside(self, other: Statistics) -> dict[str, str]:
        """The metadata; without rows, with the axes that the other's rows tell."""
        axes = {key: value for key, value in other._metadata.items() if key.startswith("axis ") and self.is_empty}
        return axes | self._metadata

    def save(self, path: str | PathLike[str]) -> None:
        """Write them, bit for bit, to a `.safetensors` file; atomic.

        Raises:
            FileFormatError: another suffix.
        """
        moments_file.write(path, "statistics", {None: self._moments}, {"metadata": self._metadata})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> Statistics:
        """Read what `save` wrote.

        Raises:
            FileFormatError: the file is corrupt, foreign, or of a newer version.
        """
        classes, described = moments_file.read(path, "statistics")
        return cls(classes[None], metadata=described["metadata"])

    def __repr__(self) -> str:
        return f"Statistics({self._moments})"

    def _repr_html_(self) -> str:
        rms = {s: own.rms_norm for s, own in self._moments.items() if own.kept and own.count}
        largest = max(rms.values(), default=0.0)
        rows = (
            (
                site,
                own.count,
                own.d,
                *((rms[site], html.bar(rms[site], of=largest)) if site in rms else ("", "")),
            )
            for site, own in self._moments.items()
        )
        return html.table("Statistics", ["site", "rows", "features", "rms ‖h‖", ""], rows, total=len(self))
