"""Copies: of a steered model the plain one, of a Steerer one that is not attached; they share nothing."""

import copy
import io
import pickle

import pytest
import torch

from actsteer import ProjectionAbove, Steerer, SteeringVector, VectorBank
from tests.oracles import state
from tests.zoo import bits, encoder, exact, normal

X = normal(3, 4)
DIRECTION = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)


def mirror(h, v, c):
    """h -> h + c (v - h)."""
    return h + c * (v - h)


def by_pickle(value):
    return pickle.loads(pickle.dumps(value))


def by_torch_save(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def twice(value):
    return copy.deepcopy(copy.deepcopy(value))


copied = pytest.mark.parametrize("duplicate", [copy.deepcopy, by_pickle, by_torch_save, twice])

WAYS = {
    "auto": {},
    "hook": {"backend": "hook"},
    "tap": {"backend": "tap"},
    "buffer": {"backend": "buffer"},
    "gated": {"gate": ProjectionAbove(SteeringVector({"0": DIRECTION}), 0.0)},
    "gated and patched": {"gate": ProjectionAbove(SteeringVector({"0": DIRECTION}), 0.0), "backend": "tap"},
    "gated at an input": {"gate": ProjectionAbove(SteeringVector({"0:in": DIRECTION}), 0.0)},
    "context": {"scope": "context"},
    "thread, patched": {"scope": "context", "backend": "tap"},
    "input": {"sites": "2:in"},
    "input, patched": {"sites": "2:in", "backend": "tap"},
    "input, thread": {"sites": "2:in", "scope": "context"},
    "root": {"sites": ""},
    "root, patched": {"sites": "", "backend": "tap"},
    "rows": {"c": torch.tensor([1.0, 0.0, -2.0])},
    "custom": {"intervention": mirror},
}
ways = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS.keys())
V = SteeringVector({"1": DIRECTION, "2": DIRECTION, "2:in": DIRECTION, "": DIRECTION}, concept="a")


def steerer_of(model, options):
    return Steerer(model, V, **({"sites": "1"} | options))


@pytest.mark.case(34)
@copied
@ways
@pytest.mark.parametrize("ran", [False, True], ids=["fresh", "after a call"])
def test_a_copy_of_a_steered_model_is_the_plain_one(duplicate, options, ran):
    model = exact()
    with steerer_of(model, options) as steerer:
        steered = model(X) if ran else None
        twin = duplicate(model)
        for _ in range(2):  # from the first call on
            assert torch.equal(bits(twin(X)), bits(exact()(X)))
        assert state(twin) == state(exact())
        assert steered is None or torch.equal(bits(model(X)), bits(steered))
        model(X)
        assert steerer.attached
    assert state(model) == state(exact())


@pytest.mark.case(34)
@copied
@ways
def test_a_copy_that_runs_later_is_the_plain_one_too(duplicate, options):
    model = exact()
    with steerer_of(model, options):
        twin = duplicate(model)
        model(X)
    assert torch.equal(bits(twin(X)), bits(exact()(X)))
    assert state(twin) == state(exact())


@pytest.mark.case(34)
@copied
@ways
def test_a_copy_can_be_steered_like_any_model(duplicate, options):
    model = exact()
    with steerer_of(model, options):
        expected = model(X)
        for run_first in (False, True):
            twin = duplicate(model)
            if run_first:
                twin(X)
            with steerer_of(twin, options):
                assert torch.equal(bits(twin(X)), bits(expected))
            assert torch.equal(bits(twin(X)), bits(exact()(X)))
            assert state(twin) == state(exact())
        assert torch.equal(bits(model(X)), bits(expected))


@pytest.mark.case(34)
@ways
def test_a_copy_trains_alone(options):
    model = exact()
    with steerer_of(model, options):
        expected = model(X)
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in twin.parameters():
                parameter.zero_()
        assert torch.equal(twin(X), torch.zeros(3, 4))
        assert torch.equal(bits(model(X)), bits(expected))


@pytest.mark.case(34)
@copied
def test_a_copy_inside_nested_blocks_is_the_plain_one(duplicate):
    model = exact()
    options = [{}, {"backend": "tap", "c": 2}, {"scope": "context", "c": 3}, {"sites": "2:in"}]
    blocks = [steerer_of(model, chosen).attach() for chosen in options]
    twin = duplicate(model)
    assert torch.equal(bits(twin(X)), bits(exact()(X)))
    assert state(twin) == state(exact())
    model(X)
    for block in blocks:
        block.detach()
    assert state(model) == state(exact())


