"""Training: gradients flow through the steering, and a backward pass that would recompute without it is told."""

import gc
import threading
import warnings
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from actsteer import GateError, ProjectionAbove, Steerer, SteeringVector, UnsupportedModelError, VectorBank
from tests.zoo import exact, gpt2, normal

DIRECTION = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
V = SteeringVector({"1": DIRECTION}, concept="a")
X = normal(3, 4)
WARNING = "a steered forward pass was checkpointed, and its backward pass has not run yet"


class Weight:
    """A soft gate at "0": how much, as a smooth function of the row."""

    site, per = "0", "sequence"

    def __call__(self, rows):
        return rows.sum(dim=1).sigmoid()


def project(h, v, c):
    """h -> h + c (h · v) v, which saves the direction for the backward pass."""
    return h + c * (h @ v)[..., None] * v


OPTIONS = {
    "number": {"c": 0.5},
    "rows": {"c": torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)},
    "gated": {"c": 0.5, "gate": Weight()},
    "projecting": {"c": 0.125, "intervention": project},
    "projecting and gated": {"c": 0.125, "intervention": project, "gate": Weight()},
    "patched": {"c": 0.5, "backend": "tap"},
    "buffer": {"c": 0.5, "backend": "buffer"},
    "input": {"c": 0.5, "sites": "1:in"},
}
each = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())


