"""The fold backend: c · v in the bias, where that is the same, and the bias put back bit for bit."""

import itertools
import warnings

import pytest
import torch
from torch import nn

from actsteer import Ablate, ProjectionAbove, Steerer, SteeringVector, StrengthError, UnsupportedModelError, VectorBank
from tests.oracles import state
from tests.zoo import bits, exact, normal

X = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)
D = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
V = SteeringVector({"2": D})
ROWS = torch.tensor([2.0, -1.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def folded(model, vectors=V, **options):
    return Steerer(model, vectors, backend="fold", **options)


def rand(*shape):
    return torch.randint(-8, 9, shape, generator=torch.Generator().manual_seed(0)).double() / 8


def conv1d():
    transformers = pytest.importorskip("transformers")
    return transformers.pytorch_utils.Conv1D(4, 3)


class Tall(nn.Linear):
    """A subclass that keeps its parent's forward."""


MODULES = {
    "linear": (lambda: nn.Linear(3, 4), (2, 3), -1),
    "linear on sequences": (lambda: nn.Linear(3, 4), (2, 5, 3), -1),
    "linear without bias": (lambda: nn.Linear(3, 4, bias=False), (2, 3), -1),
    "a subclass of linear": (lambda: Tall(3, 4), (2, 3), -1),
    "conv1d": (lambda: nn.Conv1d(3, 4, 3, padding=1), (2, 3, 4), 1),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), (2, 3, 4, 4), 1),
    "conv2d without bias": (lambda: nn.Conv2d(3, 4, 1, bias=False), (2, 3, 4, 4), 1),
    "conv3d": (lambda: nn.Conv3d(3, 4, 1), (2, 3, 4, 4, 4), 1),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(3, 4, 2), (2, 3, 4, 4), 1),
    "transposed conv1d without bias": (lambda: nn.ConvTranspose1d(3, 4, 2, bias=False), (2, 3, 4), 1),
    "layer norm": (lambda: nn.LayerNorm(4), (2, 5, 4), -1),
    "layer norm without bias": (lambda: nn.LayerNorm(4, bias=False), (2, 5, 4), -1),
    "group norm": (lambda: nn.GroupNorm(2, 4), (2, 4, 3), 1),
    "batch norm 1d": (lambda: nn.BatchNorm1d(4), (3, 4), 1),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4), (2, 4, 4, 4), 1),
    "transformers' Conv1D": (conv1d, (2, 5, 3), -1),
}
modules = pytest.mark.parametrize(("build", "shape", "axis"), MODULES.values(), ids=MODULES)


def along(d, axis, rank):
    return d.reshape([-1 if a == axis % rank else 1 for a in range(rank)])


@modules
def test_a_fold_is_adding_by_hand_and_leaves_no_trace(build, shape, axis):
    model, x = nn.Sequential(build()).double().eval(), rand(*shape)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rand(*parameter.shape))
    before, plain = state(model), model(x).detach()
    for c in (2.0, -0.5, 4.0):
        with folded(model, SteeringVector({"0": D}), c=c):
            torch.testing.assert_close(model(x), plain + c * along(D, axis, plain.ndim), rtol=0, atol=1e-12)
        assert torch.equal(bits(model(x)), bits(plain))
    assert state(model) == before


@pytest.mark.case(28)
@modules
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_strength_zero_is_bit_for_bit_the_unsteered_module(build, shape, axis, dtype):
    model, x = nn.Sequential(build()).to(dtype).eval(), normal(*shape).to(dtype)
    plain = model(x)
    with folded(model, SteeringVector({"0": D}), c=0.0):
        assert torch.equal(bits(model(x)), bits(plain))


@pytest.mark.case(28)
def test_strength_zero_keeps_minus_zero_where_there_was_no_bias():
    model = nn.Sequential(nn.Conv1d(4, 4, 1, groups=4, bias=False))
    with torch.no_grad():
        model[0].weight.fill_(-1)
    x = torch.zeros(1, 4, 2)
    plain = model(x)
    with folded(model, SteeringVector({"0": D}), c=0.0):
        assert torch.equal(bits(model(x)), bits(plain))


