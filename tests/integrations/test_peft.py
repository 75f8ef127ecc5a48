"""A LoRA adapter that PEFT loads gives what the hooked model gives, or none is made and the reason is named."""

import copy
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import (
    Ablate,
    Affine,
    AttachedError,
    Chain,
    Clamp,
    KeepNorm,
    LowRank,
    NotFoldable,
    ProjectionAbove,
    Rotate,
    Steerer,
    Steering,
    SteeringVector,
    VectorBank,
    fold,
    residual_writers,
)
from actsteer.integrations.peft import to_peft
from tests.zoo import gpt2, llama

peft = pytest.importorskip("peft")
IDS = torch.tensor([[3, 14, 15, 9, 2, 6], [5, 3, 5, 8, 9, 7]])


@torch.no_grad()
def with_biases(model):
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
    return model


def biased():
    return with_biases(llama(mlp_bias=True, attention_bias=True).float())


def plain():
    return llama().float()


def tied():
    return llama(tie_word_embeddings=True).float()


def conv1d():
    return with_biases(gpt2().float())


def direction(size, seed=1):
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def low_rank(size, rank, seed=2):
    reads = direction(2 * rank * size, seed).view(2, rank, size) / size**0.5
    return (*reads, torch.zeros(rank))


def out(model, inputs=IDS):
    with torch.no_grad():
        given = model(inputs)
    return given if isinstance(given, torch.Tensor) else given.logits


def loaded(model, adapter, folder):
    """What PEFT makes of a copy of the model and the files."""
    adapter.save(folder)
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder))


