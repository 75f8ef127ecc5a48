"""ClassStatistics: the statistics of every class of rows, from one pass."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import reduce as fold
from os import PathLike
from typing import TypeAlias, final

import actsteer.html as html
from actsteer.collecting import moments_file
from actsteer.collecting.moments import Moments
from actsteer.collecting.processes import reduce
from actsteer.collecting.statistics import Statistics
from actsteer.errors import StatisticsError, close_names
from actsteer.sites.shards import Group

Label: TypeAlias = int | str


@final
class ClassStatistics(Mapping[Label, Statistics]):
    """Label -> Statistics, as `collect(..., by=labels)` gives them, in the order of the labels.

    Args:
        nothing: statistics of no rows, which tell the sites where no class has any: a share of nothing.

    >>> import torch
    >>> rows = torch.tensor([[1.0], [2.0], [6.0]])
    >>> stats = ClassStatistics({digit: Statistics({"2": Moments.of(row[None])}) for digit, row in enumerate(rows)})
    >>> stats[2]["2"].mean.item(), stats.rest(2)["2"].mean.item(), stats.total()["2"].count
    (6.0, 1.5, 3)
    """

    def __init__(self, classes: Mapping[Label, Statistics], *, nothing: Statistics | None = None) -> None:
        first = next(iter(classes.values()), nothing)
        if first is None:
            raise StatisticsError("expected statistics of one class or more, got none")
        self._first = first
        for label, own in classes.items():
            if own.sites != first.sites or own.metadata != first.metadata:
                raise StatisticsError(
                    f"class {label!r}: {own.sites}, {own.metadata} against {first.sites} of the first"
                )
        self._classes = {
            label: classes[label] for label in sorted(classes, key=lambda label: (str(type(label)), label))
        }

    @property
    def sites(self) -> tuple[str, ...]:
        """The names of the sites, in module order."""
        return self._first.sites

    @property
    def metadata(self) -> dict[str, str]:
        """What the classes share; see `Statistics.metadata`."""
        return self._first.metadata

    def _ipython_key_completions_(self) -> list[Label]:
        return list(self._classes)

    def __getitem__(self, label: Label) -> Statistics:
        if label not in self._classes:
            near = close_names(str(label), map(str, self._classes))
            raise StatisticsError(f"no statistics for the class {label!r}. {near}")
        return self._classes[label]

    def __contains__(self, label: object) -> bool:
        return label in self._classes

    def __iter__(self) -> Iterator[Label]:
        return iter(self._classes)

    def __len__(self) -> int:
        return len(self._classes)

    def only(self, *labels: Label) -> Statistics:
        """The rows of these classes together."""
        if not labels:
            raise StatisticsError(f"name one class or more of {list(self)}")
        return fold(Statistics.merge, (self[label] for label in dict.fromkeys(labels)))

    def rest(self, *labels: Label) -> Statistics:
        """The rows of all other classes together."""
        for label in labels:
            _ = self[label]
        if set(labels) >= set(self):
            raise StatisticsError(f"no class is left of {list(self)}")
        return self.only(*(label for label in self if label not in labels))

    def total(self) -> Statistics:
        """The rows of all classes together."""
        return self.only(*self)

    def merge(self, other: ClassStatistics) -> ClassStatistics:
        """The statistics of both parts together, class by class."""
        if not (self._classes and other._classes):
            both = self._first.merge(other._first)  # which fails unless they go together
            return ClassStatistics({**self, **other}, nothing=both)
        return ClassStatistics(
            {
                label: fold(Statistics.merge, (part[label] for part in (self, other) if label in part))
                for label in (*self, *other)
            }
        )

    def all_reduce(self, group: Group = None) -> ClassStatistics:
        """The statistics of all processes' rows together, as `Statistics.all_reduce`; each may have other classes."""
        parts = {label: own._moments for label, own in self.items()}
        replicas = self._first._replicas
        reduced, metadata, ranks = reduce(parts, self.metadata, replicas, by_class=True, group=group)
        made = {label: Statistics(own, metadata=metadata, replicas=ranks) for label, own in reduced.items()}
        return ClassStatistics(made, nothing=self._first)

    def save(self, path: str | PathLike[str]) -> None:
        """Write them, bit for bit, to a `.safetensors` file; atomic."""
        classes: dict[Label | None, Mapping[str, Moments]] = {label: own._moments for label, own in self.items()}
        moments_file.write(path, "class statistics", classes, {"metadata": self.metadata, "sites": list(self.sites)})

    @classmethod
    def load(cls, path: str | PathLike[str]) -> ClassStatistics:
        """Read what `save` wrote; errors as `Statistics.load`."""
        classes, described = moments_file.read(path, "class statistics")
        metadata = described["metadata"]
        nothing = Statistics({site: Moments.empty(0) for site in described["sites"]}, metadata=metadata)
        made = {label: Statistics(own, metadata=metadata) for label, own in classes.items() if label is not None}
        return cls(made, nothing=nothing)

    def __repr__(self) -> str:
        return f"ClassStatistics(labels={list(self)}, sites={self.sites})"

    def _repr_html_(self) -> str:
        counts = {label: max((m.count for m in own._moments.values()), default=0) for label, own in self.items()}
        largest = max(counts.values(), default=0)
        rows = ((str(label), count, html.bar(count, of=largest)) for label, count in counts.items())
        said = html.table("ClassStatistics", ["class", "rows", ""], rows, total=len(self))
        return html.beside(said, html.table("sites", ["site"], ([site] for site in self.sites), total=len(self.sites)))
