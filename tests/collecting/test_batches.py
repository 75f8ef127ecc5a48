"""Batches: every form of data becomes the same calls, and the model is left as it was found."""

from collections import UserDict

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from actsteer import BatchError, SteeringVector, collect, discover, fit, fold, optimize, record
from actsteer.collecting.batches import _fits, call, iterate
from actsteer.collecting.eval_mode import eval_mode
from tests.oracles import state

X = torch.arange(12.0).reshape(6, 2)


def listed(batches, batch_size=4):
    return list(iterate(batches, batch_size=batch_size, progress=False, label=""))


class Shifted(nn.Module):
    """The same with a layer behind it."""

    def __init__(self):
        super().__init__()
        self.site, self.head = Sum(), nn.Linear(2, 1)

    def forward(self, x, y=0):
        return self.head(self.site(x, y))


class Sum(nn.Module):
    """Two inputs, by position or by name."""

    def forward(self, x, y=0):
        return x + 2 * y


@given(st.integers(1, 10), st.integers(1, 12))
def test_one_tensor_is_split_by_batch_size_in_order(rows, batch_size):
    x = torch.arange(rows)
    batches = listed(x, batch_size)
    assert torch.equal(torch.cat(batches), x)
    assert all(len(batch) == batch_size for batch in batches[:-1])
    assert len(batches[-1]) <= batch_size


FORMS = {
    "list": [X[:4], X[4:]],
    "tuple": (X[:4], X[4:]),
    "loader": DataLoader(X, batch_size=4),
    "split": X.split(4),
    "loader of one": [batch[0] for batch in DataLoader(TensorDataset(X), batch_size=4)],
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS.keys())
def test_an_iterable_is_passed_through_whatever_the_batch_size(form):
    assert [batch.tolist() for batch in listed(form, batch_size=1)] == [X[:4].tolist(), X[4:].tolist()]


def test_a_generator_is_read_once_and_lazily():
    read = []
    batches = iterate((read.append(i) or X[i] for i in range(3)), batch_size=1, progress=False, label="")
    assert read == []
    next(batches)
    assert read == [0]


@pytest.mark.parametrize(
    "batch",
    [(X, X), [X, X], {"x": X, "y": X}, next(iter(DataLoader(TensorDataset(X, X), batch_size=6)))],
    ids=["tuple", "list", "dict", "loader"],
)
def test_a_batch_is_positional_or_keyword_arguments(batch):
    assert torch.equal(call(Sum(), batch), 3 * X)


def test_a_tensor_is_the_one_argument():
    assert torch.equal(call(Sum(), X), X)
    assert torch.equal(call(Sum(), (X,)), X)


# --- eval_mode -------------------------------------------------------------------------------------------------
def disturbed_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Sequential(nn.Dropout(), nn.Linear(2, 1)))
    model[1].eval()
    model[2][0].eval()
    model[0].weight.requires_grad_(False)
    return model


@pytest.mark.parametrize("frozen", [False, True])
def test_inside_the_model_evaluates_and_is_frozen_if_asked(frozen):
    model = disturbed_model()
    with eval_mode(model, frozen=frozen):
        assert not any(module.training for module in model.modules())
        assert [p.requires_grad for p in model.parameters()] == [False] + [not frozen] * 5


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_afterwards_the_model_is_as_it_was_found_however_it_ends(frozen, error):
    model = disturbed_model()
    before = state(model)
    if error is None:
        with eval_mode(model, frozen=frozen):
            pass
    else:
        with pytest.raises(error), eval_mode(model, frozen=frozen):
            raise error
    assert state(model) == before


# --- errors ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("empty", [[], X[:0], torch.tensor(1.0), iter([])])
def test_no_batches_are_an_error(empty):
    with pytest.raises(BatchError, match="batches: there are none; is the generator used up, or the tensor empty"):
        listed(empty)


