"""VectorBank: a library of steering vectors, an ordered map concept -> SteeringVector."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, Mapping
from os import PathLike
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

import actsteer.html as html
from actsteer.errors import (
    ConceptNotFoundError,
    ShapeError,
    SiteNotFoundError,
    ZeroDirectionError,
    close_names,
)
from actsteer.files.formats import Format
from actsteer.files.lazy import Stored
from actsteer.sites import fingerprint
from actsteer.vectors import on_disk
from actsteer.vectors.described import axes_in, with_offsets
from actsteer.vectors.stack import Stack, Vectors, read
from actsteer.vectors.vector import SteeringVector, as_float, site_norms


@final
class VectorBank:
    """An immutable, ordered map concept -> SteeringVector.

    At each site the directions of the concepts that have it are stacked, in one tensor, when they are first needed.

    Args:
        vectors: concept -> vector. Two vectors that share a site agree on its size and device there.

    Raises:
        ShapeError: two concepts disagree on a site.

    >>> bank = VectorBank({
    ...     "eight": SteeringVector({"2": torch.tensor([1.0, 0.0])}),
    ...     "nine": SteeringVector({"2": torch.tensor([1.0, 1.0])}),
    ... })
    >>> bank.combine({"eight": -1.0, "nine": 2.0})["2"]
    tensor([1., 2.])
    >>> bank.gram()
    tensor([[1., 1.],
            [1., 2.]])
    """

    __slots__ = ("_axis_keys", "_stacks", "_vectors")

    def __init__(self, vectors: Mapping[str, SteeringVector]) -> None:
        if not isinstance(vectors, Mapping):
            raise TypeError(f"a bank is made of a mapping concept -> SteeringVector, got {type(vectors).__name__}")
        for concept, vector in vectors.items():
            if not (isinstance(concept, str) and isinstance(vector, SteeringVector)):
                raise TypeError(f"a bank maps str to SteeringVector, got {concept!r}: {type(vector).__name__}")
        self._take(vectors)

    @classmethod
    def _of(cls, vectors: Mapping[str, SteeringVector | Stored]) -> VectorBank:
        """A bank some of whose vectors are still in a file."""
        bank = cls.__new__(cls)
        bank._take(vectors)
        return bank

    def _take(self, vectors: Mapping[str, SteeringVector | Stored]) -> None:
        self._vectors: Vectors = dict(vectors)
        self._stacks: dict[str, Stack] = {}  # site -> the directions there
        self._axis_keys: frozenset[str] | None = None  # of the metadata, once they were asked for
        for place, (concept, vector) in enumerate(self._vectors.items()):
            for site, size, device in _sizes(vector):
                stack = self._stacks.get(site)
                if stack is None:
                    stack = self._stacks[site] = Stack(self._vectors, site, size=size, device=device)
                if stack.size != size or stack.device != device:
                    raise ShapeError(
                        f"site {site!r}: {stack.names[0]!r} has {stack.size} features on {stack.device}, {concept!r} "
                        f"{size} on {device}; a bank holds vectors of one model, on one device"
                    )
                stack.add(place, concept)

    # --- reading -------------------------------------------------------------------------------------------------
    @property
    def concepts(self) -> tuple[str, ...]:
        """The concepts, in the order given."""
        return tuple(self._vectors)

    @property
    def sites(self) -> tuple[str, ...]:
        """Every site of every vector, in order of first appearance."""
        return tuple(self._stacks)

    def __getitem__(self, concept: str) -> SteeringVector:
        """The vector of a concept."""
        self._known(concept)
        return read(self._vectors, concept)

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __contains__(self, concept: object) -> bool:
        """Whether there is a vector of this concept."""
        return concept in self._vectors

    def _ipython_key_completions_(self) -> list[str]:
        return list(self._vectors)

    def items(self) -> ItemsView[str, SteeringVector]:
        """The pairs (concept, vector)."""
        return {concept: self[concept] for concept in self._vectors}.items()

    def __repr__(self) -> str:
        return f"VectorBank(concepts={self.concepts}, sites={self.sites})"

    def _repr_html_(self) -> str:
        first = self.select(*self.concepts[: html.SHOWN])  # no more than these are read
        norms = {concept: site_norms(vector) for concept, vector in first.items()}
        rows = [
            (concept, float(first[concept].norm()), html.bars(list(own.values()), list(own)))
            for concept, own in norms.items()
        ]
        said = f"VectorBank of {len(self)} concept{'s' * (len(self) != 1)}"
        shown = [html.table(said, ["concept", "norm", "norm at each site"], rows, total=len(self))]
        present = first.select(*(concept for concept, own in norms.items() if any(own.values())))
        if len(present) > 1:
            shown.append(html.matrix("cosines", present.concepts, present.cosines().tolist()))
        return html.beside(*shown)

    def __or__(self, other: VectorBank) -> VectorBank:
        """Both banks in one; where both have a concept, the right one's vector stands, as in a dict."""
        if not isinstance(other, VectorBank):
            return NotImplemented
        return VectorBank._of(self._vectors | other._vectors)

    def select(self, *concepts: str) -> VectorBank:
        """The bank of these concepts alone, in this order."""
        for concept in concepts:
            self._known(concept)
        return VectorBank._of({concept: self._vectors[concept] for concept in concepts})

    # --- algebra -------------------------------------------------------------------------------------------------
    def combine(self, strengths: Mapping[str, float]) -> SteeringVector:
        """The linear combination sum_k c_k v_k, one product per site; a concept that is not named counts as zero.

        Raises:
            ConceptNotFoundError: a concept that the bank lacks.
        """
        chosen = self if list(strengths) == list(self._vectors) else self.select(*strengths)
        c = torch.tensor([as_float(strength) for strength in strengths.values()], dtype=torch.float64)
        combined: dict[str, Tensor] = {}
        for site, stack in chosen._stacks.items():
            rows = stack.rows()
            own = c if len(rows) == len(c) else c[stack.concepts]
            combined[site] = own.to(rows) @ rows
        return SteeringVector(combined, metadata=axes_of_bank(chosen, chosen.sites))

    def directions(self, site: str) -> Float[Tensor, "k d"]:
        """The directions of all concepts at one site, stacked in bank order; zero where a vector lacks the site."""
        stack = stack_of(self, site)
        rows = stack.rows()
        if len(rows) == len(self):
            return rows.clone()
        directions = rows.new_zeros(len(self), stack.size)
        directions[stack.concepts] = rows
        return directions

    def gram(self) -> Float[Tensor, "k k"]:
        """The inner products G_ij = v_i @ v_j: positive semi-definite, and how far the concepts interfere."""
        rows = self._rows()
        return rows @ rows.T

    def cosines(self) -> Float[Tensor, "k k"]:
        """The cosines of the angles between the concepts, in [-1, 1]; ZeroDirectionError if a vector is zero.

        Computed in the vectors' dtype, or in float32 where that is narrower.
        """
        rows = self._rows()
        wide = torch.promote_types(rows.dtype, torch.float32)
        largest = torch.nn.functional.pad(rows, (0, 1)).abs().amax(dim=1, keepdim=True)  # a bank may have no sites
        for concept, size in zip(self._vectors, largest.flatten().tolist(), strict=True):
            if size == 0.0:
                raise ZeroDirectionError(f"concept {concept!r} is zero, and a zero vector has no angle; leave it out")
        unit = rows.to(wide) / largest.to(wide)  # no square of these overflows, or vanishes
        unit /= torch.linalg.vector_norm(unit, dim=1, keepdim=True, dtype=torch.float64).to(wide)
        cosines = (unit @ unit.T).clamp_(-1.0, 1.0)
        return cosines.fill_diagonal_(1.0).to(rows.dtype)

    def orthogonalize(self) -> VectorBank:
        """Gram-Schmidt in bank order: u_k = v_k less its components along the earlier vectors; the same span.

        The lengths are not normalised. Computed as the QR factorisation, u_k = r_kk q_k, in float64.

        Raises:
            ZeroDirectionError: a vector that is zero, or that lies in the span of the earlier ones.
        """
        rows = self._rows()
        q, r = torch.linalg.qr(rows.double().T)
        tolerance = 10 * torch.finfo(rows.dtype).eps * rows.double().norm(dim=1)
        for index, concept in enumerate(self._vectors):
            if index >= len(r) or bool(r[index, index].abs() <= tolerance[index]):
                raise ZeroDirectionError(
                    f"concept {concept!r} is zero or lies in the span of the concepts before it; leave it out"
                )
        residuals = (q * r.diagonal()).T.to(rows.dtype)
        sizes = {site: stack.size for site, stack in self._stacks.items()}
        return VectorBank(
            {
                concept: SteeringVector(
                    dict(zip(sizes, residual.split(list(sizes.values())), strict=True)),
                    metadata=with_offsets(vector.metadata, {}),
                )
                for residual, (concept, vector) in zip(residuals, self.items(), strict=True)
            }
        )

    def _rows(self) -> Float[Tensor, "k total"]:
        """Each vector as one row, all its sites side by side; not to be written into."""
        stacks = list(self._stacks.values())
        if not stacks:
            return torch.zeros(len(self), 0)
        if len(stacks) == 1 and len(stacks[0].concepts) == len(self):
            return stacks[0].rows()
        return torch.cat([self.directions(site) for site in self._stacks], dim=1)

    # --- files ---------------------------------------------------------------------------------------------------
    def save(
        self,
        path: str | PathLike[str],
        *,
        model: nn.Module | None = None,
        layer_offset: int = 0,
        format: Format | None = None,  # noqa: A002
    ) -> None:
        """Write the bank to a file; the suffix chooses the format.

        `.safetensors` keeps everything, bit for bit. `.gguf` is the control vector of llama.cpp and repeng: one vector,
        in float32, at the outputs of blocks, from the second one on, which it knows by their numbers.

        There is always a whole file: a temporary one beside it takes its place at the end. A link stays a link, and the
        file keeps its mode. Temporary files that killed processes have left in the folder are removed.

        Args:
            model: the model that the vectors are for, which the file then names; without it, the metadata's.
            layer_offset: what to add to the number of a block, for readers who count otherwise than llama.cpp.
            format: a format of your own, in the place of the one that the suffix chooses; see `Format`.

        Raises:
            FileFormatError: the suffix names no format, the format cannot express this, or there is a FIFO or a device.
            ModelMismatchError: a vector was made for a model of another architecture than `model`.
        """
        bank = {concept: ({s: v[s] for s in v}, v.metadata) for concept, v in self.items()}
        on_disk.write(path, bank, model=model, layer_offset=layer_offset, format=format)

    @classmethod
    def load(
        cls,
        path: str | PathLike[str],
        model: nn.Module | None = None,
        *,
        layer_offset: int = 0,
        format: Format | None = None,  # noqa: A002
    ) -> VectorBank:
        """Read what `save` wrote, and the files of others; or all files that a pattern, "dir/*.safetensors", names.

        Nothing in a file is executed, and one of ours with any altered bit is refused. A file that is replaced
        meanwhile is read whole, as it was or as it is. Of a file over 16 MB, or with more than 1000 directions, each
        vector is read, and verified, when it is asked for. A vector that knows its model, from a file or not, is
        checked when it is attached: a model of another architecture raises; one with other weights, without layers of
        a class that it had, or, of Hugging Face, with another head or vocabulary warns.

        Besides `.safetensors` and `.gguf` (llama.cpp, repeng, EasySteer) it reads `.svec` (conditional activation
        steering), the `.safetensors` of steering-lite, and `.pt` files of tensors alone (CAA, RepE, and others).

        Args:
            path: a file, or a pattern.
            model: where the file numbers the blocks of a model: the model that has names for them.
            layer_offset: what the file's numbers are above those of the blocks, counted from 0.
            format: a format of your own, in the place of the one that the suffix chooses; see `Format`.

        Raises:
            FileFormatError: a file is corrupt, of an unknown kind, or of a newer version; two have the same concept.
            SiteNotFoundError: the model has no such block.
            ModelMismatchError: the file was made for a model of another architecture.
        """
        return cls._of(on_disk.read(path, model=model, layer_offset=layer_offset, format=format))

    def _known(self, concept: str) -> None:
        if concept not in self._vectors:
            raise ConceptNotFoundError(f"no concept {concept!r} in the bank. {close_names(concept, self._vectors)}")

    def __reduce__(self) -> tuple[Any, ...]:
        return VectorBank, (dict(self.items()),)


