"""An edit that stops applying is noticed, and numbers that others write while a fold is attached are kept.

The kind of fault: a module is replaced or merged away after it fired once, and the block ends as if all were well.
"""

import copy
import warnings

import pytest
import torch
from torch import nn

from actsteer import ActsteerError, ProjectionAbove, Steerer, SteeringNotApplied, SteeringVector
from tests.kinds.by_hand import BACKENDS, every_backend

X = torch.linspace(-1, 1, 12).view(3, 4).sin()
V = SteeringVector({"1": torch.tensor([1.0, -2.0, 0.5, 4.0])})


def small():
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(3)]).eval()
    with torch.no_grad():
        for n, parameter in enumerate(model.parameters()):
            parameter.copy_((torch.arange(parameter.numel()).view_as(parameter) * 5 % 11 - 5 + n) / 8)
    return model


def linear():
    return copy.deepcopy(small()[1])


# --- replaced --------------------------------------------------------------------------------------------------------
REPLACED = {
    "m[1] =": lambda model: model.__setitem__(1, linear()),
    "setattr": lambda model: setattr(model, "1", linear()),
    "_modules": lambda model: model._modules.update({"1": linear()}),
    "deleted": lambda model: model.__delitem__(1),
    "put around it": lambda model: model.__setitem__(1, nn.Sequential(linear())),
    "a copy of it": lambda model: model.__setitem__(1, copy.deepcopy(model[1])),
}


def noticed(block):
    """An error of the library, or a warning (which the tests make an error)."""
    with pytest.raises((ActsteerError, UserWarning)):
        block()


@every_backend
@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
@pytest.mark.parametrize("passes", [1, 3])
def test_a_module_that_is_replaced_after_it_fired(backend, replace, passes):
    model = small()

    def block():
        with torch.no_grad(), Steerer(model, V, backend=backend):
            for _ in range(passes):
                model(X)
            replace(model)
            model(X)

    noticed(block)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every_backend
def test_one_of_two_sites_that_is_replaced(backend):
    model, v = small(), SteeringVector({"0": V["1"], "1": V["1"]})

    def block():
        with torch.no_grad(), Steerer(model, v, backend=backend):
            model(X)
            model[1] = linear()
            model(X)

    with pytest.raises((SteeringNotApplied, UserWarning), match="1"):
        block()


@every_backend
def test_a_module_inside_a_block_that_is_replaced(backend):
    """The site is deeper than what is replaced."""
    model = nn.Sequential(small())

    def block():
        with torch.no_grad(), Steerer(model, SteeringVector({"0.1": V["1"]}), backend=backend):
            model(X)
            model[0] = small()
            model(X)

    noticed(block)


@every_backend
def test_a_module_that_is_put_back_goes_on_being_steered(backend):
    model, plain = small(), small()(X)
    with torch.no_grad(), Steerer(model, V, backend=backend):
        steered, old = model(X), model[1]
        model[1] = nn.Identity()
        model[1] = old
        assert torch.equal(model(X), steered)
    assert torch.equal(model(X), plain)


@every_backend
def test_a_replaced_module_is_left_plain_and_the_new_one_is_not_touched(backend):
    model, new = small(), linear()
    with torch.no_grad():
        plain_old, plain_new = linear()(X), new(X)
        with Steerer(model, V, backend=backend, strict=False):
            model(X)
            old, model[1] = model[1], new
            model(X)
    assert torch.equal(old(X), plain_old) and torch.equal(new(X), plain_new)
    assert sorted(vars(old)) == sorted(vars(new)) and type(old) is type(new) is nn.Linear


@every_backend
@pytest.mark.parametrize("replace", REPLACED.values(), ids=REPLACED)
def test_without_strict_nothing_is_said(backend, replace):
    model = small()
    with torch.no_grad(), Steerer(model, V, backend=backend, strict=False):
        model(X)
        replace(model)
        model(X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


@every_backend
def test_a_path_that_is_taken_now_and_then_is_no_reason(backend):
    """The site fired in one pass; another pass went elsewhere, as the model may."""

    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, left=True):
            return self.left(x) if left else self.right(x)

    model = Fork()
    with torch.no_grad(), Steerer(model, SteeringVector({"left": V["1"]}), backend=backend):
        model(X)
        model(X, left=False)


# --- merged ----------------------------------------------------------------------------------------------------------
class Adapter(nn.Module):
    """As PEFT's: a layer and a small change to it."""

    def __init__(self, base):
        super().__init__()
        self.base, self.change = base, nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.base(x) + self.change(x)

    def merged(self):
        layer = copy.deepcopy(self.base)
        with torch.no_grad():
            layer.weight.add_(self.change.weight)
        return layer


@every_backend
@pytest.mark.parametrize("site", ["1", "1.base", "1.change"])
def test_an_adapter_that_is_merged_away(backend, site):
    model = small()
    model[1] = Adapter(model[1])

    def block():
        with torch.no_grad(), Steerer(model, SteeringVector({site: V["1"]}), backend=backend):
            model(X)
            model[1] = model[1].merged()
            model(X)

    noticed(block)