def test_a_used_up_generator_is_an_error():
    batches = (X for _ in range(2))
    listed(batches)
    with pytest.raises(BatchError, match="there are none; is the generator used up"):
        listed(batches)


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_size_is_positive(batch_size):
    with pytest.raises(BatchError, match=f"batch_size: expected 1 or more, got {batch_size}"):
        listed(X, batch_size)


class Tokenizer:
    def apply_chat_template(self): ...

    def __iter__(self): ...


@pytest.mark.parametrize(
    ("batches", "said"),
    [
        (3, "int"),
        (None, "NoneType"),
        (Sum(), "Sum"),
        ("text", r"the text 'text'; for texts there are text_batches\(tokenizer, texts\) and fit_pairs"),
        (X.numpy(), "a ndarray; give torch.as_tensor of it"),
        (Tokenizer(), "a tokenizer; give what it makes of texts"),
    ],
)
def test_what_is_no_input_and_no_iterable_of_inputs_is_named(batches, said):
    with pytest.raises(BatchError, match=f"batches: expected a tensor.* got {said}"):
        listed(batches)


@pytest.mark.parametrize(
    "batch", [X, (X, X), {"x": X, "y": X}, UserDict(x=X, y=X)], ids=["tensor", "tuple", "dict", "encoding"]
)
@pytest.mark.filterwarnings("ignore:the vector is zero")
def test_there_is_one_rule_for_inputs_everywhere(batch):
    """One input is one, and an iterable is of inputs, whoever is given them."""
    model, v = Shifted(), SteeringVector({"site": torch.ones(2)})
    many = [batch, batch]
    for one, several in ((batch, many), (batch, iter(many))):
        count = collect(model, one, sites="site")["site"].count
        assert (count, collect(model, several, sites="site")["site"].count) == (6, 12)
    assert len(record(model, batch, sites="site")["site"]) * 2 == len(record(model, many, sites="site")["site"]) == 12
    assert fit(model, positive=batch, negative=many, sites="site")["site"].tolist() == [0.0, 0.0]
    options = {"sites": "site", "loss": lambda output: output.square().mean(), "steps": 2}
    for data in (batch, many):
        optimize(model, data, retain=data, validation=data, **options)
        discover(model, data, site="site", target="head", norm=1.0, steps=2)
        fold(model, v, verify_on=data)


@pytest.mark.parametrize("size", [2, 3])
def test_what_a_loader_pairs_with_the_inputs_is_not_taken_for_an_argument(size):
    loader = DataLoader(TensorDataset(*[X] * size), batch_size=3)
    said = rf"the DataLoader gives {size} things for each batch \(.*Tensor\), and the model would be called with all"
    for model in (Sum(), nn.Identity()):
        with pytest.raises(BatchError, match=said):
            collect(nn.Sequential(model), loader, sites="0")
    with pytest.raises(BatchError, match=said):
        optimize(nn.Sequential(nn.Identity()), loader, sites="0", loss=torch.mean)
    with pytest.raises(BatchError, match=said):
        fit(nn.Sequential(nn.Identity()), positive=loader, negative=X, sites="0")


def test_what_a_loader_gives_is_an_argument_where_that_is_said():
    pairs = TensorDataset(X, X)
    by_name = DataLoader(
        pairs,
        batch_size=3,
        collate_fn=lambda rows: {"x": torch.stack([x for x, _ in rows]), "y": torch.stack([y for _, y in rows])},
    )
    for batches in ([tuple(batch) for batch in DataLoader(pairs, batch_size=3)], by_name):
        assert torch.equal(record(Shifted(), batches, sites="site")["site"], 3 * X)
    labelled = DataLoader(TensorDataset(X, torch.arange(6)), batch_size=3)
    assert collect(Shifted(), labelled, by=1, sites="site")[4]["site"].mean.tolist() == X[4].tolist()


