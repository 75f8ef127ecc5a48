"""At a prompt and in a notebook: help, completion, and how things show themselves."""

import inspect
import pydoc

import pytest
import torch
from torch import nn

import actsteer
from actsteer import (
    Centroids,
    ClassStatistics,
    ConceptErasure,
    Conceptor,
    GaussianMap,
    LayerMean,
    LogisticDirection,
    MeanDifference,
    NullSpace,
    PairedMap,
    PrincipalDirection,
    RidgeDirection,
    SiteMap,
    SparseFeature,
    SteeringVector,
    VectorBank,
    WhitenedMeanDifference,
    collect,
)

V = SteeringVector({"2": torch.ones(2), "layers.0.mlp": torch.ones(3)}, concept="nine")
PUBLIC = {name: getattr(actsteer, name) for name in actsteer.__all__}


@pytest.mark.parametrize("name", PUBLIC)
def test_help_reads_as_text(name):
    """`help` shows the comment above a method that has no docstring, which may be a line between two sections."""
    text = pydoc.plain(pydoc.render_doc(PUBLIC[name]))
    assert "# ---" not in text
    if inspect.isclass(PUBLIC[name]) or inspect.isfunction(PUBLIC[name]):
        assert PUBLIC[name].__doc__


def test_help_of_a_vector_says_what_its_operators_do():
    text = pydoc.plain(pydoc.render_doc(V))
    for method in ("__add__", "__sub__", "__mul__", "__truediv__", "__neg__", "__matmul__", "__len__", "__contains__"):
        assert getattr(SteeringVector, method).__doc__.strip().splitlines()[0] in text


def test_keys_are_completed():
    stats = collect(nn.Sequential(nn.Identity()), torch.ones(2, 2), sites="0", progress=False)
    by_class = ClassStatistics({7: stats, "word": stats})
    keys = {
        V: ["2", "layers.0.mlp"],
        VectorBank({"nine": V}): ["nine"],
        stats: ["0"],
        SiteMap({"2": ("h.2", torch.eye(2))}): ["2"],
    }
    for value, expected in keys.items():
        assert value._ipython_key_completions_() == expected
        assert all(value[key] is not None for key in expected)
    assert sorted(map(str, by_class._ipython_key_completions_())) == ["7", "word"]


SHOWN = {
    "MeanDifference()": MeanDifference(),
    "LayerMean()": LayerMean(),
    "Centroids()": Centroids(),
    "WhitenedMeanDifference(shrinkage=0.5)": WhitenedMeanDifference(shrinkage=0.5),
    "WhitenedMeanDifference(shrinkage=None)": WhitenedMeanDifference(),
    "PrincipalDirection(paired=True, centred=False)": PrincipalDirection(paired=True),
    "RidgeDirection(alpha=2.0)": RidgeDirection(alpha=2.0),
    "LogisticDirection(C=2.0, paired=False, streamed=True, steps=100, tolerance=1e-08)": LogisticDirection(
        C=2.0, streamed=True
    ),
    "ConceptErasure(shrinkage=0.0, tolerance=1e-10)": ConceptErasure(),
    "Conceptor(aperture=0.5)": Conceptor(aperture=0.5),
    "GaussianMap(diagonal=True)": GaussianMap(diagonal=True),
    "PairedMap(rank=2, ridge=0.01)": PairedMap(rank=2),
    f"NullSpace(vector={V!r}, tolerance=1e-06, ridge=1e-06)": NullSpace(V),
    "SparseFeature(feature=1)": SparseFeature(torch.eye(3), feature=1),
}


@pytest.mark.parametrize(("text", "estimator"), SHOWN.items(), ids=[text.partition("(")[0] for text in SHOWN])
def test_an_estimator_shows_how_it_was_made(text, estimator):
    assert repr(estimator) == text
    if "vector" not in text and "Sparse" not in text:
        assert repr(eval(text, PUBLIC)) == text
