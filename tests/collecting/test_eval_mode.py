"""A pass over data runs each batch once, and leaves the model and the caller's data bit for bit as they were."""

import collections
import types

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from actsteer import collect, record
from actsteer.collecting.eval_mode import eval_mode
from tests.oracles import state

X = torch.tensor([[0.0, 2.0], [4.0, 2.0], [2.0, -1.0]])


class Counting(nn.Module):
    """Counts how often it runs, and on what; the site comes first, so that a pass may stop after it."""

    def __init__(self):
        super().__init__()
        self.site, self.after = nn.Linear(2, 2), nn.Linear(2, 2)
        self.seen = []

    def forward(self, x):
        self.seen.append((len(x), torch.is_inference_mode_enabled(), torch.is_grad_enabled(), self.training))
        return self.after(self.site(x))


FORMS = {
    "tensor": lambda: X,
    "list": lambda: list(X.split(1)),
    "tuple": lambda: X.split(1),
    "generator": lambda: (row for row in X.split(1)),
    "loader": lambda: DataLoader(X, batch_size=1),
    "map": lambda: map(torch.clone, X.split(1)),
}


@pytest.mark.parametrize("batches", FORMS.values(), ids=FORMS.keys())
@pytest.mark.parametrize("sites", [["site"], ["site", "after"], ["after:in", "site:in"]])
@pytest.mark.parametrize("run", [collect, record])
def test_each_batch_runs_exactly_once_without_gradients(batches, sites, run):
    model = Counting()
    run(model, batches(), sites=sites, batch_size=1)
    assert model.seen == [(1, False, False, False)] * 3
    assert model.training


def test_batches_are_taken_one_by_one():
    model, taken = Counting(), []

    def lazily():
        for row in X.split(1):
            taken.append(len(model.seen))
            yield row

    collect(model, lazily(), sites="site")
    assert taken == [0, 1, 2]


def test_the_modes_of_the_caller_are_left_as_they_were():
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype()
    collect(Counting(), X, sites="site")
    assert modes == (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.get_default_dtype())
    for mode in (torch.no_grad(), torch.inference_mode()):
        with mode:
            found = collect(Counting(), X, sites="site", covariance=True)["site"]
        weight = torch.ones(2, dtype=torch.float64, requires_grad=True)
        (weight @ found.covariance @ weight + weight @ found.mean).backward()


def test_the_batches_are_not_changed_nor_kept():
    batch = {"input": X.clone()}
    found = collect(nn.Sequential(nn.Identity()), [batch], sites="0")["0"]
    before = found.mean
    assert torch.equal(batch["input"], X)
    batch["input"].fill_(9)
    assert torch.equal(found.mean, before)


class BoomError(Exception):
    """Raised in the middle of a pass."""


@pytest.mark.parametrize("when", [0, 1, 2])
def test_after_an_error_in_the_data_the_model_is_as_it_was(when):
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1)).train()
    model[1].eval()
    before = state(model)

    def failing():
        for index, row in enumerate(X.split(1)):
            if index == when:
                raise BoomError
            yield row

    with pytest.raises(BoomError):
        collect(model, failing(), sites="*", covariance=True)
    assert state(model) == before


def test_an_error_inside_the_model_is_its_own_and_leaves_it_as_it_was():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).train()

    def raises(*_):
        raise BoomError

    handle = model[1].register_forward_hook(raises)
    before = state(model)
    with pytest.raises(BoomError):
        collect(model, X, sites=["0", "1"])
    assert state(model) == before
    handle.remove()
    assert collect(model, X, sites="1")["1"].count == 3


def test_gradients_and_requirements_stay_and_none_are_made():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model(X).sum().backward()
    model[1].weight.requires_grad_(False)
    before = state(model)
    found = collect(model, X, sites="1")["1"]
    assert state(model) == before
    assert not found.mean.requires_grad


def test_frozen_parameters_are_thawed_after_an_error():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).train()
    model[0].bias.requires_grad_(False)
    before = state(model)

    def run():
        with eval_mode(model, frozen=True):
            assert not any(parameter.requires_grad for parameter in model.parameters())
            assert not any(module.training for module in model.modules())
            raise BoomError

    with pytest.raises(BoomError):
        run()
    assert state(model) == before


def test_training_afterwards_is_as_if_nothing_had_been():
    def trained(*, looked):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 1))
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(3):
            if looked:
                collect(model, X, sites="*", covariance=True)
            optimizer.zero_grad()
            model(X).square().sum().backward()
            optimizer.step()
        return model.state_dict()

    one, other = trained(looked=True), trained(looked=False)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_parametrized_weights_stay_bit_for_bit():
    linear = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    model = nn.Sequential(linear, nn.utils.parametrizations.spectral_norm(nn.Linear(2, 2))).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    collect(model, X, sites="1")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    model(X).sum().backward()


# --- tables made at the first call -----------------------------------------------------------------------------------
class Held:
    def __init__(self, value):
        self.value = value


class Named(collections.namedtuple("Named", "table")):
    __slots__ = ()


KEPT = {
    "a tensor": (lambda t: t, lambda kept: kept),
    "a list": (lambda t: [t], lambda kept: kept[0]),
    "a dict": (lambda t: {"table": t}, lambda kept: kept["table"]),
    "a tuple": (lambda t: (t, t), lambda kept: kept[1]),
    "a named tuple": (Named, lambda kept: kept.table),
    "an ordered dict": (lambda t: collections.OrderedDict(table=t), lambda kept: kept["table"]),
    "lists in dicts": (lambda t: {"a": {"b": [t]}}, lambda kept: kept["a"]["b"][0]),
    "an object": (Held, lambda kept: kept.value),
    "a namespace": (lambda t: types.SimpleNamespace(table=t), lambda kept: kept.table),
}


class Caching(nn.Module):
    """Makes a table at its first call, as rotary embeddings do."""

    def __init__(self, put, take):
        super().__init__()
        self.linear, self.kept, self.put, self.take = nn.Linear(2, 2), None, put, take

    def forward(self, x):
        if self.kept is None:
            self.kept = self.put(torch.full((2,), 2.0))
        return self.linear(x) * self.take(self.kept)


@pytest.mark.parametrize(("put", "take"), KEPT.values(), ids=KEPT.keys())
@pytest.mark.parametrize("run", [collect, record])
def test_a_table_that_is_kept_in_any_way_works_in_autograd_later(put, take, run):
    model = nn.Sequential(Caching(put, take), nn.Linear(2, 2))
    run(model, X, sites="1")
    model(X).sum().backward()
    assert model[0].linear.weight.grad is not None
    assert type(model[0].kept) is type(put(torch.ones(2)))


class Buffered(nn.Module):
    """Keeps its table in a buffer, under two names."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 2)
        self.register_buffer("table", None)

    def forward(self, x):
        if self.table is None:
            self.table = torch.zeros(2)
            self.same = self.table
        self.table.add_(1)
        return self.linear(x) * self.same


def test_a_buffer_made_meanwhile_works_in_autograd_and_stays_one_tensor_under_its_names():
    model = nn.Sequential(Buffered(), nn.Linear(2, 2))
    collect(model, X, sites="1")
    assert "0.table" in model.state_dict()
    assert model[0].same is model[0].table
    model(X).sum().backward()
    assert model[0].same.tolist() == [2, 2]


def test_a_lazy_layer_is_a_layer_afterwards():
    model = nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3))
    with torch.no_grad():
        model(X)
    collect(model, X, sites="1")
    model(X).sum().backward()
    assert all(isinstance(p, nn.Parameter) and not p.is_inference() for p in model.parameters())
