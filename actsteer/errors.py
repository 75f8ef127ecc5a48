"""The errors of steering. Catch `ActsteerError`, or the built-in kind that an error resembles; an argument of a wrong
type or range is a plain TypeError or ValueError.

ActsteerError
├── SiteNotFoundError        (LookupError)   no module, or no direction, has this name
├── ConceptNotFoundError     (LookupError)   the bank has no such concept
├── ShapeError               (ValueError)    a size, rank, dtype or feature axis that does not fit
├── ZeroDirectionError       (ValueError)    a direction of norm zero where one is needed
├── StrengthError            (ValueError)    a strength c that cannot be applied
├── BatchError               (ValueError)    batches that cannot be fed to the model
│   └── InputError           (RuntimeError)  a batch whose width or dtype a module of the model refuses
├── LossError                (ValueError)    a loss that cannot be minimised
├── StatisticsError          (ValueError)    statistics that lack what is asked of them
├── FileFormatError          (ValueError)    a file that is corrupt, foreign or of a newer version
├── ModelMismatchError       (ValueError)    a vector that was made for another model
├── NotFoldable              (ValueError)    a steering that the weights cannot carry
├── OutputError              (TypeError)     a module's output in which no activation can be found
├── UnsupportedModelError    (TypeError)     a model in which hooks would be ignored, or without derivatives
├── AttachedError            (RuntimeError)  attach on a Steerer that is attached already
├── DistributedError         (RuntimeError)  a process of a group that failed, or has other statistics
├── GateError                (RuntimeError)  a gate that has not seen its site yet, or whose weights are no numbers
├── PositionsError           (RuntimeError)  positions that cannot be known in a forward pass
└── SteeringNotApplied       (RuntimeError)  the model ran, and an edit did not
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ActsteerError(Exception):
    """The root of all errors in this library."""


class SiteNotFoundError(ActsteerError, LookupError):
    """No module, or no direction, has this name."""


class ConceptNotFoundError(ActsteerError, LookupError):
    """The bank has no such concept."""


class ShapeError(ActsteerError, ValueError):
    """A size, rank, dtype or feature axis that does not fit."""


class ZeroDirectionError(ActsteerError, ValueError):
    """A direction of norm zero where one is needed."""


class StrengthError(ActsteerError, ValueError):
    """A strength `c` that cannot be applied."""


class BatchError(ActsteerError, ValueError):
    """Batches that cannot be fed to the model."""


class InputError(BatchError, RuntimeError):
    """A batch whose width or dtype a module of the model refuses."""


class LossError(ActsteerError, ValueError):
    """A loss that cannot be minimised."""


class StatisticsError(ActsteerError, ValueError):
    """Statistics that lack what is asked of them."""


class FileFormatError(ActsteerError, ValueError):
    """A file that is corrupt, foreign, or of a newer version."""


class ModelMismatchError(ActsteerError, ValueError):
    """A vector that was made for another model."""


class NotFoldable(ActsteerError, ValueError):  # noqa: N818  (the contract's name)
    """A steering that the weights cannot carry."""


class OutputError(ActsteerError, TypeError):
    """A module's output in which no activation can be found."""


class UnsupportedModelError(ActsteerError, TypeError):
    """A model in which hooks would be ignored, or without the derivatives that are asked for."""


class AttachedError(ActsteerError, RuntimeError):
    """`attach` on a Steerer that is attached already."""


class DistributedError(ActsteerError, RuntimeError):
    """A process of a group that failed, or has other statistics than the rest."""


class GateError(ActsteerError, RuntimeError):
    """A gate that has not seen its site yet, or whose weights are no finite numbers, one per row."""


class PositionsError(ActsteerError, RuntimeError):
    """Positions that cannot be known in a forward pass."""


class SteeringNotApplied(ActsteerError, RuntimeError):  # noqa: N818  (the contract's name)
    """The model ran, and an edit did not."""


def close_names(name: str, names: Iterable[str]) -> str:
    """The end of an error message: the names nearest to one that was not found.

    >>> close_names("layers.0.mpl", ["layers.0.mlp", "head"])
    "Close names: 'layers.0.mlp'."
    """
    names = list(names)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.4)
    if close:
        return f"Close names: {', '.join(map(repr, close))}."
    shown = ", ".join(map(repr, names[:8])) + (", ..." if len(names) > 8 else "")
    return f"There are: {shown or 'none'}."