@pytest.mark.case(34, 33)
@copied
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_the_users_own_hooks_are_copied_and_stay(duplicate):
    model = exact()
    model[1].register_forward_hook(double)
    expected = model(X)
    with steerer_of(model, {}):
        model[1].register_forward_hook(double)
        twin = duplicate(model)
    assert torch.equal(twin(X), model(X))
    assert not torch.equal(twin(X), expected)
    assert len(twin[1]._forward_hooks) == 2


def double(module, args, output):
    return 2 * output


@pytest.mark.case(34, 12)
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_a_copy_of_a_module_with_a_fused_kernel_is_the_plain_one(backend):
    model, x = encoder(batch_first=True), normal(2, 3, 4)
    before = state(model)
    with torch.no_grad(), Steerer(model, SteeringVector({"layers.0.linear2": DIRECTION}), backend=backend):
        twin = copy.deepcopy(model)
        assert torch.equal(twin(x), encoder(batch_first=True)(x))
        model(x)
    assert state(twin) == state(model) == before


@pytest.mark.case(34)
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_a_copy_can_be_compiled_at_once():
    model = exact()
    with steerer_of(model, {}):
        hooked = copy.deepcopy(model)
    with steerer_of(model, {"backend": "tap"}):
        patched = copy.deepcopy(model)
    import torch._dynamo

    torch._dynamo.reset()
    try:
        with torch.no_grad():
            for twin in (hooked, patched):
                for _ in range(2):
                    assert torch.equal(torch.compile(twin, backend="eager")(X), exact()(X))
    finally:
        torch._dynamo.reset()


@pytest.mark.case(34)
@copied
def test_a_copy_of_a_folded_model_keeps_what_is_folded_and_shares_nothing(duplicate):
    model = exact()
    with steerer_of(model, {"backend": "fold", "sites": "2"}):  # its documented price: it is in the weights
        expected = model(X)
        twin = duplicate(model)
    assert torch.equal(twin(X), expected)
    assert torch.equal(twin[2].bias, exact()[2].bias + DIRECTION)
    assert [m._forward_hooks for m in twin.modules()] == [m._forward_hooks for m in exact().modules()]
    with steerer_of(twin, {"backend": "fold", "sites": "2"}):
        assert torch.equal(twin[2].bias, exact()[2].bias + 2 * DIRECTION)
    assert torch.equal(twin(X), expected)
    assert state(model) == state(exact())


# --- of a Steerer ------------------------------------------------------------------------------------------------
BANK = VectorBank({"a": V.select("1", "2"), "b": SteeringVector({"1": torch.ones(4)})})


@pytest.mark.case(34)
@copied
@pytest.mark.parametrize("attached", [False, True], ids=["idle", "attached"])
@pytest.mark.parametrize("c", [2.0, {"b": torch.tensor([0.0, 1.0, 2.0])}], ids=["number", "rows of one"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"backend": "tap"},
        {"scope": "context"},
        {"sites": "1"},
        {"intervention": mirror},
        {"axis": -1},
        {"axis": {"2": -1}},
        {"strict": False},
        {"gate": WAYS["gated"]["gate"]},
        {"gate": {"a": WAYS["gated"]["gate"]}},
    ],
    ids=lambda options: ", ".join(options) or "plain",
)
def test_a_copy_of_a_steerer_steers_its_own_copy_of_the_model_in_the_same_way(duplicate, attached, c, options):
    model = exact()
    steerer = Steerer(model, BANK, c=c, **options)
    with steerer:
        expected = model(X)
    if attached:
        steerer.attach()
    other = duplicate(steerer)
    assert not other.attached
    assert steerer.attached is attached
    assert other.model is not model
    assert other.sites == steerer.sites
    assert str(other.c) == str(steerer.c)
    assert torch.equal(other.model(X), exact()(X))
    with other:
        assert torch.equal(other.model(X), expected)
        other.c = 0.0
    assert state(other.model) == state(exact())
    if attached:
        assert torch.equal(model(X), expected)
    steerer.detach()
    assert state(model) == state(exact())