@every_backend
@pytest.mark.filterwarnings("ignore:.*[Mm]erg.*:UserWarning")
def test_peft_s_merge_and_unload_is_steered_on_or_noticed(backend):
    """It puts the layer that the adapter held in the adapter's place."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["1"], r=2, init_lora_weights=False)
    model = peft.get_peft_model(small(), config).eval()
    outputs = []

    def block():
        with torch.no_grad(), Steerer(model, V, backend=backend):
            outputs.append(model(X))
            merged = model.merge_and_unload()
            outputs.append(merged(X))

    try:
        block()
    except (ActsteerError, UserWarning):
        return
    torch.testing.assert_close(outputs[1], outputs[0])


# --- results that the caller drops -----------------------------------------------------------------------------------
class Dropped(nn.Module):
    """Calls a module for what it does to its input."""

    def __init__(self, module):
        super().__init__()
        self.before, self.act = nn.Linear(4, 4), module

    def forward(self, x):
        h = self.before(x)
        self.act(h)
        return h


class Kept(Dropped):
    def forward(self, x):
        h = self.before(x)
        return self.act(h) + h


IN_PLACE = {
    "ReLU": lambda: nn.ReLU(inplace=True),
    "Hardtanh": lambda: nn.Hardtanh(inplace=True),
    "SiLU": lambda: nn.SiLU(inplace=True),
}
OPTIONS = {
    "plain": ({}, torch.ones(3)),
    "rows": ({"c": torch.tensor([0.0, 1.0, 2.0])}, torch.tensor([0.0, 1.0, 2.0])),
    "gated": ({"gate": ProjectionAbove(SteeringVector({"act": V["1"]}), -1e9)}, torch.ones(3)),
}


@every_backend
@pytest.mark.parametrize("build", IN_PLACE.values(), ids=IN_PLACE)
@pytest.mark.parametrize(("options", "c"), OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("kind", [Dropped, Kept])
def test_an_in_place_module_whose_result_is_dropped_is_steered(backend, build, options, c, kind):
    model = kind(build()).eval()
    v = SteeringVector({"act": V["1"]})
    with torch.no_grad():
        plain = model(X)
        want = plain + (1 if kind is Dropped else 2) * c[:, None] * V["1"]
        with Steerer(model, v, backend=backend, **options):
            torch.testing.assert_close(model(X), want)
        assert torch.equal(model(X), plain)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind", [nn.Identity, nn.Dropout, nn.Flatten, nn.ReLU], ids=lambda kind: kind.__name__)
def test_a_module_that_gives_out_its_input_does_not_change_it(backend, kind):
    """It is not in place: what the caller holds stays as it is."""

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = kind()

        def forward(self, x):
            return self.act(x), x

    model, x = Both().eval(), X.abs()
    kept = x.clone()
    with torch.no_grad(), Steerer(model, SteeringVector({"act": V["1"]}), backend=backend, axis=-1):
        steered, held = model(x)
    assert torch.equal(held, kept) and torch.equal(x, kept)
    torch.testing.assert_close(steered, kept + V["1"])


# --- a fold that finds other numbers ---------------------------------------------------------------------------------
def load(model):
    model.load_state_dict({name: value * 0 + 0.25 for name, value in model.state_dict().items()})


def step(model):
    model[1].bias.grad = torch.ones(4)
    torch.optim.SGD([model[1].bias], lr=0.5).step()


def write(model):
    with torch.no_grad():
        model[1].bias[2] = 7.0


def data(model):
    model[1].bias.data = torch.full((4,), 3.0)


CHANGES = {"load_state_dict": load, "an optimizer's step": step, "one number": write, "data": data}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_fold_keeps_the_numbers_that_others_wrote_and_warns(change):
    model = small()
    steerer = Steerer(model, V, backend="fold").attach()
    model(X)
    change(model)
    written = model[1].bias.detach().clone()
    with pytest.warns(UserWarning, match="bias"):
        steerer.detach()
    assert torch.equal(model[1].bias, written)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steerer.detach()  # once is enough
    assert torch.equal(model[1].bias, written)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_so_it_does_where_the_block_ends_by_an_error(change):
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        written = []

        def block():
            with Steerer(model, V, backend="fold"):
                change(model)
                written.append(model[1].bias.detach().clone())
                raise RuntimeError("stop")

        with pytest.raises(RuntimeError, match="stop"):
            block()
    assert torch.equal(model[1].bias, written[0])


def test_a_fold_that_finds_its_own_numbers_says_nothing_and_restores_every_bit():
    model, bias = small(), small()[1].bias.detach().clone()
    with torch.no_grad(), Steerer(model, V, c=0.1, backend="fold") as steerer:
        for c in (3.0, 1e-3, 0.7):
            steerer.c = c
            model(X)
        state = model.state_dict()
        model.load_state_dict(state)  # the same numbers
    assert torch.equal(model[1].bias, bias)


def test_a_bias_that_is_another_parameter_now_is_kept():
    model = small()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.no_grad(), Steerer(model, V, backend="fold", strict=False):
            model(X)
            model[1].bias = nn.Parameter(torch.full((4,), 3.0))
    assert model[1].bias.tolist() == [3.0] * 4


def test_of_two_sites_the_other_is_restored():
    model, v = small(), SteeringVector({"0": V["1"], "1": V["1"]})
    bias = model[0].bias.detach().clone()
    steerer = Steerer(model, v, backend="fold").attach()
    write(model)
    with pytest.warns(UserWarning, match="bias"):
        steerer.detach()
    assert torch.equal(model[0].bias, bias) and model[1].bias[2].item() == 7.0
