"""Fast paths and opaque code: fused encoders and attention, scripts, traces, exports, and modules that never run."""

import copy

import pytest
import torch
from torch import Tensor, nn

from actsteer import (
    ProjectionAbove,
    SiteNotFoundError,
    Steerer,
    SteeringNotApplied,
    SteeringVector,
    UnsupportedModelError,
)
from tests.oracles import state
from tests.zoo import bits, exact, lens, normal

X = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)
D = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
S = normal(2, 3, 4)


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def encoder(*, layers: int = 2) -> nn.TransformerEncoder:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True, dtype=torch.float64)
    model = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def fused(model):
    """How often the fused kernel runs, and the output."""
    calls = []
    kernel = torch._transformer_encoder_layer_fwd

    def counting(*args):
        calls.append(args)
        return kernel(*args)

    with pytest.MonkeyPatch.context() as patched, torch.no_grad():
        patched.setattr(torch, "_transformer_encoder_layer_fwd", counting)
        output = model(S)
    return len(calls), output


SITES = {
    "layers.0": 4,
    "layers.1": 4,
    "layers.0.linear1": 8,
    "layers.0.linear2": 4,
    "layers.1.norm1": 4,
    "layers.1.norm2": 4,
    "layers.0.dropout1": 4,
    "layers.1.self_attn": 4,
    "layers.0.linear1:in": 4,
    "layers.1:in": 4,
    "": 4,
}


@pytest.mark.case(12)
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
@pytest.mark.parametrize(("site", "d"), SITES.items())
def test_an_encoder_that_would_run_fused_is_steered_as_one_that_would_not(site, d, backend, mode):
    model, slow = encoder(), encoder()
    v = SteeringVector({site: normal(d, seed=2)})
    with Steerer(slow, v, c=2):
        truth = slow(S).detach()  # gradients are wanted, so nothing is fused
    before = state(model)
    with mode():
        plain = model(S)
        with Steerer(model, v, c=2, backend=backend):
            torch.testing.assert_close(model(S), truth)
        assert torch.equal(model(S), plain)
    assert not torch.allclose(truth, plain)
    assert state(model) == before


@pytest.mark.case(12)
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_only_the_steered_layer_leaves_the_fused_path_and_it_comes_back(backend):
    model = encoder()
    assert fused(model)[0] == 2
    with Steerer(model, SteeringVector({"layers.1.linear2": D}), backend=backend):
        assert fused(model)[0] == 1
    assert fused(model)[0] == 2


@pytest.mark.case(12, 50)
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_a_layer_that_runs_twice_leaves_the_fused_path_by_either_of_its_names(backend):
    layer = encoder(layers=1).layers[0]
    model, v = nn.Sequential(layer, layer), SteeringVector({"1.linear2": D})
    with Steerer(model, v, c=2):
        truth = model(S).detach()
    with torch.no_grad(), Steerer(model, v, c=2, backend=backend):
        torch.testing.assert_close(model(S), truth)


@pytest.mark.case(12)
def test_a_fold_into_a_layer_that_runs_fused_costs_it_nothing():
    model, slow = encoder(), encoder()
    v = SteeringVector({"layers.0.linear2": D, "layers.1.norm2": D, "layers.1.self_attn.out_proj": D})
    with Steerer(model, v, c=2, backend="fold"):
        count, steered = fused(model)
    assert count == 2
    twin = copy.deepcopy(slow)
    with torch.no_grad():
        for site in v:
            twin.get_submodule(site).bias += 2 * D
    torch.testing.assert_close(steered, fused(twin)[1])
    assert torch.equal(fused(model)[1], fused(slow)[1])


@pytest.mark.case(12)
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_a_gate_inside_a_fused_layer_is_read(backend):
    model, slow = encoder(), encoder()
    gate = ProjectionAbove(SteeringVector({"layers.0.linear2": normal(4, seed=7)}), 0.0)
    v = SteeringVector({"layers.1": D})
    with Steerer(slow, v, c=2, gate=gate):
        truth = slow(S).detach()
    with torch.no_grad(), Steerer(model, v, c=2, gate=gate, backend=backend):
        torch.testing.assert_close(model(S), truth)


