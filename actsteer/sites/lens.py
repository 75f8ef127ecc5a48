"""Lens: reads the activation out of what a module takes or gives, and writes an edited one back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from actsteer.errors import OutputError, ShapeError, StrengthError
from actsteer.sites.axes import Layout, RowsBy
from actsteer.sites.containers import Arguments, get, locate, put
from actsteer.sites.features import check_within
from actsteer.sites.place import Place
from actsteer.sites.shards import full, full_shape, is_parallel, own_part, share, whole_rows

_is_compiling = torch.compiler.is_compiling
_KEPT = 256  # shapes of one site; a generation without a cache has one for each of its steps


@final
class Lens:
    """Where the activation of one site lies, and how.

    What depends on the activation's shape alone is found once for each shape.

    Args:
        place: the module, its side, the tensor in it, and which of its features.
        layout: what the module's class says of the axes.
        size: how many features there must be, if that is known.
    """

    def __init__(self, place: Place, layout: Layout, *, size: int | None = None) -> None:
        self.place, self.layout = place, layout
        self._size = size
        self._frames: dict[tuple[tuple[int, ...], bool], Frame] = {}

    def read(self, module: nn.Module, value: Any) -> View:
        """The activation in a module's output or its `Arguments`.

        Raises:
            OutputError: there is none, or several could be meant.
            ShapeError: its feature axis has another size, or cannot be known.
        """
        return View(self, module, value)

    def heard(self, module: nn.Module, args: tuple[Any, ...], last: Any) -> View:
        """As `read`, of what a hook is called with: `last` is the output or, at an input, the keyword arguments."""
        return self.read(module, Arguments(args, last) if self.place.side == "in" else last)

    def frame(self, shape: tuple[int, ...], *, packed: bool = False) -> Frame:
        """The axes of an activation of this shape; `packed`: its rows are those of a `PackedSequence`."""
        if _is_compiling():  # which would guard on what is kept
            return self._found(shape, packed)
        key = (shape, packed)
        if key not in self._frames:
            if len(self._frames) >= _KEPT:
                self._frames.clear()
            self._frames[key] = self._found(shape, packed)
        return self._frames[key]

    @property
    def output_axis(self) -> int | None:
        """The feature axis from the end, where the output is the activation itself; None where it may not be."""
        axis, place = self.layout.axis, self.place
        if axis is None or axis >= 0 or place.side != "out" or place.path or _conversion(place.module) is not None:
            return None
        return axis if place.features is None else None

    def narrowed(self, whole: Float[Tensor, "*whole"], *, axis: int) -> Float[Tensor, "*part"]:
        """A view of the features that are meant, which lie on this axis."""
        if self.place.features is None:
            return whole
        start, stop = self.place.features
        return whole.narrow(axis, start, stop - start)

    def widened(self, part: Float[Tensor, "*part"], *, whole: Float[Tensor, "*whole"], axis: int) -> Tensor:
        """The inverse of `narrowed`: a copy of the whole with other numbers in the place of the part."""
        if self.place.features is None:
            return part
        return torch.slice_scatter(whole, part, axis, *self.place.features)

    def _found(self, shape: tuple[int, ...], packed: bool) -> Frame:
        site, layout, part = self.place.site, self.layout, self.place.size
        axis = layout.feature_axis(shape, size=self._size if part is None else None, site=site)
        if part is not None:
            check_within(self.place, shape[axis])
            shape = (*shape[:axis], part, *shape[axis + 1 :])
        rows, tokens = (None, None) if packed else layout.rows_and_tokens(shape, axis, site=site)
        return Frame(site, shape, axis, rows, tokens, layout.rows_by, layout.is_step)


@final
class View:
    """The activation in one value, of which the rest stays as it is."""

    __slots__ = ("_conversion", "_keys", "_lens", "_local", "_module", "_value", "frame", "part", "raw")

    def __init__(self, lens: Lens, module: nn.Module, value: Any) -> None:
        self._lens, self._module, self._value = lens, module, value
        self._conversion = _conversion(module)
        self._keys = locate(lens.place, value)
        self.raw: Tensor = get(value, self._keys)
        """The tensor as it lies in the value."""

    @property
    def packed(self) -> PackedSequence | None:
        """The `PackedSequence` that holds the activation, if one does."""
        holder = get(self._value, self._keys[:-1]) if self._keys else None
        return holder if isinstance(holder, PackedSequence) else None

    @property
    def is_whole(self) -> bool:
        """Of an open one, whether it is plain, and this process is known to hold all of it."""
        return not self._keys and self.is_bare

    @property
    def is_bare(self) -> bool:
        """Of an open one, whether `part` is `raw`, and all of the activation, whatever it lies in."""
        ordinary = self.raw.__class__ is Tensor and not self.raw.is_nested and self._conversion is None
        all_of_it = self._lens.place.features is None and self.part.shape == self.frame.shape
        return ordinary and all_of_it and not is_parallel(self._module) and self.packed is None

    def rows(self) -> list[tuple[Float[Tensor, "*shape d"], Frame]]:
        """The whole activation, gathered from all processes, with the features last, and its frame as it lay before.

        Of a nested one each row, as a batch of one.

        Raises:
            OutputError: the processes hold different plain tensors.
        """
        found = []
        for part in [row[None] for row in self.raw.unbind()] if self.raw.is_nested else [self.raw]:
            whole = self._converted(full(part, self._module, site=self._lens.place.site))
            frame = self._lens.frame(tuple(whole.shape), packed=self.packed is not None)
            found.append((self._lens.narrowed(whole, axis=frame.axis).movedim(frame.axis, -1), frame))
        return found

    def open(self) -> View:
        """This view with `part`: of what this process holds, a nested one filled up with zeros, the features that are
        meant; and `frame`, that of all processes' parts together.

        Raises:
            OutputError: a nested activation that cannot be filled up.
        """
        self._local = _padded(self._converted(self.raw), site=self._lens.place.site)
        shape = full_shape(self._local, self._module)
        self.frame = self._lens.frame(shape, packed=self.packed is not None)
        self.part = self._lens.narrowed(self._local, axis=self.frame.axis)
        return self

    def share(self, shift: Tensor) -> Tensor:
        """What is added to `part`, of what is added to the whole."""
        return share(shift, self._local, self._module)

    def features_last(self) -> Tensor:
        """All features of the rows of `part`, on the last axis."""
        axis = self.frame.axis
        return self._lens.narrowed(whole_rows(self._local, self._module), axis=axis).movedim(axis, -1)

    def part_of(self, edited: Tensor) -> Tensor:
        """The inverse of `features_last`, in the dtype of `part`."""
        return own_part(edited.movedim(-1, self.frame.axis).to(self.part.dtype), self._local, self._module)

    def write(self, part: Tensor) -> Any:
        """The value with another `part`; the rest of the features, if there is one, is copied."""
        tensor = _unpadded(self._lens.widened(part, whole=self._local, axis=self.frame.axis), self.raw)
        return self.write_raw(tensor if self._conversion is None else self._conversion.revert(tensor))

    def write_raw(self, tensor: Tensor) -> Any:
        """The value with another tensor in the place of `raw`."""
        return put(self._value, self._keys, tensor)

    def _converted(self, tensor: Tensor) -> Tensor:
        converted: Tensor = tensor if self._conversion is None else self._conversion.convert(tensor)
        return converted


@dataclass(frozen=True)
class Frame:
    """The axes of an activation of a whole shape: of its features, of its rows (None: it has none), and of its tokens
    (None: it has none, or they cannot be told)."""

    site: str
    shape: tuple[int, ...]
    axis: int
    row_axis: int | None
    token_axis: int | None = None
    rows_by: RowsBy = "first"
    is_step: bool = False

    @property
    def rows_and_length(self) -> tuple[int, int]:
        """The rows and positions of an activation that has axes of both.

        Raises:
            ShapeError: it has others.
        """
        if self.row_axis is None or self.token_axis is None or self.row_axis == self.axis:
            told = "there are none" if len(self.shape) < 3 else "the positions cannot be told"
            hint = f"pass token_axis={{{self.site!r}: 1}} or another one, or " if len(self.shape) > 2 else ""
            raise ShapeError(
                f"site {self.site!r}: expected an activation of shape (rows, positions, d), got {self.shape}, in which "
                f"{told}; {hint}steer another site, or all positions"
            )
        return self.shape[self.row_axis], self.shape[self.token_axis]

    def check_rows(self, rows: int | None) -> None:
        """Raise ShapeError if the rows, of which there are so many, may lie on another axis."""
        if self.row_axis is None or len(self.shape) < 3 or self.rows_by == "told":
            return
        others = [size for axis, size in enumerate(self.shape) if axis not in (self.axis, self.row_axis)]
        count, is_open = self.shape[self.row_axis], self.rows_by == "open" and len(self.shape) == 3 and self.is_last
        if (not is_open and rows in (None, count)) or (is_open and rows == count and rows not in others):
            return
        why = f"the call has {rows} rows" if not is_open else "the model has modules with batch_first=False"
        raise ShapeError(
            f"site {self.site!r}: the activation has shape {self.shape}, {why}, and it cannot be told which axis holds "
            f"the rows; pass row_axis={{{self.site!r}: 1}} or another one"
        )

    @property
    def is_last(self) -> bool:
        """Whether the features are on the last axis."""
        return self.axis == len(self.shape) - 1

    def rows_first(self, last: Float[Tensor, "*shape d"]) -> Float[Tensor, "rows *others d"] | None:
        """An activation whose features are last already, with the rows first; None if it has no axis of rows."""
        if self.row_axis is None or self.row_axis == self.axis:
            return None
        return last.movedim(self.row_axis - (self.row_axis > self.axis), 0)

    @property
    def order(self) -> tuple[int, ...]:
        """The axes of an activation whose features are last in the order of rows, tokens, any others, and features."""
        known = (self.row_axis, self.token_axis) if self.row_axis != self.axis else ()
        first = [own - (own > self.axis) for own in known if own is not None]
        return (*first, *(own for own in range(len(self.shape)) if own not in first))

    def vectors(self, delta: Float[Tensor, "*B d"], *, copies: int = 1) -> Tensor:
        """(d,) on the axis of the features; or (B, d), one per row, on that and the axis of the rows."""
        shape = [1] * len(self.shape)
        shape[self.axis] = delta.shape[-1]
        if delta.ndim == 1:
            return delta.reshape(shape)
        where = self._row_axis_for(delta.shape[0], copies)
        rows = delta if delta.shape[0] == self.shape[where] else delta.repeat_interleave(copies, dim=0)
        shape[where] = len(rows)
        return (rows if where < self.axis else rows.T).reshape(shape)

    def by_row(self, weights: Shaped[Tensor, " B"], *, copies: int = 1) -> Tensor:
        """(B,) on the axis of the rows; each serves all the copies that were made of its row.

        Raises:
            StrengthError: another number of rows.
        """
        where = self._row_axis_for(len(weights), copies)
        rows = weights if len(weights) == self.shape[where] else weights.repeat_interleave(copies)
        shape = [1] * len(self.shape)
        shape[where] = len(rows)
        return rows.reshape(shape)

    def by_token(self, weights: Shaped[Tensor, "B S"], *, rows: int) -> Tensor | None:
        """(B, S), or (1, S) for all of so many rows, on the axes of the rows and positions; None where there are no
        such axes, or they cannot be told."""
        if self.row_axis is None or self.row_axis == self.axis or len(self.shape) < 2:
            return None
        length = weights.shape[1]
        shape = [1] * len(self.shape)
        if len(self.shape) == 2 and self.shape[self.row_axis] == rows * length:  # the tokens of all rows in a line
            shape[self.row_axis] = rows * length
            return weights.expand(rows, length).reshape(shape)
        where = self.token_axis
        if where is None or self.shape[self.row_axis] != rows or self.shape[where] != length:
            return None
        shape[self.row_axis], shape[where] = len(weights), length
        return (weights if self.row_axis < where else weights.T).reshape(shape)

    @cached_property
    def placed(self) -> dict[torch.Size, tuple[int, ...]]:
        """Shape of weights, (B,) or (B, S) -> the shape in which they lie on the activation's axes."""
        found: dict[torch.Size, tuple[int, ...]] = {}
        if self.row_axis is not None and self.row_axis != self.axis and len(self.shape) > 1:
            rows = [size if axis == self.row_axis else 1 for axis, size in enumerate(self.shape)]
            found[torch.Size([self.shape[self.row_axis]])] = tuple(rows)
            if self.token_axis is not None and self.row_axis < self.token_axis:
                both = [size if axis == self.token_axis else rows[axis] for axis, size in enumerate(self.shape)]
                found[torch.Size([self.shape[self.row_axis], self.shape[self.token_axis]])] = tuple(both)
        return found

    def check_tokens(self, rows: int, length: int) -> None:
        """Raise ShapeError if the activation has no axes of so many rows and tokens."""
        where = self.token_axis
        if where is None or self.row_axis is None or self.shape[where] != length or self.shape[self.row_axis] != rows:
            self.needs_tokens(torch.ones(1, length), rows=rows)

    def needs_tokens(self, weights: Shaped[Tensor, "B S"], *, rows: int) -> Tensor:
        """As `by_token`.

        Raises:
            ShapeError: the activation has no such axes.
        """
        placed = self.by_token(weights, rows=rows)
        if placed is None:
            raise ShapeError(
                f"site {self.site!r}: {rows} rows of {weights.shape[1]} positions, and an activation of shape "
                f"{self.shape}, in which they cannot be told; pass row_axis= or token_axis=, or steer a site whose "
                "activation has the shape (rows, positions, d), or all positions"
            )
        return placed

    def _row_axis_for(self, count: int, copies: int) -> int:
        axis = self.row_axis
        if axis is None or axis == self.axis or len(self.shape) < 2 or self.shape[axis] not in (count, count * copies):
            where = "are packed" if axis is None else f"are on axis {axis}"
            raise StrengthError(
                f"site {self.site!r}: {count} rows of strength or gate against an activation of shape {self.shape} "
                f"whose rows {where}; give one strength per row"
            )
        return axis