def smooth():
    """A model without kinks, so that finite differences are good everywhere."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)).double().eval()


def vector(options):
    """The vector at the site that the options choose, and the options without it."""
    return SteeringVector({options.get("sites", "1"): DIRECTION}), {k: o for k, o in options.items() if k != "sites"}


# --- against finite differences ----------------------------------------------------------------------------------
@pytest.mark.case(27)
@each
def test_gradients_to_input_and_parameters_agree_with_finite_differences(options):
    model = smooth()
    v, options = vector(options)
    names = [name for name, _ in model.named_parameters()]

    def output(x, *parameters):
        with Steerer(model, v, **options):
            return functional_call(model, dict(zip(names, parameters, strict=True)), x)

    inputs = (X.clone().requires_grad_(), *(p.detach().clone().requires_grad_() for p in model.parameters()))
    assert torch.autograd.gradcheck(output, inputs)


@pytest.mark.case(27)
@each
def test_gradients_to_the_directions_agree_with_finite_differences(options):
    model = smooth().requires_grad_(requires_grad=False)
    v, options = vector(options)
    (site,) = v.sites
    bank = VectorBank({"a": v, "b": SteeringVector({site: normal(4, seed=5)})})
    with Steerer(model, bank, **options) as steerer:
        directions = steerer.requires_grad_()[site]
        assert directions.is_leaf
        assert directions.shape == (2, 4)
        model(X).square().sum().backward()
        for index in [(0, 0), (0, 3), (1, 1)]:
            values = []
            for step in (1e-6, -2e-6):
                with torch.no_grad():
                    directions[index] += step
                    values.append(model(X).square().sum().item())
            with torch.no_grad():
                directions[index] += 1e-6
            assert directions.grad[index].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-5, abs=1e-6)


# --- training the directions -------------------------------------------------------------------------------------
def sums(x, v):
    """exact() by hand, with v added at "1"."""
    model = exact()
    return model[2:](model[:2](x) + v)


@pytest.mark.case(27)
@pytest.mark.parametrize("backend", ["auto", "tap", "buffer"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_several_steps_are_those_of_a_model_with_its_own_parameter(backend, gated):
    model, plain = smooth().requires_grad_(requires_grad=False), smooth().requires_grad_(requires_grad=False)
    own = DIRECTION.clone().requires_grad_()
    by_hand = torch.optim.SGD([own], lr=0.25, momentum=0.5)
    with Steerer(model, V, c=0.5, backend=backend, gate=Weight() if gated else None) as steerer:
        directions = steerer.requires_grad_()["1"]
        optimizer = torch.optim.SGD([directions], lr=0.25, momentum=0.5)
        for _ in range(4):
            for chosen in (optimizer, by_hand):
                chosen.zero_grad()
            losses = []
            for x in (X, -X):
                hidden = plain[0](x)
                weight = hidden.sum(dim=1).sigmoid()[:, None] if gated else 1.0
                expected = plain[2](plain[1](hidden) + 0.5 * weight * own)
                with torch.no_grad():
                    torch.testing.assert_close(model(x), expected)
                losses.append((model(x).square().mean(), expected.square().mean()))
            for steered, expected in losses:
                steered.backward()
                expected.backward()
            torch.testing.assert_close(directions.grad[0], own.grad)
            optimizer.step()
            by_hand.step()
            torch.testing.assert_close(directions[0], own)


@pytest.mark.case(27)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_an_evaluation_between_the_steps_sees_the_new_direction_and_costs_no_gradient(mode):
    model = exact().requires_grad_(requires_grad=False)
    with Steerer(model, V) as steerer:
        directions = steerer.requires_grad_()["1"]
        for _ in range(3):
            with mode():
                assert torch.equal(model(X), sums(X, directions[0]))
            (gradient,) = torch.autograd.grad(model(X).sum(), directions)
            assert gradient.any()
            with torch.no_grad():
                directions.mul_(2)


@pytest.mark.case(27)
def test_directions_that_were_trained_and_frozen_again_stay_what_they_have_become():
    model = exact()
    with Steerer(model, V) as steerer:
        directions = steerer.requires_grad_()["1"]
        with torch.no_grad():
            directions.mul_(3)
        directions.requires_grad_(requires_grad=False)
        assert torch.equal(model(X), sums(X, 3 * DIRECTION))
        steerer.c = 2.0
        assert torch.equal(model(X), sums(X, 6 * DIRECTION))
    with steerer:
        assert torch.equal(model(X), sums(X, 6 * DIRECTION))


@pytest.mark.case(27)
def test_asking_twice_for_gradients_keeps_what_the_optimizer_holds():
    model = exact()
    with Steerer(model, V) as steerer:
        directions = steerer.requires_grad_()["1"]
        steerer.requires_grad_()
        with torch.no_grad():
            directions.mul_(3)
        assert torch.equal(model(X), sums(X, 3 * DIRECTION))


@pytest.mark.case(27)
def test_a_new_strength_scales_the_gradient_of_trained_directions():
    model = nn.Sequential(nn.Identity())
    with Steerer(model, SteeringVector({"0": torch.ones(4, dtype=torch.float64)})) as steerer:
        directions = steerer.requires_grad_()["0"]
        for c in (2.0, -0.5, 0.0):
            steerer.c = c
            (gradient,) = torch.autograd.grad(model(X).sum(), directions)
            assert torch.equal(gradient, torch.full((1, 4), 3 * c, dtype=torch.float64))


@pytest.mark.case(27)
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_training_the_vector_leaves_the_bank_as_it_was():
    bank = VectorBank({"a": V})
    with Steerer(exact(), bank) as steerer:
        directions = steerer.requires_grad_()["1"]
        with torch.no_grad():
            directions.zero_()
    assert torch.equal(bank["a"]["1"], DIRECTION)


@pytest.mark.case(27)
def test_gradients_to_a_folded_direction_are_refused():
    model = exact()
    bias = model[0].bias.detach().clone()
    steerer = Steerer(model, SteeringVector({"0": torch.ones(4)}), backend="fold").attach()
    with pytest.raises(UnsupportedModelError, match="fold"):
        steerer.requires_grad_()
    steerer.detach()
    assert torch.equal(model[0].bias, bias)


# --- training the model ------------------------------------------------------------------------------------------
@pytest.mark.case(27)
@pytest.mark.parametrize("backend", ["auto", "tap", "buffer"])
def test_training_a_steered_model_is_training_one_with_the_shift_written_in(backend):
    class Written(nn.Module):
        def forward(self, x):
            return x.relu() + 0.5 * DIRECTION

    steered, written = exact().train(), exact().train()
    written[1] = Written()
    with Steerer(steered, V, c=0.5, backend=backend):
        for model in (steered, written):
            optimizer = torch.optim.SGD(model.parameters(), lr=2**-10)
            for _ in range(3):
                optimizer.zero_grad()
                model(X).square().sum().backward()
                optimizer.step()
    for one, other in zip(steered.parameters(), written.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.case(27)
def test_a_backward_pass_after_the_block_is_right_without_checkpointing():
    model = exact()
    with Steerer(model, V):
        outside, inside = model(X), model(X)
        expected = torch.autograd.grad(inside.square().sum(), list(model.parameters()))
    got = torch.autograd.grad(outside.square().sum(), list(model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- checkpointing -----------------------------------------------------------------------------------------------
reentrant = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def gradients(model, x, output):
    model.zero_grad()
    x.grad = None
    output.square().sum().backward()
    return [x.grad.clone(), *(parameter.grad.clone() for parameter in model.parameters())]


@pytest.mark.case(51)
@reentrant
@each
def test_a_backward_pass_inside_the_block_recomputes_with_the_steering(reentrant, options):
    model, x = exact().train(), X.clone().requires_grad_()
    v, options = vector(options)
    with Steerer(model, v, **options):
        for _ in range(2):
            got = gradients(model, x, checkpoint(model, x, use_reentrant=reentrant))
            expected = gradients(model, x, model(x))
            for a, b in zip(got, expected, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.case(51)
@reentrant
def test_each_of_several_checkpoints_inside_the_block_recomputes_with_the_steering(reentrant):
    model, x = exact().train(), X.clone().requires_grad_()
    v = SteeringVector({"1": DIRECTION, "3": -DIRECTION})

    def parts(x):
        first = checkpoint(model[:2], x, use_reentrant=reentrant)
        return model[4](checkpoint(model[2:4], first, use_reentrant=reentrant))

    with Steerer(model, v, strict=False):
        got = gradients(model, x, parts(x))
        expected = gradients(model, x, model(x))
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.case(51)
@reentrant
@pytest.mark.parametrize("backend", ["auto", "tap", "buffer"])
@pytest.mark.parametrize(
    "before",
    ["nothing", "a plain pass", "a pass without gradients", "a pass in inference mode", "a complete checkpoint"],
)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_leaving_before_the_backward_pass_is_warned_about(reentrant, backend, before, training):
    model, x = exact().train(mode=training), X.clone().requires_grad_()
    steerer = Steerer(model, V, backend=backend).attach()
    if before == "a complete checkpoint":
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
    elif before != "nothing":
        modes = {"a pass without gradients": torch.no_grad, "a pass in inference mode": torch.inference_mode}
        with modes.get(before, nullcontext)():
            model(x)
            model(x)
    output = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.warns(UserWarning, match=WARNING):
        steerer.detach()
    del output
    with steerer:  # once is enough
        model(x)


@pytest.mark.case(51)
@reentrant
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("intervention", [None, project], ids=["Add", "projecting"])
@pytest.mark.parametrize("site", ["0:in", "0", "1:in", "1", ""])
def test_leaving_is_warned_about_at_every_kind_of_site(reentrant, backend, gated, intervention, site):
    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.add_module("0", nn.LSTM(4, 4, batch_first=True))
            self.add_module("1", nn.Linear(4, 4))

        def forward(self, x):
            return self.get_submodule("1")(self.get_submodule("0")(x)[0])

    model, x = Parts().double().train(), normal(2, 3, 4).requires_grad_()
    v = SteeringVector({site: DIRECTION})
    gate = ProjectionAbove(SteeringVector({"0:in": DIRECTION}), 0.0) if gated else None
    steerer = Steerer(model, v, gate=gate, intervention=intervention, backend=backend).attach()
    output = checkpoint(model, x, use_reentrant=reentrant)
    with pytest.warns(UserWarning, match=WARNING):
        steerer.detach()
    del output


@pytest.mark.case(51)
@reentrant
def test_one_of_two_backward_passes_is_not_enough(reentrant):
    model, x = exact().train(), X.clone().requires_grad_()
    steerer = Steerer(model, V).attach()
    first, second = (checkpoint(model, x, use_reentrant=reentrant) for _ in range(2))
    first.sum().backward()
    with pytest.warns(UserWarning, match=WARNING):
        steerer.detach()
    del second


@pytest.mark.case(51)
def test_a_graph_that_is_walked_twice_does_not_stand_for_another():
    model, x = exact().train(), X.clone().requires_grad_()
    steerer = Steerer(model, V).attach()
    first = checkpoint(model, x, use_reentrant=False).sum()
    first.backward(retain_graph=True)
    first.backward()
    second = checkpoint(model, x, use_reentrant=False)
    with pytest.warns(UserWarning, match=WARNING):
        steerer.detach()
    del second


@pytest.mark.case(51)
def test_a_frozen_first_part_is_recomputed_for_the_part_that_trains():
    model = exact().train()
    model[0].requires_grad_(requires_grad=False)
    with Steerer(model, V):
        checkpoint(model, X, use_reentrant=False).square().sum().backward()
        got = model[2].weight.grad.clone()
        model[2].weight.grad = None
        model(X).square().sum().backward()
        assert torch.equal(got, model[2].weight.grad)
    steerer = Steerer(model, V).attach()
    output = checkpoint(model, X, use_reentrant=False)
    with pytest.warns(UserWarning, match=WARNING):
        steerer.detach()
    del output


@pytest.mark.case(51)
@reentrant
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("wants_grad", [True, False], ids=["input with grad", "plain input"])
def test_an_evaluation_without_gradients_is_not_warned_about(reentrant, mode, wants_grad):
    model, x = exact().train(), X.clone().requires_grad_(requires_grad=wants_grad)
    with warnings.catch_warnings():  # torch warns of an input without gradients, which is not ours
        warnings.filterwarnings("ignore", message="None of the inputs have requires_grad=True")
        with Steerer(model, V), mode():
            checkpoint(model, x, use_reentrant=reentrant)


@pytest.mark.case(51)
def test_a_frozen_model_without_gradients_is_not_warned_about():
    model = exact().train().requires_grad_(requires_grad=False)
    with Steerer(model, V):
        checkpoint(model, X, use_reentrant=False)


@pytest.mark.case(51)
@reentrant
def test_a_checkpoint_that_is_not_steered_is_not_warned_about(reentrant):
    model, x = exact().train(), X.clone().requires_grad_()
    with Steerer(model, V):
        output = checkpoint(model[2:], model[:2](x), use_reentrant=reentrant)
    output.sum().backward()


@pytest.mark.case(51)
@reentrant
def test_a_block_that_an_error_ended_is_forgotten(reentrant):
    model, x = exact().train(), X.clone().requires_grad_()
    steerer = Steerer(model, V)
    steerer.attach()
    checkpoint(model, x, use_reentrant=reentrant)
    steerer.__exit__(ZeroDivisionError, ZeroDivisionError(), None)
    with steerer:
        model(x)


@pytest.mark.case(51)
@reentrant
def test_an_outer_steerer_warns_for_itself_alone(reentrant):
    model, x = exact().train(), X.clone().requires_grad_()
    with Steerer(model, V):
        inner = Steerer(model, V, c=2).attach()
        output = checkpoint(model, x, use_reentrant=reentrant)
        with pytest.warns(UserWarning, match=WARNING):
            inner.detach()
        output.sum().backward()


@pytest.mark.case(51)
@reentrant
def test_trained_directions_get_the_same_gradients_from_a_checkpoint(reentrant):
    model, x = exact().train(), X.clone().requires_grad_()
    found = []
    with Steerer(model, V) as steerer:
        directions = steerer.requires_grad_()["1"]
        for run in (lambda: checkpoint(model, x, use_reentrant=reentrant), lambda: model(x)):
            directions.grad = None
            run().square().sum().backward()
            found.append(directions.grad)
    assert torch.equal(*found)


class Gated(nn.Module):
    """ "first" is run outside of the checkpoint around "second"."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.Tanh())

    def forward(self, x, reentrant=None):
        hidden = self.first(x)
        return self.second(hidden) if reentrant is None else checkpoint(self.second, hidden, use_reentrant=reentrant)