class Attention(nn.Module):
    """Self-attention that gives out only what it attends to."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0]


def attention():
    torch.manual_seed(0)
    return Attention().eval()


@pytest.mark.case(13)
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
@pytest.mark.parametrize("grad", [True, False])
def test_attention_is_steered_at_the_first_of_its_results(backend, grad):
    model = attention()
    with torch.set_grad_enabled(grad):
        plain = model(S)
        with Steerer(model, SteeringVector({"attention": D}), c=2, backend=backend):
            torch.testing.assert_close(model(S), plain + 2 * D)
        assert torch.equal(model(S), plain)


@pytest.mark.case(13)
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
@pytest.mark.parametrize("grad", [True, False])
def test_the_out_proj_of_attention_raises_and_says_what_to_steer(backend, grad):
    model = attention()
    steerer = Steerer(model, SteeringVector({"attention.out_proj": D}), backend=backend)
    message = "MultiheadAttention reads its out_proj's weights and never calls it; steer the MultiheadAttention itself"
    with torch.set_grad_enabled(grad), pytest.raises(SteeringNotApplied, match=message), steerer:
        model(S)


@pytest.mark.case(13)
@pytest.mark.parametrize("grad", [True, False])
def test_the_out_proj_of_attention_can_be_folded(grad):
    model = attention()
    before = state(model)
    with torch.set_grad_enabled(grad):
        plain = model(S)
        with Steerer(model, SteeringVector({"attention.out_proj": D}), c=2, backend="fold"):
            torch.testing.assert_close(model(S), plain + 2 * D)
        assert torch.equal(model(S), plain)
    assert state(model) == before


# --- scripts, traces, exports ----------------------------------------------------------------------------------------
def script(model, x):
    return torch.jit.script(model)


def trace(model, x):
    return torch.jit.trace(model, x)


def export(model, x):
    return torch.export.export(model, (x,)).module()


V = SteeringVector({"2": D})
makers = pytest.mark.parametrize("make", [script, trace, export], ids=lambda make: make.__name__)


@pytest.mark.case(15)
@makers
@pytest.mark.parametrize("backend", ["auto", "hook", "tap", "buffer"])
def test_code_that_ignores_hooks_is_refused_or_raises(make, backend):
    made = make(exact(), X)
    message = "is scripted and ignores hooks; steer the eager model|never calls this module|exported graph holds"
    with pytest.raises((UnsupportedModelError, SteeringNotApplied), match=message), Steerer(made, V, backend=backend):
        made(X)


@pytest.mark.case(15)
@pytest.mark.parametrize("make", [script, trace], ids=["script", "trace"])
def test_a_scripted_part_of_an_eager_model_is_refused(make):
    model = nn.Sequential(make(nn.Sequential(nn.Linear(4, 4)), torch.ones(1, 4)), nn.Identity())
    for site in ("0", "0.0"):
        with pytest.raises(UnsupportedModelError, match=f"site '{site}': .* is scripted and ignores hooks"):
            Steerer(model, SteeringVector({site: D}))
    with Steerer(model, SteeringVector({"1": D.float()})):
        model(torch.ones(1, 4))


@pytest.mark.case(15)
@makers
def test_the_root_of_an_export_can_be_steered_and_that_of_a_script_is_refused(make):
    made = make(exact(), X)
    v = SteeringVector({"": D})
    if make is not export:
        with pytest.raises(UnsupportedModelError, match="is scripted and ignores hooks"):
            Steerer(made, v)
        return
    with Steerer(made, v, c=2):
        assert torch.equal(made(X), exact()(X) + 2 * D)
    assert torch.equal(made(X), exact()(X))


@pytest.mark.case(15)
@makers
def test_a_fold_before_the_tracing_is_in_what_was_made(make):
    model = exact()
    with Steerer(model, V, c=2, backend="fold"):
        truth = model(X)
        made = make(model, X)
        assert torch.equal(made(X), truth)


@pytest.mark.case(15)
@makers
def test_a_fold_after_the_tracing_is_honoured_through_the_weights_they_share(make):
    model = exact()
    made = make(model, X)
    plain = made(X)
    for c in (2.0, -1.0):
        with Steerer(model, V, c=c, backend="fold"):
            assert not torch.equal(made(X), plain)
            assert torch.equal(made(X), model(X))
        assert torch.equal(made(X), plain)


@pytest.mark.case(15)
@pytest.mark.parametrize("make", [script, trace], ids=["script", "trace"])
def test_a_fold_that_code_traced_before_could_not_see_leaves_it_alone_or_is_refused(make):
    """Without a bias there is nothing that they share: a new one is the eager model's alone."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Identity()).double().eval()
    made = make(model, X)
    plain = made(X)
    with Steerer(model, SteeringVector({"0": D}), backend="fold"):
        assert torch.equal(model(X), plain + D)
        assert torch.equal(made(X), plain)
    assert torch.equal(bits(model(X)), bits(plain))