@pytest.mark.case(34)
@copied
def test_model_and_steerer_copied_together_stay_together(duplicate):
    model = exact()
    with Steerer(model, BANK) as steerer:
        twin, other = duplicate((model, steerer))
        assert other.model is twin
        with other:
            assert torch.equal(twin(X), model(X))


@pytest.mark.case(34, 27)
@copied
def test_a_copy_of_a_steerer_keeps_its_trained_directions(duplicate):
    steerer = Steerer(exact(), BANK)
    with torch.no_grad():
        for directions in steerer.requires_grad_().values():
            directions.mul_(3)
    with steerer:
        expected = steerer.model(X)
    with duplicate(steerer) as other:
        assert torch.equal(other.model(X), expected)


@pytest.mark.case(34)
@copied
def test_a_copy_of_an_installed_steerer_is_not_installed(duplicate):
    steerer = Steerer(exact(), BANK, backend="buffer").install()
    other = duplicate(steerer)
    assert torch.equal(other.model(X), exact()(X))
    assert state(other.model) == state(exact())
    with other.install(), steerer:
        assert torch.equal(other.model(X), steerer.model(X))
    other.uninstall()
    steerer.uninstall()
    assert state(steerer.model) == state(other.model) == state(exact())


# --- shallow copies, replicas and quantised copies ---------------------------------------------------------------
def with_zeros(module):
    """The module with weights of its own, which are zeros."""
    for name, parameter in list(module._parameters.items()):
        module._parameters[name] = torch.nn.Parameter(torch.zeros_like(parameter))
    return module


@pytest.mark.case(34)
@pytest.mark.parametrize("site", ["2", "2:in"])
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
@pytest.mark.parametrize("scope", ["process", "context"])
def test_a_shallow_copy_is_plain_and_has_its_own_weights(site, backend, scope):
    model = exact()
    options = {"sites": site, "backend": backend, "scope": "process" if backend == "buffer" else scope}
    with steerer_of(model, options):
        expected = model(X)
        twin = copy.copy(model[2])
        assert torch.equal(bits(twin(X)), bits(exact()[2](X)))
        assert not with_zeros(twin)(X).any()
        assert torch.equal(model(X), expected)
        assert type(twin) is torch.nn.Linear
        assert sorted(vars(twin)) == sorted(vars(exact()[2]))
    assert not with_zeros(twin)(X).any()
    assert torch.equal(bits(model(X)), bits(exact()(X)))
    assert state(model) == state(exact())


@pytest.mark.case(34)
@pytest.mark.parametrize("site", ["2", "2:in"])
@pytest.mark.parametrize("options", [{}, {"backend": "hook"}, {"c": torch.tensor([1.0, 0.0, -2.0])}], ids=str)
def test_a_replica_is_steered_and_computes_with_its_own_weights(site, options):
    model = exact()
    with steerer_of(model, {"sites": site} | options) as steerer:
        c = steerer.c[:, None] if isinstance(steerer.c, torch.Tensor) else 1.0
        replica = model[2]._replicate_for_data_parallel()
        for name, parameter in model[2]._parameters.items():
            setattr(replica, name, 2 * parameter.detach())  # as DataParallel gives it those of another device
        shift = c * DIRECTION
        wanted = 2 * exact()[2](X) + shift if site == "2" else 2 * exact()[2](X + shift)
        torch.testing.assert_close(replica(X), wanted)
        torch.testing.assert_close(model[2](X), exact()[2](X) + shift if site == "2" else exact()[2](X + shift))
        model(X)


@pytest.mark.case(34)
@pytest.mark.parametrize("sites", ["0", "2:in", ("1", "2"), ""], ids=str)
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_quantised_copy_made_inside_the_block_is_the_plain_one(sites):
    quantised = torch.ao.quantization.quantize_dynamic
    model, x = exact().float(), X.float()
    v = SteeringVector(dict.fromkeys(["0", "1", "2", "2:in", ""], DIRECTION))
    expected = quantised(exact().float(), {torch.nn.Linear})
    with Steerer(model, v, sites=sites):
        twin = quantised(model, {torch.nn.Linear})
        model(x)
    assert [type(m) for m in twin.modules()] == [type(m) for m in expected.modules()]
    assert torch.equal(twin(x), expected(x))
