"""accelerate's offloading: parameters on the meta device until a forward pass, which accelerate has patched."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actsteer import (
    ProjectionAbove,
    Steerer,
    SteeringVector,
    UnsupportedModelError,
    collect,
    fit,
    optimize,
    record,
)
from tests.zoo import exact, gpt2, normal

accelerate = pytest.importorskip("accelerate")

X = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.0, 1.0, -1.0, 0.5], [-1.0, 0.125, 3.0, 0.0]], dtype=torch.float64)
DIRECTION = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
TOKENS = torch.tensor([[1, 5, 9, 2], [3, 3, 16, 8], [7, 0, 4, 11]])


def cpu_offloaded(model):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"))


def cpu_offloaded_with_buffers(model):
    return accelerate.cpu_offload(model, execution_device=torch.device("cpu"), offload_buffers=True)


def hooked(model):
    accelerate.hooks.add_hook_to_module(model[0], accelerate.hooks.ModelHook())
    return model


def undone(model):
    accelerate.hooks.remove_hook_from_submodules(model)
    return model


OFFLOADS = [cpu_offloaded, cpu_offloaded_with_buffers]
SITES = ["0", "1", "2", "4", "2:in"]
OPTIONS = {
    "number": {"c": 1.5},
    "rows": {"c": torch.tensor([0.0, 2.0, -1.0])},
    "gate": {"gate": ProjectionAbove(SteeringVector({"0": DIRECTION}), -0.5)},
}


def steered(model, x, vectors, **options):
    with Steerer(model, vectors, **options), torch.no_grad():
        return model(x)


def slots(model):
    """What lies on every module of the model: accelerate's hook, its forward, the devices of its parameters."""
    return {
        name: (
            getattr(module, "_hf_hook", None),
            getattr(module, "_old_forward", None),
            module.__dict__.get("forward"),
            [parameter.device.type for parameter in module._parameters.values()],
        )
        for name, module in model.named_modules()
    }


@pytest.mark.case(43)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("backend", ["hook", "tap", "auto"])
@pytest.mark.parametrize("offload", OFFLOADS)
def test_an_offloaded_model_is_steered_as_the_whole_one(offload, backend, site, options):
    v = SteeringVector({site: DIRECTION})
    model, plain = offload(exact()), exact()(X)
    before = slots(model)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(steered(model, X, v, backend=backend, **options), steered(exact(), X, v, **options))
    assert slots(model) == before
    assert torch.equal(model(X), plain)


@pytest.mark.case(43)
@pytest.mark.parametrize("offload", OFFLOADS)
@pytest.mark.parametrize("site", ["0", "2"])
def test_folding_into_an_offloaded_bias_is_refused(offload, site):
    model = offload(exact())
    before = slots(model)
    with pytest.raises(UnsupportedModelError, match=rf"site '{site}' cannot be folded: .* not on this device"):
        Steerer(model, SteeringVector({site: DIRECTION}), backend="fold")
    assert slots(model) == before
    assert torch.equal(model(X), exact()(X))


@pytest.mark.case(36)
def test_folding_under_accelerates_own_forward_is_refused():
    with pytest.raises(UnsupportedModelError, match="cannot be folded"):
        Steerer(hooked(exact()), SteeringVector({"0": DIRECTION}), backend="fold")


@pytest.mark.case(43)
@pytest.mark.parametrize("offload", OFFLOADS)
def test_statistics_of_an_offloaded_model_are_those_of_the_whole_one(offload):
    sites = ["0", "1", "2:in", "4"]
    expected = collect(exact(), X, sites=sites, covariance=True, progress=False)
    model = offload(exact())
    before = slots(model)
    seen = collect(model, X, sites=sites, covariance=True, progress=False)
    for site in expected:
        assert seen[site].count == expected[site].count
        assert torch.equal(seen[site].mean, expected[site].mean)
        assert torch.equal(seen[site].covariance, expected[site].covariance)
    rows = record(model, X, sites=sites, progress=False)
    assert all(
        torch.equal(rows[site], truth) for site, truth in record(exact(), X, sites=sites, progress=False).items()
    )
    assert slots(model) == before


@pytest.mark.case(43)
def test_an_offloaded_model_can_be_fitted_and_optimized():
    options = {"sites": "2", "progress": False}
    model = cpu_offloaded(exact())
    expected = fit(exact(), positive=X, negative=X.flip(0) / 2, **options)
    assert fit(model, positive=X, negative=X.flip(0) / 2, **options).equal(expected)

    def loss(output):
        return output.square().mean()

    before = slots(model)
    trained = optimize(model, [X], loss=loss, lr=0.25, steps=3, **options)
    assert trained.equal(optimize(exact(), [X], loss=loss, lr=0.25, steps=3, **options))
    assert slots(model) == before