@pytest.mark.case(51)
@reentrant
def test_a_gate_outside_of_the_checkpoint_is_right_or_refused(reentrant):
    model, x = Gated().double(), X.clone().requires_grad_()
    gate = ProjectionAbove(SteeringVector({"first": DIRECTION}), 0.0)
    v = SteeringVector({"second.0": DIRECTION})
    with Steerer(model, v, gate=gate):
        expected = gradients(model, x, model(x))
    try:
        with Steerer(model, v, gate=gate):
            got = gradients(model, x, model(x, reentrant))
    except GateError as error:
        assert "checkpoint" in str(error)  # noqa: PT017
    else:
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.case(51)
@reentrant
@pytest.mark.parametrize("site", ["transformer.h.1", "transformer.h.0.mlp", "transformer.h.1:in", "transformer.ln_f"])
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")  # torch's own
def test_a_transformers_model_with_gradient_checkpointing(reentrant, site, backend):
    model, tokens = gpt2().train(), torch.tensor([[1, 5, 3, 2]])
    for dropout in (module for module in model.modules() if isinstance(module, nn.Dropout)):
        dropout.p = 0.0
    v = SteeringVector({site: normal(8)})

    def loss():
        model.zero_grad()
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def run(value):
        value.backward()
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    def agree(got, expected):
        return len(got) == len(expected) and all(map(torch.allclose, got, expected))

    plain = run(loss())
    with Steerer(model, v, backend=backend):
        expected = run(loss())
        assert not agree(plain, expected)
        if hasattr(model, "activation_checkpointing_enable"):  # transformers 5.20 and newer
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": reentrant})
        else:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        assert agree(run(loss()), expected)
    steerer = Steerer(model, v, backend=backend).attach()
    value = loss()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steerer.detach()
    if not any(WARNING in str(warning.message) for warning in caught):
        assert agree(run(value), expected)  # the edit is outside of every checkpoint, and what came of it is kept
    with Steerer(model, v, backend=backend), torch.no_grad():
        loss()
    with Steerer(model.eval(), v, backend=backend):
        loss()


