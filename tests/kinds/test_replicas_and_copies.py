"""Replicas and copies of a steered module: a copy is plain, with its own weights; a replica is steered, with its own.

The kind of fault: a shallow copy or a replica runs the original's forward, with the original's weights.
"""

import copy
import io
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from actsteer import Ablate, ActsteerError, ProjectionAbove, Steerer, SteeringVector
from tests.kinds.by_hand import Text, added, every_backend, every_backend_and_fold, ids, right_or_refused, steerer

V = SteeringVector({"1": torch.tensor([1.0, -2.0, 0.5])})
X = torch.arange(8.0).view(4, 2) / 8


def small():
    """Two layers, sites "1" and "2", with numbers that are the same each time."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2)).eval()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.copy_((torch.arange(parameter.numel()).view_as(parameter) * 3 % 7 - 3 + n) / 8)
    return model


def replicated(module, weights=lambda tensor: tensor.clone()):
    """What torch.nn.parallel.replicate does for one more device: no parameters, but tensors in their places."""
    replica = module._replicate_for_data_parallel()
    for name, child in module.named_children():
        replica._modules[name] = replicated(child, weights)
    for name, parameter in module._parameters.items():
        if parameter is not None:
            setattr(replica, name, weights(parameter.detach()))
        else:
            replica._parameters[name] = None
    return replica


def with_own_weights(module):
    """A shallow copy whose parameters are zero; those of the module stay as they are."""
    twin = copy.copy(module)
    twin._parameters = {name: nn.Parameter(torch.zeros_like(p)) for name, p in module._parameters.items()}
    return twin


def expected(model, x, weights=lambda tensor: tensor, c=1.0):
    """A plain copy with other weights, steered by a plain hook."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(weights(parameter))
    with added(twin, "1", c * V["1"]):
        return twin(x)


def half(tensor):
    return tensor / 2


# --- replicas --------------------------------------------------------------------------------------------------------
@every_backend
def test_a_replica_of_a_site_computes_with_its_own_weights(backend):
    model = nn.Sequential(nn.Linear(2, 2))
    x, plain = torch.ones(1, 2), model(torch.ones(1, 2)).detach()
    with steerer(model, "0", backend=backend):
        replica = model[0]._replicate_for_data_parallel()
        replica.weight, replica.bias = torch.zeros(2, 2), torch.zeros(2)
        right_or_refused(lambda: replica(x), torch.ones(1, 2))
        assert torch.allclose(model(x), plain + 1)
    assert torch.equal(model(x), plain)


@every_backend
@pytest.mark.parametrize("weights", [half, torch.zeros_like, torch.neg], ids=["half", "zero", "negative"])
def test_a_replica_of_a_network_is_steered_with_its_own_weights(backend, weights):
    model, want = small(), expected(small(), X, weights)
    with Steerer(model, V, backend=backend):
        replica = replicated(model, weights)
        right_or_refused(lambda: replica(X), want)
        torch.testing.assert_close(model(X), expected(small(), X))


@every_backend_and_fold
def test_replicas_of_the_same_weights_do_as_the_model_does(backend):
    """As nn.DataParallel: replicas in threads, each with its share of the rows."""
    model, want = small(), expected(small(), X)
    with torch.no_grad(), Steerer(model, V, c=2.0, backend=backend):
        replicas = [replicated(model) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            right_or_refused(
                lambda: torch.cat(list(pool.map(lambda r, x: r(x), replicas, X.split(2)))), expected(small(), X, c=2.0)
            )
        model(X)
    torch.testing.assert_close(expected(model, X), want)


@every_backend
def test_a_replica_has_the_pads_of_its_own_rows(backend):
    model, tokens = Text(), ids(4, 3)
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 1, 1]])
    want = model(tokens).detach() + mask[..., None]
    with torch.no_grad(), steerer(model, backend=backend):
        replicas = [replicated(model) for _ in range(2)]
        with ThreadPoolExecutor(2) as pool:
            shares = replicas, tokens.split(2), mask.split(2)
            right_or_refused(lambda: torch.cat(list(pool.map(lambda r, x, m: r(x, attention_mask=m), *shares))), want)
        torch.testing.assert_close(model(tokens, attention_mask=mask), want)