def same(model, vectors, folder, *, c=1.0, inputs=IDS, verify_on=None, **options):
    """The adapter, with which the model gives what the hooked one gives, and not the plain one, which is as it was."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modules = [type(module) for module in model.modules()]
    before = out(model, inputs)
    adapter = to_peft(vectors, c, model, verify_on=verify_on, **options)
    with Steerer(model, vectors, c=c, **options):
        steered = out(model, inputs)
    given = out(loaded(model, adapter, folder), inputs)
    assert (given - steered).abs().max() <= 1e-5 * (1 + steered.abs().max())
    assert (steered - before).abs().max() > 1e-3
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert modules == [type(module) for module in model.modules()]
    assert torch.equal(out(model, inputs), before)
    return adapter


# --- what is exact ---------------------------------------------------------------------------------------------------
BLOCK, H = "model.layers.1", "transformer.h.1"
SITES = [
    *((plain, f"{BLOCK}.self_attn.{name}", d) for name, d in {"q_proj": 16, "k_proj": 8, "o_proj": 16}.items()),
    *((plain, f"{BLOCK}.mlp.{name}", d) for name, d in {"up_proj": 24, "down_proj": 16, "down_proj:in": 24}.items()),
    *((plain, "model.embed_tokens", 16), (plain, "lm_head", 37), (plain, "lm_head:in", 16), (tied, "lm_head:in", 16)),
    *((tied, "model.embed_tokens", 16), (conv1d, "transformer.wte", 8), (conv1d, "transformer.wpe", 8)),
    *((biased, f"{BLOCK}.mlp.down_proj:in", 24), (biased, f"{BLOCK}.self_attn.o_proj:in", 16)),
    *((conv1d, f"{H}.mlp.c_proj:in", 32), (conv1d, f"{H}.attn.c_attn:in", 8), (conv1d, "lm_head:in", 8)),
    *((plain, f"{BLOCK}.self_attn.o_proj:in[8:16]", 8), (conv1d, f"{H}.attn.c_proj:in[0:4]", 4)),  # a head
]


@pytest.mark.parametrize(("build", "site", "d"), SITES)
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_at_the_output_and_the_input_of_a_layer(build, site, d, tmp_path):
    model = build()
    v = SteeringVector({site: direction(d)})
    assert same(model, v, tmp_path, c=1.5, intervention=Ablate()).config.r == 1
    assert same(model, LowRank({site: low_rank(d, 3)}), tmp_path).config.r == 3


@given(
    c=st.floats(-2, 2).filter(lambda c: abs(c) > 0.05),
    other=st.sampled_from([-1.0, 0.0, 0.5]),
    rank=st.integers(1, 4),
    seed=st.integers(0, 99),
)
def test_any_strengths_ranks_and_directions(c, other, rank, seed, tmp_path_factory):
    model, site = plain(), f"{BLOCK}.mlp.down_proj"
    vectors = {"one": direction(16, seed), "two": direction(16, seed + 100), "low": torch.zeros(16)}
    bank = VectorBank({name: SteeringVector({site: own}) for name, own in vectors.items()})
    edit = LowRank({site: low_rank(16, rank, seed + 200)})
    interventions = {"one": Ablate(), "two": Chain(Ablate(), Ablate()), "low": edit}
    strengths = {"one": c, "two": other, "low": 1.0}
    adapter = same(model, bank, tmp_path_factory.mktemp("lora"), c=strengths, intervention=interventions)
    assert adapter.config.r == rank + 1 + bool(other)


def test_clamp_to_zero_is_an_ablation(tmp_path):
    v = SteeringVector({f"{BLOCK}.mlp.down_proj": direction(16)})
    assert same(plain(), v, tmp_path, intervention=Clamp(0.0)).config.r == 1


def test_layers_of_several_ranks_have_the_largest_and_the_scaling_is_one(tmp_path):
    edit = LowRank({f"{BLOCK}.mlp.down_proj": low_rank(16, 1), f"{BLOCK}.mlp.up_proj:in": low_rank(16, 5)})
    adapter = same(plain(), edit, tmp_path)
    assert adapter.config.r == adapter.config.lora_alpha == 5
    assert {min(tensor.shape) for tensor in adapter.tensors.values()} == {5}
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}


def test_both_sides_of_one_layer_and_what_it_is_a_part_of(tmp_path):
    model = plain()
    places = {f"{BLOCK}.mlp": 16, f"{BLOCK}.mlp.down_proj:in": 24, f"{BLOCK}.mlp.down_proj:out": 16}
    edit = LowRank({site: low_rank(d, 2, seed=len(site)) for site, d in places.items()})
    assert same(model, edit, tmp_path, verify_on=IDS).config.r == 6


@pytest.mark.parametrize("build", [plain, tied])
@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings")
def test_a_direction_out_of_the_whole_residual_stream(build, tmp_path):
    model = build()
    v = SteeringVector(dict.fromkeys(residual_writers(model), direction(16)))
    adapter = same(model, v, tmp_path, intervention=Ablate(), verify_on=IDS)
    adapted = loaded(model, adapter, tmp_path)
    with torch.no_grad():
        stream = adapted(IDS, output_hidden_states=True).hidden_states[:-1]
    for hidden in stream:
        assert (hidden @ direction(16)).abs().max() < 1e-4 * hidden.abs().max()


def test_of_a_model_without_transformers(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.ReLU(), nn.Linear(4, 4, bias=False)))
    model.append(nn.Linear(4, 4, bias=False))
    v = SteeringVector({"2": direction(4)})  # which "1.2" ends with too
    same(model, v, tmp_path, intervention=Ablate(), inputs=torch.randn(5, 3), verify_on=torch.randn(5, 3))


def test_a_bias_with_nothing_along_the_direction(tmp_path):
    model, site, u = biased(), f"{BLOCK}.mlp.down_proj", direction(16)
    bias = model.get_submodule(site).bias
    with torch.no_grad():
        bias -= (bias.double() @ u.double() / (u.double() @ u.double()) * u.double()).float()
    same(model, SteeringVector({site: u}), tmp_path, intervention=Ablate())


@pytest.mark.parametrize("site", [f"{BLOCK}.mlp.down_proj", f"{BLOCK}.mlp.down_proj:in"])
def test_merged_it_is_the_fold(site, tmp_path):
    model = plain()
    v = SteeringVector({site: direction(24 if site.endswith("in") else 16)})
    merged = loaded(model, to_peft(v, 0.7, model, intervention=Ablate()), tmp_path).merge_and_unload()
    folded = fold(model, v, 0.7, intervention=Ablate(), verify_on=IDS)
    expected = folded.state_dict()
    for name, tensor in merged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], atol=1e-6, rtol=1e-6)


def test_a_steering_has_its_own_strength_and_the_files_are_peft_s(tmp_path):
    v = SteeringVector({f"{BLOCK}.mlp.down_proj": direction(16)}, concept="it")
    one = to_peft(Steering(v, c=0.5, intervention=Ablate()), None, plain())
    other = to_peft(v, 0.5, plain(), intervention=Ablate())
    assert all(torch.equal(tensor, other.tensors[name]) for name, tensor in one.tensors.items())
    model = plain()
    model.save_pretrained(tmp_path / "base")
    model = type(model).from_pretrained(tmp_path / "base")
    to_peft(v, 0.5, model, intervention=Ablate()).save(tmp_path / "new")
    assert {own.name for own in (tmp_path / "new").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}
    assert peft.PeftConfig.from_pretrained(str(tmp_path / "new")).target_modules == {f"{BLOCK}.mlp.down_proj"}
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(str(tmp_path / "new"))  # which knows its base model
    with Steerer(model, v, c=0.5, intervention=Ablate()):
        assert (out(adapted) - out(model)).abs().max() < 1e-5


def test_half_precision_is_steered_as_near_as_it_can_be(tmp_path):
    model, v = plain().bfloat16(), SteeringVector({f"{BLOCK}.mlp.down_proj": direction(16)})
    adapted = loaded(model, to_peft(v, 1.0, model, intervention=Ablate(), verify_on=IDS), tmp_path)
    with Steerer(model, v, intervention=Ablate()):
        steered = out(model)
    assert (out(adapted) - steered).abs().max() < 0.05 * steered.abs().max()


# --- what is refused -------------------------------------------------------------------------------------------------
DOWN, V = f"{BLOCK}.mlp.down_proj", SteeringVector({f"{BLOCK}.mlp.down_proj": direction(16)})
WITH_CONSTANT = LowRank({DOWN: (*low_rank(16, 2)[:2], torch.ones(2))})
NORM = SteeringVector({f"{BLOCK}.input_layernorm": direction(16)})


@pytest.mark.parametrize(
    ("vectors", "options", "why"),
    [
        (V, {}, "adds a constant, of norm .* a LoRA has no bias"),
        (WITH_CONSTANT, {}, "adds a constant"),
        (V, {"intervention": Ablate(around=torch.ones(16))}, "adds a constant"),
        (V, {"intervention": Clamp(2.0)}, "adds a constant"),
        (Affine({DOWN: (torch.eye(16), torch.ones(16))}), {}, "adds a constant"),
        (V, {"intervention": Ablate(one_sided=True)}, "Ablate is not an affine map"),
        (V, {"intervention": KeepNorm(Ablate())}, "KeepNorm is not an affine map"),
        (V, {"intervention": Rotate(0.5)}, "Rotate is not an affine map"),
        (V, {"c": torch.tensor([1.0, 2.0])}, "one strength for all rows"),
        (V, {"c": lambda step: 1.0 + step}, "one strength for all rows and steps"),
        (V, {"c": 0.0, "intervention": Ablate()}, "changes nothing at this c"),
        (Steering(V, intervention=Ablate(), gate=ProjectionAbove(V, 0.0)), {}, "gate: weights steer"),
        (Steering(V, intervention=Ablate(), positions="last"), {}, "positions: weights steer"),
        (
            NORM,
            {"intervention": Ablate()},
            "is no linear layer or embedding; name one that writes there",
        ),
        (NORM, {"intervention": Ablate(), "verify_on": IDS}, "input_layernorm .* has a part in it"),
        (SteeringVector({BLOCK: direction(16)}), {"intervention": Ablate(), "verify_on": IDS}, "has a part in it"),
    ],
)
def test_what_a_lora_cannot_be_is_refused_with_the_reason(vectors, options, why):
    model = plain()
    c = options.pop("c", None)
    with pytest.raises(NotFoldable, match=why):
        to_peft(vectors, c, model, **options)


def whole():
    return nn.Linear(4, 4, bias=False)


def convolution():
    return nn.Sequential(nn.Conv1d(4, 4, 1, bias=False))


def twice():
    layer = nn.Linear(4, 4, bias=False)
    return nn.Sequential(layer, nn.ReLU(), layer)


def hooked():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].register_forward_hook(lambda module, args, output: 2 * output)
    return model


class Own(nn.Linear):
    def forward(self, x):
        return super().forward(x).square()


def own():
    return nn.Sequential(Own(4, 4, bias=False))


def turned():
    return nn.Sequential(nn.Linear(4, 4, bias=False))


def embedding():
    return nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))


def quantised():
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    model[0].weight = nn.Parameter(model[0].weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    return model


@pytest.mark.parametrize(
    ("build", "site", "axis", "why"),
    [
        (biased, DOWN, None, r"down_proj \(Linear\): its bias would change too, by .* a LoRA has no bias"),
        (conv1d, f"{H}.mlp.c_proj", None, "its bias would change too"),
        (whole, "", None, r"the model \(Linear\): it is the whole model"),
        (convolution, "0", None, "is no linear layer or embedding"),
        (twice, "0", None, "it is one module with 2, and PEFT adapts one name"),
        (hooked, "0", None, "it has hooks"),
        (own, "0", None, "is no linear layer or embedding"),
        (turned, "0", "-2", "edits the last axis, -1, and not axis -2"),
        (embedding, "0", None, "it scales its rows to max_norm"),
        (quantised, "0", None, "its weight is quantised"),
    ],
)
def test_the_layer_that_cannot_carry_it_is_named(build, site, axis, why):
    model = build()
    d = {conv1d: 8, biased: 16}.get(build, 4)
    v = SteeringVector({site: direction(d)}, metadata={} if axis is None else {f"axis {site}": axis})
    with pytest.raises(NotFoldable, match=why):
        to_peft(v, 1.0, model, intervention=Ablate())


class Reads(nn.Module):
    """A module that reads the weight of a layer, and does not call it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        return self.first(x) if x.shape[0] == 1 else nn.functional.linear(x, self.first.weight) + 0 * self.first(x)