@pytest.mark.case(51)
@reentrant
def test_a_thread_scope_recomputed_by_another_thread_is_refused_or_right(reentrant):
    model, x = exact().train(), X.clone().requires_grad_()
    with Steerer(model, V, scope="context"):
        expected = gradients(model, x, model(x))
        try:
            loss = checkpoint(model, x, use_reentrant=reentrant).square().sum()
        except UnsupportedModelError as error:
            assert "context" in str(error)  # noqa: PT017
            return
        model.zero_grad()
        x.grad = None
        worker = threading.Thread(target=loss.backward)  # as autograd's own thread does for a GPU
        worker.start()
        worker.join()
        got = [x.grad, *(parameter.grad for parameter in model.parameters())]
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


# --- torch.func --------------------------------------------------------------------------------------------------
@pytest.mark.case(53)
@pytest.mark.parametrize("backend", ["auto", "tap", "buffer"])
@pytest.mark.parametrize("intervention", [None, project], ids=["Add", "projecting"])
def test_transforms_of_a_steered_model_are_those_of_the_model_by_hand(backend, intervention):
    model, plain = smooth(), smooth()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def by_hand(x):
        hidden = plain[:2](x)
        return plain[2](hidden + 0.5 * DIRECTION if intervention is None else project(hidden, DIRECTION, 0.5))

    with Steerer(model, V, c=0.5, backend=backend, intervention=intervention):
        for call in (model, lambda x: functional_call(model, parameters, (x,))):
            for _ in range(2):
                torch.testing.assert_close(vmap(call)(X), by_hand(X))
                torch.testing.assert_close(vmap(call)(X[:, None]), by_hand(X[:, None]))
                torch.testing.assert_close(
                    vmap(grad(lambda x, call=call: call(x).sum()))(X), vmap(grad(lambda x: by_hand(x).sum()))(X)
                )
                for got, expected in zip(jvp(call, (X,), (X,)), jvp(by_hand, (X,), (X,)), strict=True):
                    torch.testing.assert_close(got, expected)
                torch.testing.assert_close(call(X), by_hand(X))