@every_backend
@pytest.mark.parametrize("positions", ["last", 0, "generated"])
@pytest.mark.filterwarnings("ignore:positions=.generated.")
def test_a_replica_has_the_positions_of_its_own_rows(backend, positions):
    model, tokens = Text(), ids(2, 3)
    mask = torch.tensor([[1, 1, 0], [0, 1, 1]])
    places = {"last": [[0, 1, 0], [0, 0, 1]], 0: [[1, 0, 0], [0, 1, 0]], "generated": [[0, 0, 0], [0, 0, 0]]}
    want = model(tokens).detach() + torch.tensor(places[positions])[..., None]
    with torch.no_grad(), steerer(model, backend=backend, positions=positions):
        replicas = [replicated(model) for _ in range(2)]
        for row, replica in enumerate(replicas):
            share = slice(row, row + 1)
            right_or_refused(lambda r=replica, s=share: r(tokens[s], attention_mask=mask[s]), want[share])


@every_backend
def test_a_replica_does_not_take_the_strengths_of_other_rows(backend):
    """Four strengths, and two rows in each replica: which they are cannot be known there."""
    model, c = small(), torch.tensor([0.0, 1.0, 2.0, 3.0])
    want = expected(small(), X, c=c[:, None])
    with torch.no_grad(), Steerer(model, V, c=c, backend=backend):
        torch.testing.assert_close(model(X), want)
        for share, rows in zip(X.split(2), want.split(2), strict=True):
            right_or_refused(lambda x=share: replicated(model)(x), rows)


@every_backend
def test_a_gate_decides_for_the_rows_of_the_replica(backend):
    model = small()
    scores = model[0](X)[:, 0].detach()
    gate = ProjectionAbove(SteeringVector({"0": torch.tensor([1.0, 0.0, 0.0])}), float(scores.median()))
    fires = (scores > gate.threshold).float()
    assert 0 < fires.sum() < 4
    want = expected(small(), X, c=fires[:, None])
    with torch.no_grad(), Steerer(model, V, gate=gate, backend=backend, strict=False):
        model(X.flip(0))  # the model's decisions are about other rows
        for share, rows in zip(X.split(2), want.split(2), strict=True):
            right_or_refused(lambda x=share: replicated(model)(x), rows)


@every_backend
def test_a_replica_that_runs_after_the_block_is_plain(backend):
    model, plain = small(), small()
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.copy_(parameter / 2)
    with Steerer(model, V, backend=backend):
        replica = replicated(model, half)
        model(X)
    right_or_refused(lambda: replica(X), plain(X).detach())


# --- copies ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("backend", ["auto", "tap"])
def test_a_shallow_copy_may_be_given_other_weights(backend):
    model = nn.Sequential(nn.Linear(2, 2))
    x, plain = torch.ones(1, 2), model(torch.ones(1, 2)).detach()
    with steerer(model, "0", backend=backend):
        twin = copy.copy(model[0])
        twin.weight, twin.bias = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.zeros(2))
        assert twin(x).tolist() == [[0.0, 0.0]]
        assert torch.allclose(model(x), plain + 1)
    assert twin(x).tolist() == [[0.0, 0.0]]
    assert torch.equal(model(x), plain)


@every_backend
@pytest.mark.parametrize("scope", ["process", "context"])
@pytest.mark.parametrize("times", [1, 2])
def test_a_shallow_copy_of_a_site_is_plain_with_its_own_weights(backend, scope, times):
    if (backend, scope) == ("buffer", "context"):
        pytest.skip("a buffer is of the process")
    model = small()
    hidden = model[0](X)
    with Steerer(model, V, backend=backend, scope=scope):
        twin = model[1]
        for _ in range(times):
            twin = with_own_weights(twin)
        assert not twin(hidden).any()
        torch.testing.assert_close(model(X), expected(small(), X))
    assert not twin(hidden).any()
    assert torch.equal(model(X), small()(X))


@every_backend
def test_a_shallow_copy_may_be_steered_like_any_module(backend):
    model, hidden = small(), small()[0](X)
    with Steerer(model, V, backend=backend):
        twin = nn.Sequential(with_own_weights(model[1]))
        with steerer(twin, "0", d=3, backend=backend):
            assert torch.equal(twin(hidden), torch.ones(4, 3))
        assert not twin(hidden).any()
        torch.testing.assert_close(model(X), expected(small(), X))


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": by_torch_save,
    "copy of a copy": lambda model: copy.deepcopy(copy.copy(model)),
    "clones of a layer": lambda model: nn.Sequential(*[copy.deepcopy(child) for child in model]),
}


