"""Which modules of vLLM's are sites: those that mean what Hugging Face's of the same names do."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor, nn

from actsteer import Ablate, ProjectionAbove, ShapeError, Steering, SteeringVector, UnsupportedModelError
from actsteer.integrations.vllm.banks import check_alike
from actsteer.integrations.vllm.served import served
from actsteer.integrations.vllm.sites import find
from tests.integrations.vllm.test_served import D, Engine, Theirs, drawn


def kind(name: str, *bases: type, **attributes: Any) -> nn.Module:
    """A module of a class of this name."""
    made = (
        type(name, bases or (nn.Module,), {})(D, D) if nn.Linear in bases else type(name, bases or (nn.Module,), {})()
    )
    for attribute, value in attributes.items():
        setattr(made, attribute, value)
    return made


def zoo() -> nn.Module:
    """A model of vLLM's with what has a meaning of its own there."""
    model, block = Theirs(), Theirs().layers[0]
    model.embed_tokens, model.norm, model.rotary = nn.Embedding(3, D), nn.LayerNorm(D), kind("RotaryEmbedding")
    model.layers[0] = block
    block.self_attn = kind("Attention")
    block.self_attn.q_norm, block.self_attn.o_proj = nn.LayerNorm(D), kind("RowParallelLinear", nn.Linear)
    block.self_attn.qkv_proj = kind("QKVParallelLinear", nn.Linear)
    block.mlp = kind("MLP", act_fn=kind("SiluAndMul"), down_proj=kind("RowParallelLinear", nn.Linear))
    block.moe = kind("MoE", experts=kind("MoERunner", type("MoERunnerInterface", (nn.Module,), {})))
    block.moe.gate, block.moe.shared = nn.Linear(D, D), kind("MLP", down_proj=nn.Linear(D, D))
    block.norm = nn.LayerNorm(D)
    return model


SERVED = ["layers.0", "layers.0:in", "layers.0.self_attn", "layers.0.mlp", "layers.0.moe", "layers.0.norm", "norm"]
SERVED += ["layers.0.self_attn.o_proj", "layers.0.mlp.down_proj:in", "layers.0.self_attn.qkv_proj:in", "embed_tokens"]


@pytest.mark.parametrize("site", SERVED)
def test_blocks_their_parts_linear_layers_and_outside_of_blocks_norms_and_embeddings_are_sites(site: str) -> None:
    for own in zoo().modules():
        own.forward = lambda hidden_states: hidden_states
    found = find(zoo(), site, reads=False)
    assert found is not None
    assert found.place.site == site


@pytest.mark.parametrize(
    ("site", "message"),
    [
        ("layers.0.mlp.act_fn", "SiluAndMul is no block"),
        ("layers.0.self_attn.q_norm", "LayerNorm is no block"),
        ("rotary", "RotaryEmbedding is no block"),
        ("layers.0.moe.shared", "MLP is no block"),
        ("layers.0.moe.experts", "MoERunner is no block"),
        ("layers.0.moe.gate", "part of moe, and MoERunner does"),
        ("layers.0.moe.shared.down_proj", "part of moe, and MoERunner does"),
        ("layers.0.self_attn.qkv_proj", "QKVParallelLinear computes several layers in one, in an order of its own"),
    ],
)
def test_modules_that_mean_another_thing_in_vllm_are_refused(site: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        find(zoo(), site, reads=False)


def test_what_is_fused_in_hugging_faces_order_is_a_site_and_so_is_a_layer_that_adapters_are_put_on() -> None:
    model = zoo()
    fused = model.layers[0].self_attn.qkv_proj
    model.layers[0].self_attn.qkv_proj = kind("QKVParallelLinearWithLoRA", base_layer=fused)
    fused_with = model.layers[0].self_attn.qkv_proj
    fused_with.forward = fused.forward
    with pytest.raises(UnsupportedModelError, match="in an order of its own"):
        find(model, "layers.0.self_attn.qkv_proj", reads=False)
    model.__class__ = type("Phi3ForCausalLM", (Theirs,), {})
    assert find(model, "layers.0.self_attn.qkv_proj", reads=False) is not None


def test_a_part_of_a_sum_in_each_process_is_refused_and_the_block_that_sums_is_not() -> None:
    model = zoo()
    linear = model.layers[0].mlp.down_proj
    linear.reduce_results, linear.tp_size = False, 1
    model.layers[0].mlp.forward = linear.forward
    assert find(model, "layers.0.mlp", reads=False) is not None
    linear.tp_size = 2
    for site in ("layers.0.mlp", "layers.0.mlp.down_proj"):
        with pytest.raises(UnsupportedModelError, match="reduce_results=False"):
            find(model, site, reads=False)
    assert find(model, "layers.0", reads=False) is not None
    assert find(model, "layers.0.mlp.down_proj:in", reads=False) is not None


def test_in_a_model_that_takes_more_than_text_the_blocks_of_its_language_model_are_sites_alone() -> None:
    model = nn.ModuleDict({"language_model": zoo(), "visual": Theirs()})
    model.get_language_model = lambda: model["language_model"]
    assert find(model, "language_model.layers.1", reads=False) is not None
    for site in ("visual.layers.1", "language_model.embed_tokens"):
        with pytest.raises(UnsupportedModelError, match="more than text"):
            find(model, site, reads=False)


def test_rows_that_are_no_tokens_are_refused_when_the_model_is_tried() -> None:
    engine = Engine(Steering(SteeringVector({"layers.0.mlp": drawn(D)})))
    engine.filler.add("a", None, 2)
    engine.model.layers[0].mlp(drawn(1, 2, D))  # as transformers' own code has them
    with pytest.raises(ShapeError, match="as heads or streams have"):
        engine.model.layers[0].mlp(drawn(2, 4, D))


def test_modules_of_hugging_face_that_do_more_than_vllms_of_that_name_are_refused() -> None:
    class Scaled(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return 8 * super().forward(ids)

    class Adding(nn.Module):
        def forward(self, x: Tensor, residual: Tensor) -> Tensor:
            return x + residual

    model = nn.ModuleDict({"wte": nn.Embedding(3, D), "scaled": Scaled(3, D), "mlp": Adding(), "out": nn.Linear(D, D)})
    v = {name: SteeringVector({name: drawn(D)}, concept="v") for name in ("wte", "scaled", "mlp", "mlp:in", "out")}
    for fine in ("wte", "mlp", "mlp:in", "out"):
        check_alike(model, served(Steering(v[fine])))
    check_alike(model, served(Steering(v["out"], intervention=Ablate())))
    check_alike(model, served(Steering(v["mlp:in"], intervention=Ablate())))
    with pytest.raises(UnsupportedModelError, match="Scaled does more than look up"):
        check_alike(model, served(Steering(v["scaled"])))
    reading = Steering(v["mlp"], intervention=Ablate())
    gated = Steering(v["out"], gate=ProjectionAbove(SteeringVector({"mlp": drawn(D)}), 0.0, per="token"))
    for own in (reading, gated):
        with pytest.raises(UnsupportedModelError, match="Adding adds the residual stream"):
            check_alike(model, served(own))