def test_a_symbolic_trace_runs_its_modules_and_is_steered():
    made = torch.fx.symbolic_trace(exact())
    with Steerer(made, V, c=2):
        steered = made(X)
    twin = exact()
    with Steerer(twin, V, c=2):
        assert torch.equal(steered, twin(X))
    assert torch.equal(made(X), exact()(X))


# --- modules that never run ------------------------------------------------------------------------------------------
class Unused(nn.Module):
    """Has a part that it does not call, and one whose weights alone it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.read = nn.Identity(), nn.Identity(), nn.Linear(4, 4, dtype=torch.float64)
        self.blocks = nn.ModuleList([nn.Identity()])
        self.named = nn.ModuleDict({"one": nn.Identity()})

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(self.named["one"](self.blocks[0](self.used(x))), self.read.weight)


@pytest.mark.case(16)
@pytest.mark.parametrize("backend", ["auto", "hook", "tap", "buffer"])
@pytest.mark.parametrize("site", ["unused", "read"])
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_a_module_that_is_not_called_raises(site, backend):
    model = Unused()
    steerer = Steerer(model, SteeringVector({site: D}), backend=backend)
    with pytest.raises(SteeringNotApplied, match=rf"'{site}': .*unused on this path.*read for its weights"), steerer:
        model(X)
    with steerer:
        pass
    with Steerer(model, SteeringVector({"used": D, site: D}), backend=backend, strict=False):
        steered = model(X)
    assert torch.equal(steered, model(X + D))


@pytest.mark.case(16)
@pytest.mark.parametrize("backend", ["auto", "fold", "tap"])
@pytest.mark.parametrize(("site", "kind", "member"), [("blocks", "ModuleList", "0"), ("named", "ModuleDict", "one")])
def test_a_container_that_is_never_called_is_refused(site, kind, member, backend):
    message = rf"site '{site}': a {kind} is never called; name its members, .*'{site}\.{member}'"
    with pytest.raises(SiteNotFoundError, match=message):
        Steerer(Unused(), SteeringVector({site: D}), backend=backend)
    model = Unused()
    with Steerer(model, SteeringVector({f"{site}.{member}": D})):
        steered = model(X)
    assert torch.equal(steered, model(X + D))


@pytest.mark.case(16)
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_an_inactive_hook_point_raises(backend):
    pytest.importorskip("transformer_lens")
    model = lens()
    model.hook_mid_is_on = False
    own = type(model).forward

    class Off(type(model)):
        def forward(self, x: Tensor) -> Tensor:
            return self.hook_out(self.unembed(self.embed(x)))

    model.__class__ = Off
    assert own is not Off.forward
    steerer = Steerer(model, SteeringVector({"hook_mid": D}), backend=backend)
    with pytest.raises(SteeringNotApplied, match="'hook_mid': this HookPoint is inactive; switch it on"), steerer:
        model(normal(2, 3))