MISFITS = {
    "width": (
        torch.zeros(3, 5),
        r"site 'inner.0', a float32 Linear\(in_features=2.*given float32 of shape \(3, 5\): mat1",
    ),
    "dtype": (X.double(), r"site 'inner.0', a float32 Linear.* given float64 of shape \(6, 2\): .*dtype"),
    "integers": (X.long(), r"site 'inner.0', a float32 Linear.* given int64 of shape \(6, 2\)"),
}


@pytest.mark.parametrize(("batch", "said"), MISFITS.values(), ids=MISFITS)
def test_a_batch_that_does_not_fit_names_the_module_that_refuses_it(batch, said):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())

        def forward(self, x):
            return self.inner(x)

    for verb in (collect, record):
        with pytest.raises(BatchError, match=f"a batch does not fit the model: {said}"):
            verb(Model(), batch, sites="inner.1")
    with pytest.raises(BatchError, match=said):
        optimize(Model(), batch, sites="inner.1", loss=torch.mean)


def test_an_error_of_a_users_module_is_its_own():
    class Picky(nn.Module):
        def forward(self, x):
            raise RuntimeError("not today")

    with pytest.raises(RuntimeError, match=r"^not today$"):
        collect(nn.Sequential(Picky(), nn.Identity()), X, sites="1")


@pytest.mark.parametrize(
    ("batch", "kind"), [("text", "the text"), (np.ones(2), "a ndarray"), (3, "int"), (None, "NoneType")]
)
def test_what_is_no_batch_is_named(batch, kind):
    with pytest.raises(BatchError, match=f"a tuple of positional or a mapping of keyword arguments, got {kind}"):
        call(Sum(), batch)


@pytest.mark.parametrize("batch", [(torch.zeros(1, 2), torch.zeros(1)), [torch.zeros(1, 2)] * 2, {"x": torch.zeros(1)}])
def test_a_batch_that_does_not_fit_the_forward_is_refused(batch):
    model = nn.Sequential(nn.Linear(2, 2))
    with pytest.raises(BatchError, match=r"does not fit Sequential.forward: .*; feed the inputs alone"):
        collect(model, [batch], sites="0")
    assert not model[0]._forward_hooks


def test_a_type_error_inside_the_model_is_the_model_s_own():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Identity()

        def forward(self, x):
            return self.inner(x + "text")

    with pytest.raises(TypeError, match="unsupported operand"):
        collect(Broken(), torch.zeros(1, 2), sites="inner")


# --- what looks like something else -----------------------------------------------------------------------------------
class Masked(nn.Module):
    """A model whose second argument is a mask, as most language models have one."""

    def __init__(self):
        super().__init__()
        self.site = nn.Embedding(50, 4)

    def forward(self, input_ids, attention_mask=None):
        return self.site(input_ids)


PARTS = {
    "split": lambda ids: ids.split(4),
    "chunk": lambda ids: ids.chunk(2),
    "unbind": lambda ids: ids.unbind(0),
    "in inference mode": torch.inference_mode()(lambda ids: (ids + 0).split(4)),
}


@pytest.mark.filterwarnings("ignore:the vector is zero")
@pytest.mark.parametrize("parts", PARTS.values(), ids=PARTS)
def test_parts_of_one_tensor_are_batches_and_not_arguments(parts):
    """They come in a tuple; the second is no mask of the first."""
    ids = torch.arange(40).reshape(8, 5)
    for verb in (collect, record):
        found, whole = (verb(Masked(), data, sites="site")["site"] for data in (parts(ids), ids))
        assert len(found) == len(whole) if verb is record else found.count == whole.count == 40
    vector = fit(Masked(), positive=parts(ids), negative=ids, sites="site")
    assert (vector.metadata["positive count"], vector.metadata["negative count"]) == ("40", "40")
    targets = parts(torch.zeros(8, 5, 4))
    if targets[0].is_inference():
        return
    options = {"sites": "site", "loss": nn.functional.mse_loss, "steps": 3}
    optimize(Masked(), parts(ids), targets=targets, **options)
    assert collect(Masked(), [(ids[:4], ids[4:])], sites="site")["site"].count == 20  # said to be arguments
    assert collect(Masked(), (ids, torch.ones_like(ids)), sites="site")["site"].count == 40


