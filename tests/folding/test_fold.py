"""A folded model gives what the hooked one gives, or nothing is folded and the reason is named."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import (
    Ablate,
    Add,
    Affine,
    Clamp,
    ConceptNotFoundError,
    KeepNorm,
    LowRank,
    NotFoldable,
    ProjectionAbove,
    Replace,
    Steerer,
    SteeringVector,
    VectorBank,
    fold,
    unfold,
)
from tests.zoo import gpt2, llama

IDS = {"input_ids": torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])}


def net(*layers, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(*layers).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model


def mlp():
    return net(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3))


def cnn():
    model = net(
        *(nn.Conv2d(2, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(6 * 36, 3)),
    )
    model(torch.randn(8, 2, 8, 8))
    return model


def direction(size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def out(model, batch):
    with torch.no_grad():
        given = model(**batch) if isinstance(batch, dict) else model(batch)
    return given if isinstance(given, torch.Tensor) else given[0]


def same(model, vectors, batch, *, c=2.0, folded=None, tolerance=1e-5, **options):
    """The folded model, which is the hooked one but for rounding, and not the plain one; that is as it was."""
    state = copy.deepcopy(model.state_dict())
    before = out(model, batch)
    if folded is None:
        folded = fold(model, vectors, c, verify_on=batch, **options)
    with Steerer(model, vectors, c=c, **options):
        steered = out(model, batch)
    assert (out(folded, batch) - steered).abs().max() <= tolerance * (1 + steered.abs().max())
    assert (steered - before).abs().max() > 10 * tolerance
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(out(model, batch), before)
    return folded


X = torch.randn(5, 4, generator=torch.Generator().manual_seed(2))
IMAGES = torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(2))
EDITS = {
    "add": {},
    "ablate": {"intervention": Ablate(), "c": 1.0},
    "half ablated": {"intervention": Ablate(), "c": 0.5},
    "clamp": {"intervention": Clamp(1.5), "c": 1.0},
}


# --- where it goes -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(
    ("site", "d"), [("0", 8), ("1", 8), ("2", 8), ("3", 8), ("4", 3), ("1:in", 8), ("2:in", 8), ("0:in", 4)]
)
def test_every_site_of_an_mlp(site, d, edit):
    same(mlp(), SteeringVector({site: direction(d)}), X, **EDITS[edit])


def test_a_relu_s_steering_goes_into_the_next_layer_s_bias():
    model, v = mlp(), SteeringVector({"1": direction(8)})
    folded = fold(model, v, 3.0, verify_on=X)
    changed = {name for name, p in folded.named_parameters() if name not in dict(model.named_parameters())}
    assert changed == {"2.bias"}
    assert torch.allclose(folded[2].bias, model[2].weight @ (3.0 * v["1"]), atol=1e-6)
    assert all(torch.equal(p, folded.get_parameter(name)) for name, p in model.named_parameters())


def test_all_sites_at_once_and_several_concepts():
    sizes = {"0": 8, "1": 8, "2": 8, "3": 8, "4": 3}
    v, w = (SteeringVector({s: direction(d, seed) for s, d in sizes.items()}) for seed in (1, 2))
    same(mlp(), VectorBank({"v": v, "w": w}), X, c={"v": 1.5, "w": -0.5})
    bank = VectorBank({"v": v, "w": SteeringVector({"1": direction(8, 2)})})
    same(mlp(), bank, X, c={"v": 0.5, "w": 1.0}, intervention={"w": Ablate()})


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize(("site", "d"), [("0", 4), ("1", 4), ("2", 4), ("3", 6), ("4", 6), ("6", 3)])
def test_every_site_of_a_cnn(site, d, edit):
    if edit != "add" and site in ("1", "4"):
        why = "a norm scales each feature by itself" if site == "1" else "its readers see it reshaped"
        with pytest.raises(NotFoldable, match=why):
            fold(cnn(), SteeringVector({site: direction(d)}), verify_on=IMAGES, intervention=Ablate())
    else:
        same(cnn(), SteeringVector({site: direction(d)}), IMAGES, **EDITS[edit])


LAYERS = {
    "Conv1d": (nn.Conv1d(3, 5, 2, bias=False), (2, 3, 7), 5),
    "Conv3d": (nn.Conv3d(2, 4, 2), (2, 2, 4, 4, 4), 4),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 5, 5), 6),
    "ConvTranspose2d": (nn.ConvTranspose2d(2, 3, 3, stride=2, bias=False), (2, 2, 4, 4), 3),
    "LayerNorm": (nn.LayerNorm(6), (2, 5, 6), 6),
    "LayerNorm without bias": (nn.LayerNorm(6, bias=False), (2, 5, 6), 6),
    "GroupNorm": (nn.GroupNorm(2, 4), (2, 4, 5), 4),
    "BatchNorm1d": (nn.BatchNorm1d(4), (6, 4), 4),
    "Embedding": (nn.Embedding(7, 5), None, 5),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_the_layer_itself_carries_what_is_added_to_its_output(kind):
    layer, shape, d = LAYERS[kind]
    batch = torch.arange(6).reshape(2, 3) if shape is None else torch.randn(*shape)
    same(net(layer, nn.Tanh()), SteeringVector({"0": direction(d)}), batch)


@pytest.mark.parametrize("kind", ["Conv1d", "Conv3d", "ConvTranspose2d", "Embedding"])
def test_and_what_mixes_its_features(kind):
    layer, shape, d = LAYERS[kind]
    batch = torch.arange(6).reshape(2, 3) if shape is None else torch.randn(*shape)
    same(net(layer, nn.Tanh()), SteeringVector({"0": direction(d)}), batch, intervention=Ablate(), c=1.0)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 3, 3), nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 3, 3, dilation=2)])
def test_a_convolution_without_zeros_around_reads_it(layer):
    model = net(nn.Conv2d(2, 4, 1), nn.ReLU(), layer)
    same(model, SteeringVector({"1": direction(4)}), IMAGES)


@pytest.mark.parametrize("padding", ["circular", "reflect", "replicate"])
def test_padding_that_repeats_the_activation_repeats_the_steering(padding):
    model = net(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1, padding_mode=padding))
    same(model, SteeringVector({"1": direction(4)}), IMAGES)


class Residual(nn.Module):
    """h + W2 relu(W1 h) twice, and a head."""

    def __init__(self, *, norm=None, heads=1):
        super().__init__()
        self.blocks = nn.ModuleList(Block(norm) for _ in range(2))
        self.head = nn.Linear(6, 3)

    def forward(self, h):
        for block in self.blocks:
            h = block(h)
        return self.head(torch.tanh(h))


class Block(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.up, self.down = nn.Linear(6, 6), nn.Linear(6, 6, bias=False)
        self.norm = nn.Identity() if norm is None else norm()

    def forward(self, h):
        return h + self.norm(self.down(torch.relu(self.up(h))))


H = torch.randn(4, 6, generator=torch.Generator().manual_seed(3))


def test_the_last_layer_that_writes_to_the_stream_takes_it():
    model = net(Residual())[0]
    folded = same(model, SteeringVector({"blocks.0": direction(6)}), H)
    assert torch.allclose(folded.blocks[0].down.bias, 2 * direction(6))


def test_a_norm_after_the_last_writer_is_named_unless_it_has_a_bias():
    class Plain(nn.Module):
        def forward(self, x):
            return x / (1 + x.norm(dim=-1, keepdim=True))

    with pytest.raises(NotFoldable, match=r"site 'blocks.1' cannot be folded: blocks.1.norm \(Plain\) stands between"):
        fold(net(Residual(norm=Plain))[0], SteeringVector({"blocks.1": direction(6)}), verify_on=H)
    model = net(Residual())[0]
    model.blocks[1].norm = nn.LayerNorm(6)
    folded = same(model, SteeringVector({"blocks.1": direction(6)}), H)
    assert torch.allclose(folded.blocks[1].norm.bias, 2 * direction(6))


@pytest.mark.parametrize(
    ("edit", "c"),
    [
        (LowRank({"1": (direction(8)[None], direction(8, 2)[None], torch.ones(1))}), 0.5),
        (Affine({"1": (torch.randn(8, 8, generator=torch.Generator().manual_seed(4)), direction(8))}), 0.5),
        (Replace({"1": direction(8)}), 1.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_every_affine_edit(edit, c):
    same(mlp(), edit, X, c=c)


@pytest.mark.slow
@given(
    site=st.sampled_from([("0", 8), ("1", 8), ("2", 8), ("3", 8), ("4", 3)]),
    c=st.floats(0.1, 4.0),
    seed=st.integers(0, 100),
    ablate=st.booleans(),
)
def test_any_strength_and_any_direction(site, c, seed, ablate):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 3)).double()
    v, x = SteeringVector({site[0]: direction(site[1], seed).double()}), X.double()
    options = {"intervention": Ablate()} if ablate else {}
    folded = fold(model, v, c, verify_on=x, **options)
    with Steerer(model, v, c=c, **options):
        assert torch.allclose(folded(x), model(x), rtol=1e-12, atol=1e-12)


# --- language models ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "site", ["transformer.h.0", "transformer.h.1:in", "transformer.h.0.mlp", "transformer.h.1.ln_1"]
)
def test_gpt2(site, dtype):
    tolerance = 0.05 if dtype is torch.bfloat16 else 1e-5
    model = gpt2().eval().to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    same(model, SteeringVector({site: 4 * direction(8)}), IDS_8, tolerance=tolerance)


IDS_8 = {"input_ids": torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])}


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Mistral", "Phi3", "Olmo"])
@pytest.mark.parametrize("site", ["model.layers.1", "model.layers.2:in", "model.layers.1.mlp"])
def test_pre_norm_families(kind, site):
    same(llama(kind=kind).float(), SteeringVector({site: direction(16)}), IDS)


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("Gemma2", r"model.layers.1.post_feedforward_layernorm \(Gemma2RMSNorm\) stands between"),
        ("Olmo2", r"model.layers.1.post_feedforward_layernorm \(Olmo2RMSNorm\) stands between"),
        ("Mixtral", r"model.layers.1.mlp.experts \(MixtralExperts\) with its fused experts stands between"),
    ],
)
def test_families_in_which_something_stands_between(kind, why):
    model = llama(kind=kind, **({"num_local_experts": 3} if kind == "Mixtral" else {})).float()
    with pytest.raises(NotFoldable, match=why):
        fold(model, SteeringVector({"model.layers.1": direction(16)}), verify_on=IDS)


def test_ablation_of_a_direction_from_everything_that_writes_to_the_stream():
    """Abliteration: at every writer's output, or at every state of the stream, which is the same."""
    model = llama().float()
    blocks = [f"model.layers.{n}" for n in range(3)]
    writers = ["model.embed_tokens", *(f"{b}.{w}" for b in blocks for w in ("self_attn.o_proj", "mlp.down_proj"))]
    states = ["model.embed_tokens", *(s for b in blocks for s in (f"{b}.post_attention_layernorm:in", b))]
    v = direction(16)
    options = {"intervention": Ablate(), "c": 1.0}
    one = same(model, SteeringVector(dict.fromkeys(writers, v)), IDS, **options)
    weight = one.model.layers[1].mlp.down_proj.weight
    assert (v @ weight).abs().max() < 1e-5
    with Steerer(model, SteeringVector(dict.fromkeys(states, v)), intervention=Ablate()):
        hooked = out(model, IDS)
    assert torch.allclose(out(one, IDS), hooked, atol=1e-4)
    del states[1]  # now one state of the stream is not ablated
    with pytest.raises(NotFoldable, match="cannot be folded"):
        fold(model, SteeringVector(dict.fromkeys(["model.layers.0"], v)), verify_on=IDS, intervention=Ablate())