@pytest.mark.case(53)
def test_per_sample_gradients_of_the_parameters_are_those_of_a_loop():
    model = smooth()
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(parameters, x):
        return functional_call(model, parameters, (x,)).square().sum()

    with Steerer(model, V):
        together = vmap(grad(loss), in_dims=(None, 0))(parameters, X)
        for index, x in enumerate(X):
            for name, gradient in grad(loss)(parameters, x).items():
                torch.testing.assert_close(together[name][index], gradient)


@pytest.mark.case(53)
def test_a_gate_under_vmap_needs_a_batch_inside():
    model = exact()
    with Steerer(model, V, gate=ProjectionAbove(SteeringVector({"0": DIRECTION}), 0.0)):
        expected = model(X)
        assert torch.equal(vmap(model)(X[:, None])[:, 0], expected)
        with pytest.raises(GateError, match="no axis of rows"):
            vmap(model)(X)
        assert torch.equal(model(X), expected)


@pytest.mark.case(27, 37)
def test_no_graph_is_kept_after_the_forward():
    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.token = Token()
            alive.append(weakref.ref(ctx.token))
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient

    class Token:
        pass

    alive, model, x = [], exact(), X.clone().requires_grad_()
    with Steerer(model, V, gate=Weight()) as steerer:
        steerer.requires_grad_()
        output = model(Kept.apply(x))
        assert alive[0]() is not None
        del output
        gc.collect()
        assert alive[0]() is None