def stack_of(bank: VectorBank, site: str) -> Stack:
    """The directions at one site, as they are stacked in the bank.

    Raises:
        SiteNotFoundError: no concept has the site.
    """
    if site not in bank._stacks:
        raise SiteNotFoundError(f"no concept has a direction at {site!r}. {close_names(site, bank.sites)}")
    return bank._stacks[site]


def axes_of_bank(bank: VectorBank, sites: Iterable[str]) -> dict[str, str]:
    """The metadata "axis SITE" of all the vectors, at these sites, as `axes_in` has it; nothing is read for it."""
    asked = {f"axis {site}" for site in sites}
    if bank._axis_keys is None:
        keys = (key for vector in bank._vectors.values() for key in metadata_of(vector) if key.startswith("axis "))
        bank._axis_keys = frozenset(keys)
    if not asked & bank._axis_keys:
        return {}
    described = (({site for site, _, _ in _sizes(vector)}, metadata_of(vector)) for vector in bank._vectors.values())
    return axes_in(described, asked)


def of_any_model(bank: VectorBank) -> VectorBank:
    """The same vectors, which do not say any more for which model they were made."""
    kept = {
        name: {key: own for key, own in v.metadata.items() if key not in fingerprint.KEYS} for name, v in bank.items()
    }
    return VectorBank({name: SteeringVector({s: v[s] for s in v}, metadata=kept[name]) for name, v in bank.items()})


def metadata_in(bank: VectorBank) -> dict[str, Mapping[str, str]]:
    """Concept -> the metadata of its vector, which is not read for it."""
    return {concept: metadata_of(vector) for concept, vector in bank._vectors.items()}


def metadata_of(vector: SteeringVector | Stored) -> Mapping[str, str]:
    """The metadata of a vector, read or not; not to be written into."""
    return vector.metadata if isinstance(vector, Stored) else vector._metadata


def _sizes(vector: SteeringVector | Stored) -> list[tuple[str, int, torch.device]]:
    """The sites, with features and device; what is in a file will be on the CPU."""
    if isinstance(vector, Stored):
        return [(site, size, _CPU) for site, size in vector.sizes.items()]
    return [(site, direction.shape[0], direction.device) for site, direction in vector._directions.items()]


_CPU = torch.device("cpu")