@every_backend
@pytest.mark.parametrize("options", [{}, {"scope": "context"}, {"intervention": Ablate()}], ids=str)
@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_a_copy_of_the_model_is_plain(backend, options, copied):
    if backend == "buffer" and "scope" in options:
        pytest.skip("a buffer is of the process")
    model = small()
    with Steerer(model, V, backend=backend, **options):
        model(X)
        twin = copied(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.mul_(2)
        want = copy.deepcopy(small())
        with torch.no_grad():
            for parameter in want.parameters():
                parameter.mul_(2)
        assert torch.equal(twin(X), want(X))
        assert [type(module) for module in twin.modules()] == [type(module) for module in want.modules()]
    assert torch.equal(twin(X), want(X)) and torch.equal(model(X), small()(X))


@every_backend
def test_layers_that_torch_makes_as_copies_of_a_steered_one_are_plain(backend):
    """nn.TransformerEncoder copies the layer that it is given."""
    layer = nn.TransformerEncoderLayer(2, 1, 4, dropout=0.0, batch_first=True).eval()
    x, plain = X.view(2, 2, 2), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    with steerer(layer, "linear1", d=4, c=3.0, backend=backend):
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        layer(x)
        torch.testing.assert_close(encoder(x), plain(x))
    torch.testing.assert_close(encoder(x), plain(x))


# --- torch's tools ---------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.filterwarnings("ignore")
def test_a_model_that_is_quantised_inside_the_block_is_the_plain_one_quantised(backend):
    model = small()
    if not [engine for engine in torch.backends.quantized.supported_engines if engine != "none"]:
        pytest.skip("this torch quantises nothing")
    want = torch.ao.quantization.quantize_dynamic(small(), {nn.Linear}, dtype=torch.qint8)(X)
    with torch.no_grad(), Steerer(model, V, c=3.0, backend=backend):
        quantised = torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)
        assert [type(child).__module__.split(".")[1] for child in quantised][:2] == ["ao", "ao"]
        assert torch.equal(quantised(X), want)
        torch.testing.assert_close(model(X), expected(small(), X, c=3.0))
    assert torch.equal(quantised(X), want)


@every_backend
def test_a_functional_call_is_steered_and_uses_the_weights_that_it_is_given(backend):
    model = small()
    weights = {name: parameter.detach() / 2 for name, parameter in model.named_parameters()}
    with Steerer(model, V, backend=backend):
        torch.testing.assert_close(torch.func.functional_call(model, weights, X), expected(small(), X, half))
        torch.testing.assert_close(model(X), expected(small(), X))
    assert torch.equal(model(X), small()(X))


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x


@every_backend
def test_a_parametrization_that_comes_inside_the_block_counts_and_may_leave_in_any_order(backend):
    """torch.nn.utils.parametrize puts a subclass in the class's place, as others do."""
    model, plain = small(), small()
    with torch.no_grad():
        plain[1].weight.mul_(2)
    with added(plain, "1", V["1"]):
        want = plain(X)
    with Steerer(model, V, backend=backend):
        parametrize.register_parametrization(model[1], "weight", Twice())
        torch.testing.assert_close(model(X), want)
    assert torch.equal(model(X), plain(X))
    with Steerer(model, V, backend=backend):
        torch.testing.assert_close(model(X), want)
        try:
            parametrize.remove_parametrizations(model[1], "weight", leave_parametrized=False)
        except ActsteerError:
            return
        torch.testing.assert_close(model(X), expected(small(), X))
    assert torch.equal(model(X), small()(X)) and type(model[1]) is nn.Linear


@every_backend
def test_a_moved_model_keeps_its_steering_and_a_moved_copy_has_none(backend):
    model = small()
    with Steerer(model, V, backend=backend):
        twin = copy.deepcopy(model).double()
        assert torch.equal(twin(X.double()), small().double()(X.double()))
        model.double()
        torch.testing.assert_close(model(X.double()), expected(small(), X).double())
    assert torch.equal(model(X.double()), small().double()(X.double()))