# --- what cannot be folded ---------------------------------------------------------------------------------------
def tied():
    model = net(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4))
    model[2].bias = model[0].bias
    model[2].weight = model[0].weight
    return model


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.site = nn.Identity()

    def forward(self, x):
        return torch.tanh(self.layer(self.site(self.layer(x))))


class Quantised(nn.Linear):
    def forward(self, x):
        return super().forward(x)


def parametrised():
    model = net(nn.Linear(4, 4), nn.Tanh())
    torch.nn.utils.parametrizations.weight_norm(model[0])
    return model


def quantised():
    model = net(nn.Linear(4, 4), nn.Tanh())
    model[0] = Quantised(4, 4)
    return model


@pytest.mark.parametrize(
    ("model", "site", "options", "why"),
    [
        (tied, "0", {}, r"0 \(Linear\): its weights are tied to 2.bias"),
        (Twice, "site", {}, "layer .Linear.: it runs 2 times in one pass"),
        (Twice, "layer", {}, "site 'layer' runs more than once in one pass"),
        (quantised, "0", {}, "cannot be folded: 0 .Quantised. stands between"),
        (parametrised, "0", {"intervention": Ablate()}, "its weight is parametrised"),
        (lambda: net(nn.Linear(4, 4), nn.Tanh()), "1", {}, r"1 \(Tanh\) stands between; the model returns it reads it"),
        (lambda: net(nn.Linear(4, 4), nn.Tanh(), nn.LayerNorm(4)), "1", {}, "2 .LayerNorm.: it is not a linear map"),
        (
            lambda: net(nn.Linear(4, 4), nn.Tanh()),
            "0",
            {"intervention": Add(relative=True)},
            "Add is not an affine map",
        ),
        (
            lambda: net(nn.Linear(4, 4), nn.Tanh()),
            "0",
            {"intervention": KeepNorm(Add())},
            "KeepNorm is not an affine map",
        ),
    ],
)
def test_what_stands_between_is_named(model, site, options, why):
    with pytest.raises(NotFoldable, match=why):
        fold(model(), SteeringVector({site: direction(4)}), verify_on=X, **options)