class Inside(nn.Module):
    """A layer that runs inside a site, and outside of it too."""

    def __init__(self):
        super().__init__()
        self.site = nn.Sequential(nn.Linear(4, 4, bias=False))

    def forward(self, x):
        return self.site(x) - 2 * self.site[0](x.abs())


def test_a_layer_that_runs_elsewhere_too_is_found_by_the_outputs():
    v = SteeringVector({"site": direction(4)})
    with pytest.raises(NotFoldable, match="with the adapter, the outputs differ by"):
        to_peft(v, 1.0, Inside(), intervention=Ablate(), verify_on=torch.randn(3, 4))


def test_what_looks_right_and_is_not_is_found_by_the_outputs():
    model, v = Reads(), SteeringVector({"first": direction(4)})
    to_peft(v, 1.0, model, intervention=Ablate(), verify_on=torch.randn(1, 4))
    with pytest.raises(NotFoldable, match="moves the outputs by 0"):
        to_peft(v, 1.0, model, intervention=Ablate(), verify_on=torch.randn(3, 4))


def test_a_steered_model_is_refused():
    model = plain()
    with Steerer(model, V):
        out(model)
        with pytest.raises(AttachedError, match="is being steered"):
            to_peft(V, 1.0, model, intervention=Ablate())


def test_without_peft_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"pip install 'actsteer\[peft\]'"):
        to_peft(V, 1.0, plain(), intervention=Ablate())
