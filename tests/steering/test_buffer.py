"""The buffer backend: installed once, then only tensors are written."""

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from actsteer import AttachedError, Steerer, SteeringNotApplied, SteeringVector, StrengthError, VectorBank
from tests.oracles import state
from tests.zoo import bits, exact, identity

X = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)
D = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
V = SteeringVector({"1": D, "2": -D})
ROWS = torch.tensor([2.0, -1.0], dtype=torch.float64)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def buffered(model, vectors=V, **options):
    return Steerer(model, vectors, backend="buffer", **options)


def steered(vectors=V, **options):
    model = exact()
    with Steerer(model, vectors, **options):
        return model(X)


@pytest.mark.case(29)
@pytest.mark.parametrize("installed", [False, True])
@pytest.mark.parametrize("c", [2.0, ROWS], ids=["a number", "per row"])
def test_a_buffer_is_a_hook_bit_for_bit(installed, c):
    model = exact()
    before = state(model)
    steerer = buffered(model, c=c)
    if installed:
        steerer.install()
    with steerer:
        assert torch.equal(model(X), steered(c=c, backend="hook"))
    assert torch.equal(model(X), exact()(X))
    steerer.uninstall()
    assert state(model) == before


@pytest.mark.case(28)
def test_what_is_installed_and_not_attached_changes_no_bit():
    model = identity()
    x = torch.tensor([[0.0, -0.0, torch.nan, torch.inf]])
    steerer = buffered(model, SteeringVector({"0": D, "1": D})).install()
    assert torch.equal(bits(model(x)), bits(x))
    steerer.c = 5
    assert torch.equal(bits(model(x)), bits(x))
    with steerer:
        steerer.c = 0
        assert torch.equal(bits(model(x)), bits(x))
    steerer.uninstall()


def test_strengths_set_while_detached_come_with_the_next_attaching():
    model = exact()
    steerer = buffered(model).install()
    steerer.c = 3
    assert steerer.c == 3
    assert torch.equal(model(X), exact()(X))
    with steerer:
        assert torch.equal(model(X), steered(c=3))
        steerer.c = 4
        assert torch.equal(model(X), steered(c=4))
    with steerer:
        assert torch.equal(model(X), steered(c=4))
    steerer.uninstall()
    with steerer:
        assert torch.equal(model(X), steered(c=4))


def test_install_is_for_a_buffer_that_is_neither_installed_nor_attached():
    model = exact()
    with pytest.raises(AttachedError, match="install is for a buffer backend"):
        Steerer(model, V).install()
    steerer = buffered(model).install()
    with pytest.raises(AttachedError, match="neither installed nor attached"):
        steerer.install()
    with steerer, pytest.raises(AttachedError, match="attached already"):
        steerer.attach()
    steerer.uninstall()
    with steerer, pytest.raises(AttachedError, match="neither installed nor attached"):
        steerer.install()
    assert torch.equal(model(X), exact()(X))


@pytest.mark.parametrize(
    "steps",
    [
        ["uninstall"],
        ["detach", "uninstall", "uninstall"],
        ["install", "uninstall", "detach"],
        ["install", "attach", "uninstall", "detach"],
        ["install", "attach", "detach", "detach", "uninstall"],
        ["attach", "uninstall", "install", "uninstall"],
        ["install", "uninstall", "install", "attach", "detach", "attach", "detach", "uninstall"],
    ],
    ids=" ".join,
)
def test_any_order_of_steps_ends_with_the_plain_model(steps):
    model = exact()
    before = state(model)
    steerer = buffered(model)
    for step in steps:
        getattr(steerer, step)()
        expected = steered() if steerer.attached else exact()(X)
        assert torch.equal(model(X), expected)
    assert not steerer.attached
    assert state(model) == before


def test_the_shape_of_the_strengths_is_kept_while_installed_and_free_afterwards():
    model = exact()
    steerer = buffered(model).install()
    with steerer:
        with pytest.raises(StrengthError, match="keeps the shape of its strengths"):
            steerer.c = ROWS
        assert steerer.c == 1.0
        assert torch.equal(model(X), steered())
    steerer.uninstall()
    steerer.c = ROWS
    with steerer:
        assert torch.equal(model(X), steered(c=ROWS))
    steerer.c = 2
    with steerer:
        assert torch.equal(model(X), steered(c=2))


def test_a_shape_refused_at_attaching_attaches_nothing():
    model = exact()
    steerer = buffered(model).install()
    try:
        steerer.c = ROWS
    except StrengthError:
        assert steerer.c == 1.0
    else:
        with pytest.raises(StrengthError, match="keeps the shape of its strengths"):
            steerer.attach()
    assert not steerer.attached
    assert torch.equal(model(X), exact()(X))
    steerer.c = 2
    with steerer:
        assert torch.equal(model(X), steered(c=2))
    steerer.uninstall()