def test_zero_padding_is_not_steered():
    model = net(nn.Conv2d(2, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1))
    with pytest.raises(NotFoldable, match=r"2 \(Conv2d\): it pads with zeros, which are not steered"):
        fold(model, SteeringVector({"1": direction(4)}), verify_on=IMAGES)


def test_a_gate_a_schedule_and_strengths_per_row_have_no_weights():
    v = SteeringVector({"1": direction(8)})
    for c in (torch.ones(5), lambda step: 1.0, {"vector": torch.ones(5, 2)}):
        with pytest.raises(NotFoldable, match="weights have one strength for all rows and steps"):
            fold(mlp(), v, c, verify_on=X)
    with pytest.raises(TypeError):
        fold(mlp(), v, verify_on=X, gate=ProjectionAbove(v, 0.0))  # type: ignore[call-arg]
    with pytest.raises(ConceptNotFoundError):
        fold(mlp(), v, {"absent": 1.0}, verify_on=X)


def test_what_cannot_be_proved_is_not_folded():
    v = SteeringVector({"1": direction(8)})
    with pytest.raises(NotFoldable, match=r"on verify_on the steering moves the outputs by .* and nothing is proved"):
        fold(mlp(), v, 1e-9, verify_on=X)
    with pytest.raises(NotFoldable, match="the model gives other outputs each time"):
        fold(nn.Sequential(*mlp(), Noisy()), v, verify_on=X)
    with pytest.raises(NotFoldable, match="gives no floating tensors"):
        fold(nn.Sequential(*mlp(), Verdict()), v, verify_on=X)