@pytest.mark.case(29)
@pytest.mark.parametrize("c", [2.0, -0.5, 0.0])
def test_hook_patch_buffer_and_fold_are_one_bit_for_bit_where_sums_are_exact(c):
    results = []
    for backend in ("hook", "tap", "buffer", "fold"):
        model = exact()
        with Steerer(model, SteeringVector({"0": D, "2": -D, "4": D}), c=c, backend=backend):
            results.append(bits(model(X)))
    for one, other in itertools.pairwise(results):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fifty_cycles_leave_the_bias_bit_for_bit(dtype):
    model = nn.Sequential(nn.Linear(4, 4)).to(dtype).eval()
    with torch.no_grad():
        model[0].bias.copy_(normal(4))
    bias = bits(model[0].bias.clone())
    steerer = folded(model, SteeringVector({"0": 100 * normal(4, seed=3)}))
    for step in range(50):
        with steerer:
            steerer.c = step / 7
            assert not torch.equal(bits(model[0].bias), bias) or step == 0
        assert torch.equal(bits(model[0].bias), bias)


def test_a_change_of_strength_starts_from_the_original_bias():
    model = nn.Sequential(nn.Linear(4, 4)).bfloat16().eval()
    bias = model[0].bias.detach().clone()
    v = SteeringVector({"0": normal(4).float()})
    with folded(model, v) as steerer:
        for c in (1000.0, -3.0, 0.5, 1000.0, 0.0):
            steerer.c = c
            if c == 0:
                assert torch.equal(bits(model[0].bias), bits(bias))
            else:
                assert torch.equal(model[0].bias, (bias + c * v["0"]).bfloat16())


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
@pytest.mark.parametrize("bias", [True, False])
def test_nested_folds_leave_in_any_order(order, bias):
    model = nn.Sequential(nn.Linear(4, 4, bias=bias)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(rand(*parameter.shape))
    before, plain = state(model), model(X).detach()
    strengths = [1.0, -2.0, 8.0]
    steerers = [folded(model, SteeringVector({"0": D}), c=c).attach() for c in strengths]
    for index in order:
        assert torch.equal(model(X), plain + sum(strengths) * D)
        steerers[index].c = 0.5
        assert torch.equal(model(X), plain + (sum(strengths) - strengths[index] + 0.5) * D)
        steerers[index].detach()
        strengths[index] = 0.0
    assert torch.equal(model(X), plain)
    assert state(model) == before


def test_folds_and_hooks_and_concepts_add_up():
    model = exact()
    bank = VectorBank({"a": SteeringVector({"0": D, "2": D}), "b": SteeringVector({"2": -4 * D})})
    with folded(model, bank, c={"a": 2.0, "b": 0.5}), Steerer(model, SteeringVector({"1": D, "2": D})):
        both = model(X)
    twin = exact()
    with Steerer(twin, SteeringVector({"0": 2 * D, "1": D, "2": D})):
        assert torch.equal(both, twin(X))
    assert torch.equal(model(X), exact()(X))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_inside_the_block_puts_the_bias_back(error):
    model = exact()
    before = state(model)

    def steer_and_fail() -> None:
        with folded(model) as steerer:
            steerer.c = 3
            raise error

    with pytest.raises(error):
        steer_and_fail()
    assert state(model) == before


def test_the_bias_keeps_its_identity_and_its_gradient():
    model = exact()
    bias, before = model[2].bias, {name: id(p) for name, p in model.named_parameters()}
    model(X).sum().backward()
    gradient = bias.grad.clone()
    with folded(model, c=2):
        assert {name: id(p) for name, p in model.named_parameters()} == before
        assert bias.requires_grad
        model(X).sum().backward()
    assert model[2].bias is bias and not torch.equal(bias.grad, gradient)


def test_the_model_may_change_its_dtype_while_it_is_folded():
    model = exact()
    with folded(model, c=2):
        model.float()
        assert model(X.float()).dtype is torch.float32
    assert torch.equal(model(X.float()), exact().float()(X.float()))


def test_nobody_can_prove_that_a_fold_ran_so_nobody_is_blamed():
    model = nn.ModuleDict({"used": nn.Linear(4, 4), "unused": nn.Linear(4, 4)}).eval()
    with folded(model, SteeringVector({"unused": D})):
        model["used"](torch.ones(1, 4))


# --- what it cannot do -----------------------------------------------------------------------------------------------
def tied():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].bias = model[0].bias
    return model