# --- what changes between a checkpointed forward pass and its backward pass ----------------------------------------
@pytest.mark.case(51)
@reentrant
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
def test_a_strength_that_is_set_before_the_backward_pass_is_warned_about(reentrant, backend):
    model, x = exact().train(), X.clone().requires_grad_()
    with Steerer(model, V, backend=backend) as steerer:
        output = checkpoint(model, x, use_reentrant=reentrant)
        with pytest.warns(UserWarning, match=r"recompute the activations with another strength.*before c is set"):
            steerer.c = 2
        del output
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        steerer.c = 3


@pytest.mark.case(51)
@reentrant
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
@pytest.mark.parametrize("within", [False, True], ids=["alone", "within another block"])
def test_a_block_that_is_entered_before_the_backward_pass_is_warned_about(reentrant, backend, within):
    model, x = exact().train(), X.clone().requires_grad_()
    with Steerer(model, V, c=2, backend=backend) if within else nullcontext():
        output = checkpoint(model, x, use_reentrant=reentrant)
        steerer = Steerer(model, V, backend=backend, strict=False)
        with pytest.warns(UserWarning, match="recompute the activations with another") if within else nullcontext():
            steerer.attach()
        with pytest.warns(UserWarning, match="was checkpointed before this steering was attached"):
            output.sum().backward()
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()
        steerer.detach()
    with Steerer(model, V, backend=backend):
        checkpoint(model, x, use_reentrant=reentrant).sum().backward()


@pytest.mark.case(51)
@reentrant
@pytest.mark.parametrize("site", ["0:in", "1", "3", "4", ""])
@pytest.mark.parametrize("segments", [1, 2, 5])
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_a_checkpointed_sequence_is_steered_in_every_part(reentrant, site, segments):
    model, x = exact().train(), X.clone().requires_grad_()
    v = SteeringVector({site: DIRECTION})

    def run():
        return checkpoint_sequential(model, segments, x, use_reentrant=reentrant)

    if site == "":
        with Steerer(model, v):  # checkpoint_sequential calls the children alone
            assert torch.equal(run(), exact()(X))
        return
    with Steerer(model, v):
        got = gradients(model, x, run())
        expected = gradients(model, x, model(x))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    steerer = Steerer(model, v).attach()
    output = run()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steerer.detach()
    if not caught:  # it is in the last part, which is not checkpointed
        got = gradients(model, x, output)
        assert all(torch.allclose(a, b) for a, b in zip(got, expected, strict=True))
