"""The features that `actsteer sites` tells of Hugging Face models are those that the model gives."""

import pytest
import torch
import transformers

from actsteer import SteeringVector
from actsteer.sites.blocks import find_blocks
from tests.zoo import llama

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 16}
KINDS = {
    "LlamaForCausalLM": {"num_key_value_heads": 1},
    "Qwen3ForCausalLM": {"num_key_value_heads": 1, "head_dim": 4},
    "Gemma2ForCausalLM": {"num_key_value_heads": 1, "head_dim": 8},
    "Olmo2ForCausalLM": {"num_key_value_heads": 1},
    "GPT2LMHeadModel": {"n_embd": 16, "n_layer": 2, "n_head": 2},
    "GPTNeoXForCausalLM": {},
    "BloomForCausalLM": {"n_layer": 2, "n_head": 2},
    "OPTForCausalLM": {"word_embed_proj_dim": 16, "ffn_dim": 24},
    "MambaForCausalLM": {"state_size": 4},
    "MixtralForCausalLM": {"num_key_value_heads": 1, "num_local_experts": 2},
    "BertForMaskedLM": {},
}


def made(kind, options):
    """The model, in a folder that has its name."""
    family = next(kind.removesuffix(end) for end in ("ForCausalLM", "LMHeadModel", "ForMaskedLM") if kind.endswith(end))
    torch.manual_seed(0)
    model = getattr(transformers, kind)(getattr(transformers, f"{family}Config")(**(SMALL | options))).eval()
    model.save_pretrained("model")
    return model


def told(done):
    """Site -> features, of the rows that say them."""
    return {line[0]: int(line[2]) for line in done.lines[1:] if len(line) == 3}


def given(model, **inputs):
    """Module -> the last size of what it gives, or of the first part of it."""
    sizes = {}

    def note(name):
        def hook(_module, _inputs, output):
            first = output[0] if isinstance(output, tuple) else output
            if isinstance(first, torch.Tensor):
                sizes[name] = first.shape[-1]

        return hook

    for name, module in model.named_modules():
        module.register_forward_hook(note(name))
    with torch.no_grad():
        model(**inputs)
    return sizes


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_told_is_what_the_model_gives(run, folder, kind):
    model = made(kind, KINDS[kind])
    sizes, found = given(model, input_ids=torch.tensor([[3, 4, 5]])), told(run("sites", "model"))
    ran = {site: features for site, features in found.items() if site in sizes}
    assert ran == {site: sizes[site] for site in ran}
    blocks, count = find_blocks(model)
    assert [ran.get(f"{blocks}.{number}") for number in range(count)] == [16, 16]


def test_blocks_attention_mlp_and_norms_of_a_llama(run):
    found = told(run("sites", "llama"))
    block = ["", ".self_attn", ".mlp", ".input_layernorm", ".post_attention_layernorm"]
    for site in (*(f"model.layers.{i}{part}" for i in range(3) for part in block), "model.norm"):
        assert found[site] == 16
    assert not found.keys() & {"model", "model.rotary_emb", "model.layers.0.mlp.act_fn"}
    assert told(run("sites", "llama", "model.layers.1:out.0")) == {"model.layers.1:out.0": 16}
    assert told(run("sites", "llama", "model.layers.1:in")) == {}


def test_heads_are_told_by_their_exact_names(run):
    found = told(run("sites", "llama", "model.layers.1.self_attn.o_proj:in[head=*]"))
    size = next(iter(found.values()))
    assert found == {
        f"model.layers.1.self_attn.o_proj:in[{size * i}:{size * (i + 1)}]": size for i in range(len(found))
    }
    assert len(found) > 1


def test_a_head_is_fitted_and_steered_and_shown(run):
    (site,) = told(run("sites", "llama", head := "model.layers.1.self_attn.o_proj:in[head=1]"))
    texts = ("--positive", "love.txt", "--negative", "hate.txt")
    assert run("fit", "-m", "llama", *texts, "--sites", head, "-o", "v.safetensors").code == 0
    assert SteeringVector.load("v.safetensors").sites == (site,)
    assert run("generate", "-m", "llama", "-b", "v.safetensors", "-c", "2", "I", "--max-new-tokens", 3).code == 0
    assert any(site in " ".join(line) for line in run("show", "v.safetensors").lines)


def test_the_residual_stream_alone(run):
    done = run("sites", "llama", "--residual")
    assert [line[0] for line in done.lines[1:]] == [f"model.layers.{number}" for number in range(len(done.lines) - 1)]
    assert len(done.lines) > 2 and {line[2] for line in done.lines[1:]} == {"16"}
    done = run("sites", "llama", "model.layers.[01]", "--residual")
    assert [line[0] for line in done.lines[1:]] == ["model.layers.0", "model.layers.1"]
    assert run("sites", "nets:build", "--residual").code == 1


def test_a_star_stays_between_two_dots(run):
    every, blocks = run("sites", "llama").lines[1:], run("sites", "llama", "model.layers.*").lines[1:]
    assert [line[0] for line in blocks] == [
        line[0] for line in every if line[0].count(".") == 2 and "layers" in line[0]
    ]
    assert run("sites", "llama", "**").lines[1:] == every


def test_of_a_multimodal_model_the_text_config_tells(run, folder):
    text = llama(kind="Llama", vocab_size=16).config
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=12, num_attention_heads=2, num_hidden_layers=2, image_size=8, patch_size=4
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=15)
    transformers.LlavaForConditionalGeneration(config).save_pretrained("model")
    found = told(run("sites", "model"))
    blocks = {site: features for site, features in found.items() if site.endswith(("layers.0", "self_attn", "mlp"))}
    assert blocks and set(blocks.values()) == {16}
    assert all("language_model" in site for site in blocks)
    vision_norm = next(site for site in found if site.endswith("layers.0.layer_norm1"))
    assert found[vision_norm] == 8  # its class tells


def test_an_encoder_and_decoder_has_what_its_classes_tell(run, folder):
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 16}
    transformers.T5Model(transformers.T5Config(**sizes)).save_pretrained("model")
    found = told(run("sites", "model"))
    assert found["encoder.block.0.layer.1.DenseReluDense.wi"] == 24
    assert not found.keys() & {"encoder.block.0", "decoder.block.0"}


def test_where_the_config_s_size_is_not_that_of_every_block_nothing_is_told(run, folder):
    stages = {"depths": [1, 1], "num_heads": [2, 2], "embed_dim": 8, "image_size": 16, "patch_size": 4}
    transformers.SwinModel(transformers.SwinConfig(**stages, window_size=2)).save_pretrained("model")
    done = run("sites", "model")
    assert done.code == 0
    assert not {site for site in told(done) if site.endswith(("layers.0", "layers.1", "attention"))}
    small = {"hidden_size": 16, "embedding_size": 8, "intra_bottleneck_size": 8, "true_hidden_size": 8}
    bottle = transformers.MobileBertConfig(**(SMALL | small))
    transformers.MobileBertModel(bottle).save_pretrained("other")
    assert not {site for site in told(run("sites", "other")) if site.endswith((".attention", "layer.0"))}
