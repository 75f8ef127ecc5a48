"""Values on which the laws hold exactly: eighths k/8, whose sums and products fit into a float32."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from actsteer import SteeringVector, VectorBank

SIZES = {"0": 3, "layers.4.mlp": 2, "層/ü%2F": 1, "": 2}  # site -> features: every drawn vector is of this one model
CONCEPTS = ("nine", "a/b", "100%", "a%2Fb", "層 é", "")
FLOATS = (torch.float32, torch.float64)
STORED = (torch.float16, torch.bfloat16, *FLOATS)

dtypes = st.sampled_from(FLOATS)
scalars = st.integers(-32, 32).map(lambda k: k / 8)
nonzero_scalars = scalars.filter(bool)
powers_of_two = st.sampled_from([-4.0, -1.0, -0.5, 0.25, 1.0, 2.0, 8.0])
names = st.text(st.characters(codec="utf-8"), max_size=6) | st.sampled_from(CONCEPTS)
metadata = st.dictionaries(st.sampled_from(["model", "a", "層"]), st.sampled_from(["1", "2"]), max_size=3)


def eighths(*shape: int, dtype: torch.dtype = torch.float64) -> st.SearchStrategy[Tensor]:
    """Tensors of this shape with entries k/8 in [-8, 8]."""
    count = int(torch.Size(shape).numel())
    entries = st.lists(st.integers(-64, 64), min_size=count, max_size=count)
    return entries.map(lambda ks: torch.tensor(ks, dtype=dtype).reshape(shape) / 8)


def stored(size: int, dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    """Every finite bit pattern of a dtype: subnormals, both zeros, the largest and the smallest."""
    width = size * dtype.itemsize
    patterns = st.binary(min_size=width, max_size=width).map(lambda raw: torch.tensor(list(raw), dtype=torch.uint8))
    return patterns.map(lambda raw: raw.view(dtype)).map(lambda d: torch.where(torch.isfinite(d), d, 0))


@st.composite
def vectors(draw: st.DrawFn, *, dtype: torch.dtype | None = None, min_sites: int = 0) -> SteeringVector:
    """A vector at some of the sites, in some order, possibly zero; in one dtype, or in a drawn one."""
    chosen = draw(st.lists(st.sampled_from(list(SIZES)), unique=True, min_size=min_sites))
    kind = dtype or draw(dtypes)
    return SteeringVector({s: draw(eighths(SIZES[s], dtype=kind)) for s in chosen}, metadata=draw(metadata))


def nonzero_vectors(*, dtype: torch.dtype | None = None) -> st.SearchStrategy[SteeringVector]:
    """Vectors of norm above zero."""
    return vectors(dtype=dtype, min_sites=1).filter(lambda v: any(bool(v[site].any()) for site in v))


@st.composite
def banks(draw: st.DrawFn, *, nonzero: bool = False) -> VectorBank:
    """A bank of up to five vectors in one dtype; if `nonzero`, of at least one, and none of them zero."""
    dtype = draw(dtypes)
    vector = nonzero_vectors(dtype=dtype) if nonzero else vectors(dtype=dtype)
    return VectorBank(draw(st.dictionaries(st.sampled_from(CONCEPTS), vector, min_size=int(nonzero), max_size=5)))


@st.composite
def independent_banks(draw: st.DrawFn, *, dtype: torch.dtype | None = None) -> VectorBank:
    """A bank of linearly independent, well-conditioned vectors: the rows of a unit triangular matrix, shuffled."""
    total, kind = sum(SIZES.values()), dtype or draw(dtypes)
    below = draw(eighths(total, total, dtype=kind)).tril(-1) / 8
    rows = (below + torch.eye(total, dtype=kind))[:, draw(st.permutations(range(total)))]
    concepts = draw(st.lists(st.sampled_from(CONCEPTS), unique=True, min_size=1))
    return VectorBank(
        {
            concept: SteeringVector(dict(zip(SIZES, row.split(list(SIZES.values())), strict=True)), concept=concept)
            for concept, row in zip(concepts, rows, strict=False)
        }
    )


@st.composite
def stored_banks(draw: st.DrawFn) -> VectorBank:
    """A bank with any names, any metadata, and any finite bit patterns in mixed dtypes."""
    sites = draw(st.dictionaries(names, st.integers(0, 3), max_size=3))
    bank = {}
    for concept in draw(st.lists(names, unique=True, max_size=3)):
        chosen = [site for site in sites if draw(st.booleans())]
        directions = {site: draw(stored(sites[site], draw(st.sampled_from(STORED)))) for site in chosen}
        bank[concept] = SteeringVector(directions, metadata=draw(st.dictionaries(names, names, max_size=2)))
    return VectorBank(bank)