def packed_rows(packed: PackedSequence) -> Int[Tensor, " n"]:
    """The row of the batch from which every element is."""
    rows = torch.cat([torch.arange(int(size)) for size in packed.batch_sizes])
    return rows if packed.sorted_indices is None else packed.sorted_indices.cpu()[rows]


def _conversion(module: nn.Module) -> Any:
    """How users of TransformerLens see the activation of a hook point; None for any other module."""
    own, kind = module.__dict__, type(module)  # which say so at once; a module is slow to say that it lacks a name
    return own.get("hook_conversion", getattr(kind, "hook_conversion", None))


def _padded(activation: Tensor, *, site: str) -> Tensor:
    """A nested activation as an ordinary one, filled up with zeros; any other as it is.

    Raises:
        OutputError: a jagged one with holes, or whose ragged axis is not the second.
    """
    if activation.is_nested and activation.layout is torch.jagged:
        jagged: Any = activation
        if jagged._ragged_idx != 1 or jagged.lengths() is not None:
            raise OutputError(
                f"site {site!r}: expected a nested tensor of shape (rows, ragged, ...) without holes; choose a module "
                "before it was transposed or narrowed"
            )
    return torch.nested.to_padded_tensor(activation, 0.0) if activation.is_nested else activation


def _unpadded(activation: Tensor, like: Tensor) -> Tensor:
    """The inverse of `_padded`, in the layout of the nested tensor that it was made from."""
    if not like.is_nested:
        return activation
    parts = [row[tuple(map(slice, member.shape))] for row, member in zip(activation, like.unbind(), strict=True)]
    if like.layout is torch.jagged:
        offsets: Tensor = like.offsets()  # type: ignore[attr-defined]
        return torch.nested.nested_tensor_from_jagged(torch.cat(parts), offsets)
    return torch.nested.as_nested_tensor(parts)