def test_a_share_of_a_loader_is_as_strict_as_all_of_it():
    loader = DataLoader(TensorDataset(X, X), batch_size=2)
    with pytest.raises(BatchError, match="the DataLoader gives 2 things"):
        collect(Shifted(), loader, sites="site", shard=(0, 2))
    labelled = DataLoader(TensorDataset(X, torch.arange(6)), batch_size=2)
    assert collect(Shifted(), labelled, by=1, sites="site", shard=(0, 2)).keys() == {0, 1, 4, 5}


def test_a_loader_whose_dataset_has_no_length():
    class Stream(IterableDataset):
        def __iter__(self):
            yield from X

    assert collect(Shifted(), DataLoader(Stream(), batch_size=4), sites="site")["site"].count == 6


def test_a_tokenizers_lists_are_refused_with_what_to_ask_it_for():
    with pytest.raises(BatchError, match="input_ids is a list of 1; call the tokenizer with return_tensors='pt'"):
        collect(Masked(), {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, sites="site")


# --- errors that have nothing to do with the batch ---------------------------------------------------------------
def test_only_what_the_batch_does_not_fit_is_named():
    """A hook's, a gate's or an estimator's own layers, and what runs out of memory, raise as they do."""
    other = nn.Linear(7, 7)
    hooked = Shifted()
    hooked.site.register_forward_hook(lambda *_: other(torch.zeros(2, 5)))
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        collect(hooked, X, sites="head")

    class Full(nn.Module):
        def forward(self, x):
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    with pytest.raises(RuntimeError, match="can't allocate memory"):
        collect(nn.Sequential(Full()), X, sites="0")
    with pytest.raises(BatchError, match=r"site 'site', a float32 Embedding\(50, 4\), was given float32 of shape"):
        collect(Masked(), X, sites="site")
    with pytest.raises(BatchError, match=r"site 'site', .*was given int64 of shape .*index out of range"):
        collect(Masked(), torch.full((2, 2), 50), sites="site")


WIDTHS = {
    "Linear, as many rows as features": (nn.Linear(8, 4), torch.zeros(8, 5)),
    "Conv2d, channels last": (nn.Conv2d(3, 4, 3), torch.zeros(3, 8, 8, 3)[:, :, :7]),
    "LSTM": (nn.LSTM(5, 4, batch_first=True), torch.zeros(2, 3, 7)),
    "GRUCell": (nn.GRUCell(5, 4), torch.zeros(2, 7)),
    "LayerNorm": (nn.LayerNorm((3, 5)), torch.zeros(2, 3, 4)),
    "BatchNorm": (nn.BatchNorm1d(4), torch.zeros(2, 5)),
    "GroupNorm": (nn.GroupNorm(2, 4), torch.zeros(2, 6, 3)),
    "a padded label": (nn.Embedding(9, 4), torch.tensor([[1, -100]])),
    "bytes": (nn.Embedding(9, 4), torch.zeros(2, 2, dtype=torch.uint8)),
    "no parameter of its own": (nn.utils.parametrizations.weight_norm(nn.Linear(8, 4, bias=False)), X.double()),
}


@pytest.mark.parametrize(("module", "given"), WIDTHS.values(), ids=WIDTHS)
def test_what_a_module_cannot_take_is_named_and_is_a_runtime_error_still(module, given):
    for kind in (BatchError, RuntimeError):
        with pytest.raises(kind, match=r"a batch does not fit the model: site '0', a .*was given .* of shape"):
            collect(nn.Sequential(module, nn.Identity()), given, sites="1")


def test_under_autocast_a_dtype_is_no_evidence():
    linear = nn.Linear(2, 2)
    assert not _fits(linear, X.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert _fits(linear, X.bfloat16())
        assert not _fits(linear, torch.zeros(2, 3))
