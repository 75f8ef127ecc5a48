"""Blocks by number and by name, in the families that have them."""

import pytest
import torch
import transformers
from torch import nn

from actsteer import UnsupportedModelError
from actsteer.sites.blocks import block_of, blocks_of_type, find_blocks
from tests.zoo import gpt2, lens, llama

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 3, "intermediate_size": 24, "vocab_size": 37}
OTHERS = {
    "OPT": {"word_embed_proj_dim": 16, "ffn_dim": 24},
    "Bloom": {"n_layer": 3, "n_head": 2},
    "Falcon": {},
    "GPTNeoX": {},
    "GPTJ": {"n_embd": 16, "n_layer": 3, "n_head": 2, "rotary_dim": 4},
    "GPTNeo": {"num_layers": 3, "attention_types": [[["global"], 3]], "num_heads": 2},
    "GPTBigCode": {"n_embd": 16, "n_layer": 3, "n_head": 2},
    "Mpt": {"d_model": 16, "n_layers": 3, "n_heads": 2},
}


@pytest.mark.parametrize(
    "kind",
    ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Phi3", "Olmo2", "Cohere", "StableLm", "Starcoder2"],
)
def test_the_table_has_the_name_that_the_model_has(kind):
    model = llama(kind=kind)
    assert find_blocks(model) == ("model.layers", 3)
    assert blocks_of_type(model.config.model_type) == "model.layers"


@pytest.mark.parametrize("kind", OTHERS)
def test_the_table_has_the_name_that_the_model_has_elsewhere(kind):
    config = getattr(transformers, f"{kind}Config")(**(SMALL | OTHERS[kind]))
    name = {"GPTNeoX": "GPTNeoXForCausalLM"}.get(kind, f"{kind}ForCausalLM")
    with torch.device("meta"):
        model = getattr(transformers, name)(config)
    assert find_blocks(model) == (blocks_of_type(config.model_type), 3)


def test_gpt2_and_its_body_alone():
    assert find_blocks(gpt2()) == ("transformer.h", 2)
    assert blocks_of_type("gpt2") == "transformer.h"
    assert find_blocks(gpt2().transformer) == ("h", 2)


def test_models_in_which_it_is_open_are_refused():
    with torch.device("meta"):
        t5 = transformers.T5Model(transformers.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=2, num_heads=2))
    with pytest.raises(UnsupportedModelError, match="T5Model has an encoder and a decoder; name the sites"):
        find_blocks(t5)
    for model in (nn.Sequential(nn.Linear(2, 2)), lens()):
        with pytest.raises(
            UnsupportedModelError, match=r"expected one list of blocks, such as model.layers, found none"
        ):
            find_blocks(model)
    two = nn.ModuleDict({name: nn.ModuleList([nn.Linear(2, 2)]) for name in ("blocks", "layers")})
    with pytest.raises(UnsupportedModelError, match=r"found \['blocks', 'layers'\]"):
        find_blocks(two)


@pytest.mark.parametrize(
    ("site", "expected"),
    [
        ("model.layers.14", ("model.layers", 14)),
        ("model.layers.14:out", ("model.layers", 14)),
        ("transformer.h.0:out.0", ("transformer.h", 0)),
        ("model.layers.3:in", ("model.layers", 2)),
        ("model.layers.3:in.hidden_states", ("model.layers", 2)),
        ("blocks.5.hook_resid_post", ("blocks", 5)),
        ("blocks.5.hook_resid_pre", ("blocks", 4)),
        ("encoder.layer.7", ("encoder.layer", 7)),
        ("model.layers.3.mlp", None),
        ("model.layers.3.mlp.layers.1", None),
        ("layers.0.blocks.1", None),
        ("model.layers.3:out.1", None),
        ("model.layers", None),
        ("3", None),
        ("experts.3", None),
    ],
)
def test_the_block_of_a_site(site, expected):
    assert block_of(site) == expected