def viewed():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    model[1].bias.data = model[0].bias.data
    return model


def meta():
    return nn.Sequential(nn.Linear(4, 4, device="meta")).eval()


def training():
    return nn.Sequential(nn.Linear(4, 4))


def relu():
    return nn.Sequential(nn.ReLU(), nn.Linear(4, 4)).eval()


def own_forward():
    class Doubled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    return nn.Sequential(Doubled(4, 4)).eval()


def patched():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    model[0].forward = lambda x: x
    return model


class Shift:
    """An intervention of the user's own."""

    def __call__(self, activation, direction, c):
        return activation + c * direction


REFUSED = {
    "tied": (tied, "0", {}, "its bias is shared with another module"),
    "the same memory": (viewed, "0", {}, "its bias is shared with another module"),
    "meta": (meta, "0", {}, "its parameters are sharded, or not on this device"),
    "training": (training, "0", {}, r"its bias is being trained; call model.eval\(\) first"),
    "gate": (relu, "1", {"gate": ProjectionAbove(SteeringVector({"0": D}), 0.0)}, "only an ungated Add"),
    "per row": (relu, "1", {"c": ROWS}, "only an ungated Add with one strength for all rows"),
    "intervention": (relu, "1", {"intervention": Shift()}, "only an ungated Add"),
    "input": (relu, "1:in", {}, "it is not the whole output of its module"),
    "relu": (relu, "0", {}, "a ReLU does not add a bias to its output"),
    "its own forward": (own_forward, "0", {}, "a Doubled does not add a bias to its output"),
    "somebody's forward": (patched, "0", {}, "a Linear does not add a bias to its output"),
    "container": (relu, "", {}, "a Sequential does not add a bias to its output"),
}


@pytest.mark.parametrize(("build", "site", "options", "reason"), REFUSED.values(), ids=REFUSED)
def test_where_a_bias_would_not_be_the_edit_it_is_refused_before_anything_changes(build, site, options, reason):
    model = build()
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(
        UnsupportedModelError, match=rf"site '{site}' cannot be folded: {reason}.*; use another backend"
    ):
        folded(model, SteeringVector({site: D}), **options)
    if "meta" not in {parameter.device.type for parameter in before}:
        assert all(torch.equal(*pair) for pair in zip(before, model.parameters(), strict=True))


def test_a_model_that_is_put_into_training_later_is_refused_at_attaching():
    model = exact()
    steerer = folded(model)
    model.train()
    with pytest.raises(UnsupportedModelError, match=r"call model.eval\(\) first"):
        steerer.attach()
    assert not steerer.attached
    model.eval()
    with steerer:
        assert not torch.equal(model(X), exact()(X))
    assert torch.equal(model(X), exact()(X))


def test_one_site_that_cannot_be_folded_keeps_all_others_from_it():
    model = exact()
    before = state(model)
    with pytest.raises(UnsupportedModelError, match="site '1' cannot be folded: a ReLU"):
        folded(model, SteeringVector({"0": D, "1": D}))
    assert state(model) == before


