"""by=: one pass gives the statistics of every class, each token with the label of its row."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from actsteer import ActsteerError, BatchError, ClassStatistics, collect
from tests.strategies import eighths
from tests.zoo import normal, recurrent

IDENTITY = nn.Sequential(nn.Identity())
X = torch.arange(12.0).reshape(6, 2) / 8
LABELS = [4, 7, 4, 4, -1, 7]
BATCHES, PARTS = list(X.split([2, 3, 1])), [LABELS[:2], LABELS[2:5], LABELS[5:]]


def by_class(model, batches, *, by, site="0", **options):
    found = collect(model, batches, sites=site, by=by, covariance=True, **options)
    assert isinstance(found, ClassStatistics)
    return {label: own[site] for label, own in found.items()}


def agree(found, rows, labels):
    """The statistics of every class are those of its rows alone."""
    assert list(found) == sorted(set(labels), key=lambda label: (str(type(label)), label))
    for label, own in found.items():
        of_class = rows[[i for i, other in enumerate(labels) if other == label]].flatten(0, -2).double().numpy()
        assert own.count == len(of_class)
        assert_allclose(own.mean, of_class.mean(axis=0), atol=1e-12)
        centred = of_class - of_class.mean(axis=0)
        assert_allclose(own.scatter, centred.T @ centred, atol=1e-11)


# --- every form ------------------------------------------------------------------------------------------------------
ONE_EACH = {
    "list": LABELS,
    "tuple": tuple(LABELS),
    "tensor": torch.tensor(LABELS),
    "small integers": torch.tensor(LABELS, dtype=torch.int8),
    "numpy": np.array(LABELS),
    "numpy integers": list(np.array(LABELS)),
}


@pytest.mark.parametrize("labels", ONE_EACH.values(), ids=ONE_EACH.keys())
@pytest.mark.parametrize("batches", [X, BATCHES], ids=["tensor", "list"])
def test_one_label_for_each_row(labels, batches):
    agree(by_class(IDENTITY, batches, by=labels, batch_size=4), X, LABELS)


BY_BATCH = {
    "lists": PARTS,
    "tensors": [torch.tensor(part) for part in PARTS],
    "arrays": tuple(np.array(part) for part in PARTS),
    "generator": lambda: (part for part in PARTS),
    "loader": lambda: DataLoader(torch.tensor(LABELS), batch_sampler=[[0, 1], [2, 3, 4], [5]]),
}


@pytest.mark.parametrize("labels", BY_BATCH.values(), ids=BY_BATCH.keys())
def test_the_labels_of_each_batch(labels):
    agree(by_class(IDENTITY, BATCHES, by=labels() if callable(labels) else labels), X, LABELS)
    agree(by_class(IDENTITY, iter(BATCHES), by=labels() if callable(labels) else labels), X, LABELS)


class Strict(nn.Module):
    """Takes one tensor, by position or by name, and nothing else."""

    def __init__(self):
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x):
        return self.site(x)


PLACES = {
    "second": (1, [(x, y) for x, y in zip(BATCHES, PARTS, strict=True)]),
    "last": (-1, [[x, torch.tensor(y)] for x, y in zip(BATCHES, PARTS, strict=True)]),
    "first": (0, [(torch.tensor(y), x) for x, y in zip(BATCHES, PARTS, strict=True)]),
    "key": ("y", [{"y": y, "x": x} for x, y in zip(BATCHES, PARTS, strict=True)]),
    "loader": (1, DataLoader(TensorDataset(X, torch.tensor(LABELS)), batch_size=4)),
}


@pytest.mark.parametrize(("by", "batches"), PLACES.values(), ids=PLACES.keys())
def test_labels_in_the_batches_are_not_given_to_the_model_and_the_batches_stay_whole(by, batches):
    sizes = [len(batch) for batch in batches]
    agree(by_class(Strict(), batches, by=by, site="site"), X, LABELS)
    assert [len(batch) for batch in batches] == sizes == [2] * len(sizes)


def test_a_function_of_the_batch_sees_what_the_model_is_given():
    signs = ["high" if row.sum() > 1.5 else "low" for row in X]
    found = by_class(IDENTITY, X, by=lambda batch: ["high" if row.sum() > 1.5 else "low" for row in batch])
    agree(found, X, signs)


def test_a_dataset_of_words():
    words = ["b", "a", "b", "a", "ä", "b"]
    for labels in (words, np.array(words), np.array(words, dtype=object), [words]):
        batches = [X] if isinstance(labels[0], list) else X
        agree(by_class(IDENTITY, batches, by=labels), X, words)


def test_booleans_are_zero_and_one():
    booleans = [True, False, True, True, False, False]
    for labels in (booleans, torch.tensor(booleans), np.array(booleans), [booleans]):
        batches = [X] if isinstance(labels, list) and isinstance(labels[0], list) else X
        agree(by_class(IDENTITY, batches, by=labels), X, [1, 0, 1, 1, 0, 0])


@given(st.data(), st.integers(1, 8), st.integers(1, 4))
def test_the_classes_together_are_the_whole_whatever_the_batches(data, rows, batch_size):
    x = data.draw(eighths(rows, 3))
    labels = data.draw(st.lists(st.sampled_from([0, 1, "a"]), min_size=rows, max_size=rows))
    agree(by_class(IDENTITY, x, by=labels, batch_size=batch_size), x, labels)
    total = collect(IDENTITY, x, sites="0", by=labels, covariance=True).total()["0"]
    whole = collect(IDENTITY, x, sites="0", covariance=True)["0"]
    assert total.count == whole.count
    assert_allclose(total.mean, whole.mean, atol=1e-12)
    assert_allclose(total.scatter, whole.scatter, atol=1e-10)
    assert_allclose(total.fourth, whole.fourth, rtol=1e-11, atol=1e-9)


# --- every token takes the label of its row ---------------------------------------------------------------------------
def test_every_token_and_every_place_of_an_image_has_the_label_of_its_row():
    sequences, images = normal(6, 4, 3), normal(6, 3, 2, 5)
    agree(by_class(IDENTITY, sequences, by=LABELS, batch_size=4), sequences, LABELS)
    found = by_class(nn.Sequential(nn.MaxPool2d(1)), images, by=LABELS, batch_size=4)
    agree(found, images.movedim(1, -1), LABELS)


def test_sequences_first_have_the_labels_of_their_second_axis():
    model, x = recurrent(nn.GRU, batch_first=False), normal(4, 6, 3)
    out = model.rnn(x)[0].detach()
    for by in ([LABELS], [torch.tensor(LABELS)]):
        agree(by_class(model, [x], by=by, site="rnn"), out.transpose(0, 1), LABELS)


@pytest.mark.parametrize("steps", [2, 3, 5, 6, 9])
def test_a_head_after_sequences_first_has_the_right_labels_or_is_refused(steps):
    model, x = recurrent(nn.GRU, batch_first=False), normal(steps, 6, 3)
    try:
        found = by_class(model, [x], by=[LABELS], site="head")
    except ActsteerError:
        return
    agree(found, model(x).detach().transpose(0, 1), LABELS)


class Masked(nn.Module):
    def __init__(self):
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x, attention_mask):
        return self.site(x)


def test_pads_do_not_count_for_any_class():
    x, mask = normal(3, 4, 2), torch.tensor([[1, 1, 1, 0], [0, 0, 1, 1], [0, 0, 0, 1]])
    for positions, counts in {"all": (3, 2, 1), "last": (1, 1, 1), -1: (1, 1, 1)}.items():
        found = by_class(Masked(), [(x, mask)], by=[list("abc")], site="site", positions=positions)
        assert tuple(own.count for own in found.values()) == counts
    for row, label in enumerate("abc"):
        last = by_class(Masked(), [(x, mask)], by=[list("abc")], site="site", positions="last")[label]
        assert torch.equal(last.mean, x[row][mask[row].bool()][-1])


@pytest.mark.parametrize("lengths", [(2, 3, 1), (2, 4, 1), (1, 1, 1), (4, 4, 4)])
def test_tokens_of_all_rows_in_a_line_have_the_right_labels_or_are_refused(lengths):
    class Unpadded(Masked):
        def forward(self, x, attention_mask):
            return self.site(x[attention_mask.bool()])

    x, mask = normal(3, 4, 2), torch.tensor([[n > i for i in range(4)] for n in lengths])
    labels = [label for label, n in zip("abc", lengths, strict=True) for _ in range(n)]
    try:
        found = by_class(Unpadded(), [(x, mask)], by=[list("abc")], site="site")
    except ActsteerError:
        return
    agree(found, x[mask], labels)


def test_several_sites_see_the_same_classes():
    model = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).double()
    found = collect(model, X.double(), sites=["0", "1"], by=LABELS, covariance=True)
    hidden = model[0](X.double()).detach()
    agree({label: own["0"] for label, own in found.items()}, hidden, LABELS)
    agree({label: own["1"] for label, own in found.items()}, hidden.relu(), LABELS)
    assert found.sites == ("0", "1")


def test_a_class_of_one_row_has_a_mean():
    assert torch.equal(by_class(IDENTITY, X, by=LABELS)[-1].mean, X[4].double())


def test_an_empty_batch_has_no_labels():
    agree(by_class(IDENTITY, [X[:2], X[:0], X[2:]], by=[LABELS[:2], [], LABELS[2:]]), X, LABELS)


# --- errors ----------------------------------------------------------------------------------------------------------
WRONG = {
    "too few rows": (X, LABELS[:-1]),
    "too many rows": (X, [*LABELS, 0]),
    "none": (X, []),
    "fewer than the batches": (BATCHES, PARTS[:-1]),
    "more than the batches": (BATCHES, [*PARTS, [0]]),
    "too few for a batch": (BATCHES, [PARTS[0], PARTS[1][:-1], PARTS[2]]),
    "too many for a batch": (BATCHES, [PARTS[0], [*PARTS[1], 0], PARTS[2]]),
    "too many, the rest too few": (BATCHES, [[*PARTS[0], 4], PARTS[1][1:], PARTS[2]]),
    "fractions": (X, torch.tensor(LABELS).double()),
    "fractions in a list": ([X], [[0.5] * 6]),
    "one hot": (X, torch.eye(6, dtype=torch.int64)),
    "words for one": (BATCHES, ["ab", "cde"]),
    "nothing": ([X], [[None] * 6]),
    "no such place": ([(X, LABELS)], 5),
    "no such key": ([{"input": X}], "y"),
    "a key of a tensor": (X, "y"),
    "a place in a tensor": ([torch.tensor([[1, 2], [0, 1]])], 0),
    "a function of one": (X, lambda batch: 3),
    "a function of too many": (X, lambda batch: [0] * 7),
}


@pytest.mark.parametrize(("batches", "by"), WRONG.values(), ids=WRONG.keys())
def test_labels_that_do_not_fit_are_refused(batches, by):
    ids = isinstance(batches, list) and isinstance(batches[0], torch.Tensor) and not batches[0].is_floating_point()
    model = nn.Sequential(nn.Embedding(3, 2)) if ids else IDENTITY
    with pytest.raises(BatchError, match=r"^by: |labels, and \d+ rows|rows, and \d+ labels|labels"):
        collect(model, batches, sites="0", by=by)