def test_a_refused_strength_changes_no_site():
    model = exact()
    bank = VectorBank({"a": SteeringVector({"1": D}), "b": SteeringVector({"2": D})})
    steerer = buffered(model, bank).install()
    with steerer:
        with pytest.raises(StrengthError):
            steerer.c = {"a": 2.0, "b": ROWS}
        assert steerer.c == 1.0
        assert torch.equal(model(X), steered(bank))
    with steerer:
        assert torch.equal(model(X), steered(bank))
    steerer.uninstall()


class Fork(nn.Module):
    """Runs its site, or not."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor, through: bool = True) -> Tensor:
        return self.site(x) if through else x * 1


@pytest.mark.parametrize("compiled", [False, True])
def test_a_site_that_does_not_run_raises_in_every_block_of_an_installed_buffer(compiled):
    model = Fork()
    steerer = buffered(model, SteeringVector({"site": D})).install()
    call = torch.compile(model, backend="eager") if compiled else model
    call(X)  # detached: not proof that the attached one ran
    with pytest.raises(SteeringNotApplied, match="site"), steerer:
        call(X, False)
    with steerer:
        assert torch.equal(call(X), X + D)
    with pytest.raises(SteeringNotApplied, match="site"), steerer:
        call(X, False)
    with steerer:
        pass
    steerer.uninstall()


def test_uninstalling_while_attached_proves_the_edit_too():
    model = Fork()
    steerer = buffered(model, SteeringVector({"site": D})).install().attach()
    model(X, False)
    with pytest.raises(SteeringNotApplied, match="site"):
        steerer.uninstall()
    assert not vars(model.site).get("_forward_hooks") and "forward" not in vars(model.site)


@pytest.mark.parametrize("first", [0, 1])
def test_two_installed_buffers_and_a_steerer_add_up_and_leave_in_any_order(first):
    model = exact()
    call = torch.compile(model, backend="eager")
    before = state(model)
    both = [buffered(model, c=2).install(), buffered(model, SteeringVector({"2": D}), c=4).install()]
    call(X)
    with both[0], both[1], Steerer(model, V, c=-1):
        assert torch.equal(call(X), steered(VectorBank({"a": V, "b": SteeringVector({"2": D})}), c={"a": 1, "b": 4}))
    both[first].uninstall()
    with both[1 - first]:
        expected = steered(c=2) if first else steered(SteeringVector({"2": D}), c=4)
        assert torch.equal(call(X), expected)
    both[1 - first].uninstall()
    assert torch.equal(call(X), exact()(X))
    assert state(model) == before


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_models_dtype_may_change_while_installed(dtype):
    model = nn.Sequential(nn.Identity())
    steerer = buffered(model, SteeringVector({"0": D}), c=2).install()
    with steerer:
        assert torch.equal(model(X), X + 2 * D)
        low = model(X.to(dtype))
    assert low.dtype is dtype
    assert torch.equal(low, X.to(dtype) + (2 * D).to(dtype))
    steerer.uninstall()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")  # torch's first one is, on purpose
def test_a_buffer_installed_before_a_cuda_graph_is_swept_without_recording_again():
    model = exact().cuda()
    x = X.cuda()
    steerer = buffered(model).install()
    call = torch.compile(model, mode="reduce-overhead", fullgraph=True)
    with torch.no_grad():
        for _ in range(3):
            call(x)
        for c in (1.0, -2.0, 0.5):
            steerer.c = c
            with steerer:
                torch.testing.assert_close(call(x).cpu(), steered(c=c))
            torch.testing.assert_close(call(x).cpu(), exact()(X))
    steerer.uninstall()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_that_moves_to_another_device_while_installed_is_still_steered():
    model = exact()
    steerer = buffered(model, c=2).install()
    with steerer:
        assert torch.equal(model(X), steered(c=2))
        model.cuda()
        torch.testing.assert_close(model(X.cuda()).cpu(), steered(c=2))
        steerer.c = 3
        torch.testing.assert_close(model(X.cuda()).cpu(), steered(c=3))
    steerer.uninstall()


@pytest.mark.case(5)
@pytest.mark.parametrize("c", [1.0, ROWS], ids=["a number", "per row"])
def test_twenty_strengths_and_twenty_blocks_compile_nothing(c):
    counter, model = CompileCounter(), exact()
    steerer = buffered(model, c=c).install()
    call = torch.compile(model, backend=counter, fullgraph=True)
    call(X)
    assert counter.frame_count == 1
    for step in range(20):
        steerer.c = c * step / 4
        with steerer:
            assert torch.equal(call(X), steered(c=c * step / 4))
        assert torch.equal(call(X), exact()(X))
    assert counter.frame_count == 1
    steerer.uninstall()