def test_rows_of_strength_are_refused_inside_the_block_and_change_nothing():
    model = exact()
    with folded(model, c=2) as steerer:
        with pytest.raises((StrengthError, UnsupportedModelError), match="one strength for all rows"):
            steerer.c = ROWS
        assert steerer.c == 2
        assert "c = 2" in steerer.explain()
        with folded(model, c=-2):
            assert torch.equal(model(X), exact()(X))
        steerer.c = 0
        assert torch.equal(model(X), exact()(X))
    assert torch.equal(model(X), exact()(X))


def test_install_is_not_for_a_fold():
    with pytest.raises(RuntimeError, match="install is for a buffer backend"):
        folded(exact()).install()


# --- a bias that others write into -------------------------------------------------------------------------------
CHANGED = "the bias of a Linear was changed while a steering was folded into it"
SEVEN = torch.full((4,), 7.0, dtype=torch.float64)


def load(model):
    model.load_state_dict(model.state_dict() | {"0.bias": SEVEN})


def step(model):
    bias = model[0].bias.requires_grad_()
    bias.grad = bias.detach() - SEVEN
    torch.optim.SGD([bias], lr=1.0).step()


def assign(model):
    model[0].bias = nn.Parameter(SEVEN.clone())


@pytest.mark.parametrize("change", [load, step, assign])
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("then", ["detach", "c", "another block", "a second one"])
def test_numbers_that_others_wrote_into_the_bias_stay_and_are_warned_about_once(change, has_bias, then):
    model = nn.Sequential(nn.Linear(4, 4, bias=has_bias)).double().eval()
    v = SteeringVector({"0": torch.ones(4)})
    steerers = [Steerer(model, v, c=c, backend="fold").attach() for c in (1, 2)[: 1 + (then == "a second one")]]
    change(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if then == "c":
            steerers[0].c = 5
        for steerer in steerers:
            steerer.detach()
    assert [str(warning.message).startswith(CHANGED) for warning in caught] == [True]
    assert torch.equal(model[0].bias, SEVEN)
    if then == "another block":
        with Steerer(model.requires_grad_(False), v, c=2, backend="fold"):
            assert torch.equal(model[0].bias, SEVEN + 2)
        assert torch.equal(model[0].bias, SEVEN)


def test_a_bias_that_is_taken_away_stays_away():
    model = nn.Sequential(nn.Linear(4, 4)).eval()
    steerer = Steerer(model, SteeringVector({"0": torch.ones(4)}), backend="fold").attach()
    model[0].bias = None
    with pytest.warns(UserWarning, match=CHANGED):
        steerer.c = 2
    steerer.detach()
    assert model[0].bias is None


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    "move",
    [lambda m: m.double(), lambda m: m.half(), lambda m: m.half().float(), lambda m: m.load_state_dict(m.state_dict())],
    ids=["double", "half", "half and back", "its own state"],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_bias_that_only_moves_is_put_back(has_bias, move, count):
    model = nn.Sequential(nn.Linear(4, 4, bias=has_bias)).eval()
    before = None if model[0].bias is None else model[0].bias.detach().clone()
    steerers = [
        Steerer(model, SteeringVector({"0": torch.full((4,), 0.1)}), c=c + 1, backend="fold").attach()
        for c in range(count)
    ]
    move(model)
    steerers[0].c = 3
    for steerer in steerers:
        steerer.detach()
    assert model[0].bias is None if before is None else torch.equal(model[0].bias, before.to(model[0].bias))


@pytest.mark.parametrize("backend", ["tap", "hook"])
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_a_fold_that_would_come_before_an_earlier_edit_that_is_no_sum_is_refused(backend):
    model, v = exact().eval().requires_grad_(False), SteeringVector({"0": torch.ones(4)})
    folded = Steerer(model, v, c=2, backend="fold")
    refused = pytest.raises(UnsupportedModelError, match="by fold this edit would come before that")
    with Steerer(model, v, intervention=Ablate(), backend=backend), refused:
        folded.attach()
    with Steerer(model, v, c=2, backend="fold"), Steerer(model, v, intervention=Ablate(), backend=backend):
        model(torch.ones(1, 4, dtype=torch.float64))