class Noisy(nn.Module):
    def forward(self, x):
        return x + torch.randn_like(x)


class Verdict(nn.Module):
    def forward(self, x):
        return x.argmax(dim=1)


class Sneaky(nn.Module):
    """What autograd does not see stands between the layer and the site."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.site = nn.Identity()
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        h = self.layer(x)
        return self.head(torch.tanh(self.site(h + (h * h).detach())))


def test_what_looks_right_and_is_not_is_found_by_the_outputs():
    with pytest.raises(NotFoldable, match=r"the outputs differ by .*, where rounding makes"):
        fold(Sneaky(), SteeringVector({"site": direction(4)}), verify_on=X)


def test_a_failure_leaves_the_model_as_it_was():
    model = mlp()
    state, before = copy.deepcopy(model.state_dict()), out(model, X)
    v = SteeringVector({"1": direction(8), "0": direction(8)})
    with pytest.raises(NotFoldable):
        fold(model, v, 1e-9, verify_on=X, inplace=True)
    sneaky = Sneaky()
    kept = copy.deepcopy(sneaky.state_dict())
    with pytest.raises(NotFoldable):
        fold(sneaky, SteeringVector({"site": direction(4)}), verify_on=X, inplace=True)
    assert all(torch.equal(t, kept[n]) for n, t in sneaky.state_dict().items())
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert list(model.state_dict()) == list(state)
    assert torch.equal(out(model, X), before)


# --- in place ----------------------------------------------------------------------------------------------------
def test_in_place_and_back_bit_for_bit():
    model = mlp()
    state, before, ids = copy.deepcopy(model.state_dict()), out(model, X), [id(p) for p in model.parameters()]
    v, w = SteeringVector({"1": direction(8)}), SteeringVector({"3": direction(8, 2)})
    with Steerer(model, v, c=2.0):
        once = out(model, X)
        with Steerer(model, w):
            twice = out(model, X)
    assert fold(model, v, 2.0, verify_on=X, inplace=True) is model
    assert torch.allclose(out(model, X), once, atol=1e-5)
    fold(model, w, verify_on=X, inplace=True)
    assert torch.allclose(out(model, X), twice, atol=1e-5)
    unfold(model)
    assert torch.allclose(out(model, X), once, atol=1e-5)
    unfold(model)
    assert torch.equal(out(model, X), before)
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert [id(p) for p in model.parameters()] == ids
    with pytest.raises(NotFoldable, match="nothing is folded into this Sequential in place"):
        unfold(model)


def test_a_copy_is_not_unfolded():
    folded = fold(mlp(), SteeringVector({"1": direction(8)}), verify_on=X)
    with pytest.raises(NotFoldable, match="of a copy, use the original"):
        unfold(folded)


def test_modes_gradients_and_flags_stay():
    model = mlp().train()
    model[0].requires_grad_(False)
    model[0].eval()
    folded = fold(model, SteeringVector({"1": direction(8)}), verify_on=X)
    for one in (model, folded):
        assert [m.training for m in one] == [False, True, True, True, True]
        assert [p.requires_grad for p in one[0].parameters()] == [False, False]
        assert one[2].weight.requires_grad
        assert all(p.grad is None for p in one.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for one in (model, folded) for m in one.modules())


def test_strength_zero_changes_nothing():
    model = mlp()
    folded = fold(model, SteeringVector({"1": direction(8)}), 0.0, verify_on=X)
    assert torch.equal(out(folded, X), out(model, X))
    assert list(folded.state_dict()) == list(model.state_dict())


def test_a_vector_from_a_file_is_folded_too(tmp_path):
    from actsteer import fit

    model = mlp()
    fit(model, positive=X, negative=-X, sites=["1", "3"], concept="c").save(tmp_path / "v.safetensors")
    same(model, SteeringVector.load(tmp_path / "v.safetensors"), X)


@pytest.mark.parametrize("site", ["layers.1.linear1", "layers.1.linear2"])
def test_inside_a_fused_layer_of_torchs_transformer(site):
    """A hook that does nothing keeps the fused kernel away; it is no edit before which another would come."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True)
    model, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval(), torch.randn(5, 3, 4)
    v = SteeringVector({site: torch.linspace(-1, 1, 8 if site.endswith("linear1") else 4)})
    folded = fold(model, v, verify_on=x)
    with Steerer(model, v):
        torch.testing.assert_close(model(x), folded(x))
    with Steerer(model, v), Steerer(model, v, intervention=Ablate()):
        model(x)
