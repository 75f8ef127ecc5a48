"""The usual places of a transformer: where its residual stream is, and what is added to it."""

import pytest
import torch
import transformers
from torch import nn

from actsteer import (
    SiteNotFoundError,
    Steerer,
    SteeringVector,
    UnsupportedModelError,
    attention_sites,
    mlp_sites,
    record,
    residual_sites,
    residual_writers,
)

IDS = torch.tensor([[1, 2, 3, 4]])
SMALL = {"vocab_size": 17, "hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2, "num_hidden_layers": 3}
OTHERS = {"num_key_value_heads": 2, "head_dim": 4, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
GPT2 = {"n_layer": 3, "n_embd": 8, "n_head": 2, "n_positions": 32, "vocab_size": 17, "bos_token_id": 1}
KINDS = {
    "llama": {**SMALL, **OTHERS},
    "gemma2": {**SMALL, **OTHERS},
    "olmo2": {**SMALL, **OTHERS},
    "glm4": {**SMALL, **OTHERS},
    "mixtral": {**SMALL, **OTHERS, "num_local_experts": 2},
    "gpt_neox": SMALL,
    "opt": {**SMALL, "ffn_dim": 12, "word_embed_proj_dim": 8, "max_position_embeddings": 32},
    "gpt2": GPT2 | {"eos_token_id": 2},
}


def build(kind):
    torch.manual_seed(0)
    config = transformers.CONFIG_MAPPING[kind](**KINDS[kind])
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture(params=KINDS)
def model(request):
    return build(request.param)


def before(model):
    """The stream before the first block of the last two, behind it, and behind the last."""
    first, last = residual_sites(model, [-2, -1])
    found = record(model, [{"input_ids": IDS}], sites=[f"{first}:in", first, last], progress=False)
    return found[f"{first}:in"], found[first], found[last]


def test_what_the_writers_write_is_what_the_residual_stream_gains(model):
    writers = residual_writers(model, slice(-2, None))
    written = record(model, [{"input_ids": IDS}], sites=writers, progress=False)
    start, between, end = before(model)
    half = len(writers) // 2
    torch.testing.assert_close(start + sum(written[site] for site in writers[:half]), between)
    torch.testing.assert_close(start + sum(written.values()), end)
    whole = record(model, [{"input_ids": IDS}], sites=residual_writers(model), progress=False)
    torch.testing.assert_close(sum(whole.values()), end)


def test_there_is_one_of_each_for_every_block_and_they_can_be_steered(model):
    places = {f.__name__: f(model) for f in (residual_sites, attention_sites, mlp_sites)}
    assert {len(found) for found in places.values()} == {3}
    assert len(residual_writers(model, slice(None))) == 6
    assert residual_writers(model) == (f"{residual_sites(model, 0)[0]}:in", *residual_writers(model, slice(None)))
    plain = model(IDS).logits
    for site, *_ in places.values():
        with Steerer(model, SteeringVector({site: torch.linspace(-3, 3, 8)})):
            assert not torch.allclose(model(IDS).logits, plain)


def test_blocks_are_numbered_from_either_end():
    model = build("llama")
    first, second, third = residual_sites(model)
    assert (first, third) == ("model.layers.0", "model.layers.2")
    for blocks, expected in {
        0: (first,),
        -1: (third,),
        (2, 0): (first, third),
        (-1, 2): (third,),
        range(1, 3): (second, third),
    }.items():
        assert residual_sites(model, blocks) == expected
    assert residual_sites(model, slice(-2, None)) == (second, third)
    assert mlp_sites(model, -1) == ("model.layers.2.mlp",)
    assert attention_sites(model, iter([0])) == ("model.layers.0.self_attn",)


@pytest.mark.parametrize("blocks", [3, -4, [0, 7], True, "0", 1.0])
def test_a_block_that_is_not_there_is_refused(blocks):
    for places in (residual_sites, residual_writers):
        with pytest.raises(
            (SiteNotFoundError, TypeError), match=r"has the blocks 0 to 2 in 'model.layers', or -3 to -1|got 1.0"
        ):
            places(build("llama"), blocks)


def test_no_blocks_are_refused():
    with pytest.raises(SiteNotFoundError, match=r"no blocks are meant by slice\(9, None, None\); .* has 3"):
        residual_sites(build("llama"), slice(9, None))
    with pytest.raises(SiteNotFoundError, match="no blocks are meant"):
        residual_sites(build("llama"), [])


def test_a_model_that_is_no_transformer_is_refused():
    with pytest.raises(UnsupportedModelError, match="expected one list of blocks"):
        residual_sites(nn.Sequential(nn.Linear(2, 2)))


def test_a_part_without_a_usual_name_is_refused_with_the_names_that_there_are():
    bert = transformers.BertModel(transformers.BertConfig(**SMALL))
    for places in (mlp_sites, residual_writers):
        with pytest.raises(
            UnsupportedModelError, match=r"no MLP has a usual name in 'encoder.layer.0', which has \['att"
        ):
            places(bert)


def test_a_part_that_adds_to_the_residual_stream_itself_is_no_writer():
    bloom = transformers.BloomModel(transformers.BloomConfig(hidden_size=8, n_layer=2, n_head=2, vocab_size=17))
    assert attention_sites(bloom, 0) == ("h.0.self_attention",)
    with pytest.raises(UnsupportedModelError, match=r"'h.0.self_attention' takes the residual stream and adds to it"):
        residual_writers(bloom)


def test_a_block_without_an_attention_is_left_out():
    class Block(nn.Module):
        def __init__(self, kind):
            super().__init__()
            self.add_module(kind, nn.Identity())

    model = nn.ModuleDict({"layers": nn.ModuleList([Block("attn"), Block("mixer")])})
    assert attention_sites(model) == ("layers.0.attn",)
    with pytest.raises(UnsupportedModelError, match=r"no attention has a usual name in 'layers.1'"):
        attention_sites(model, 1)