# --- the order of the two --------------------------------------------------------------------------------------------
@pytest.mark.case(36)
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.parametrize("site", SITES)
def test_offloading_inside_the_block_keeps_the_steering(site, backend):
    v, model = SteeringVector({site: DIRECTION}), exact()
    expected = steered(exact(), X, v)
    steerer = Steerer(model, v, backend=backend).attach()
    cpu_offloaded(model)
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    if backend == "hook" or site == "1":  # accelerate leaves modules without parameters alone
        steerer.detach()
    else:
        with pytest.warns(UserWarning, match="the forward of .* was replaced while it was steered"):
            steerer.detach()
    assert torch.equal(model(X), exact()(X))


@pytest.mark.case(36)
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.parametrize("site", SITES)
def test_offloading_that_comes_and_goes_inside_the_block_leaves_nothing(site, backend):
    v, model = SteeringVector({site: DIRECTION}), exact()
    with Steerer(model, v, backend=backend), torch.no_grad():
        expected = model(X)
        undone(cpu_offloaded(model))
        assert torch.equal(model(X), expected)
    assert torch.equal(model(X), exact()(X))


@pytest.mark.case(36)
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.parametrize("site", SITES)
def test_offloading_that_ends_inside_the_block_leaves_the_steering_or_says_so(site, backend):
    """accelerate puts the forward back that it found, and with it covers a tap that came later."""
    v, model = SteeringVector({site: DIRECTION}), cpu_offloaded(exact())
    expected = steered(exact(), X, v)
    steerer = Steerer(model, v, backend=backend).attach()
    undone(model)
    with torch.no_grad():
        output = model(X)
    if torch.equal(output, expected):
        steerer.detach()
    else:
        assert backend == "tap"
        with pytest.warns(UserWarning, match="was replaced while it was steered"):
            steerer.detach()
    assert torch.equal(model(X), exact()(X))
    assert all("forward" not in vars(module) or module.forward.__self__ is module for module in model.modules())


@pytest.mark.case(36)
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_accelerates_hooks_see_the_same_order_before_and_after(backend):
    """A hook of accelerate's runs inside of the steering when it was there first."""

    class Doubling(accelerate.hooks.ModelHook):
        def post_forward(self, module, output):
            return output * 2

    model, v = exact(), SteeringVector({"0": DIRECTION})
    accelerate.hooks.add_hook_to_module(model[0], Doubling())
    expected = model[4](model[3](model[2](model[1](model[0](X) + DIRECTION))))
    assert torch.equal(steered(model, X, v, backend=backend), expected)
    assert type(model[0]._hf_hook) is Doubling


# --- a language model ------------------------------------------------------------------------------------------------
@pytest.mark.case(43, 39)
@pytest.mark.filterwarnings("ignore:You are calling .generate.. with the `input_ids` being on a device")  # before 5.20
def test_an_offloaded_language_model_generates_as_the_whole_one():
    v = SteeringVector({"transformer.h.0": normal(8, seed=2)})
    options = {"max_new_tokens": 4, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    with Steerer(gpt2(), v, c=3) as whole:
        expected = whole.model.generate(TOKENS, **options)
    model = cpu_offloaded(gpt2())
    with Steerer(model, v, c=3):
        assert torch.equal(model.generate(TOKENS, **options), expected)
    assert not torch.equal(model.generate(TOKENS, **options), expected)


@pytest.mark.case(43)
@pytest.mark.parametrize("dispatched", ["cpu", "disk"])
def test_a_dispatched_model_is_steered_as_the_whole_one(dispatched, tmp_path):
    model = gpt2()
    v = SteeringVector({"transformer.h.1": normal(8, seed=2), "transformer.h.0.mlp": normal(8, seed=3)})
    expected = steered(gpt2(), TOKENS, v, c=3).logits
    if dispatched == "disk":
        accelerate.disk_offload(model, str(tmp_path), execution_device=torch.device("cpu"))
    else:
        parts = ["wte", "wpe", "drop", "h.0", "h.1", "ln_f"]
        device_map = {f"transformer.{part}": "cpu" for part in parts} | {"lm_head": "cpu"}
        accelerate.dispatch_model(model, device_map, main_device="cpu", force_hooks=True)
    assert any(hasattr(module, "_hf_hook") for module in model.transformer.h[1].modules())
    assert torch.equal(steered(model, TOKENS, v, c=3).logits, expected)


@pytest.mark.case(43)
def test_a_module_with_tied_parameters_is_steered():
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)).double()
    model[2].weight = model[0].weight
    v = SteeringVector({"0": DIRECTION, "2": DIRECTION})
    expected = steered(model, X, v)
    assert torch.equal(steered(cpu_offloaded(model), X, v), expected)
