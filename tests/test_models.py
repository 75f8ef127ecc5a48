"""It works as it stands on TransformerLens, convolutional, recurrent, torch's own and Hugging Face's transformers."""

import pytest
import torch
from torch import nn

from actsteer import (
    OutputError,
    ShapeError,
    SiteNotFoundError,
    Steerer,
    SteeringVector,
    StrengthError,
    collect,
    find_sites,
    fit,
    record,
    sweep,
)
from tests.oracles import state
from tests.zoo import cnn, encoder, gpt2, lens, mlp, normal, recurrent, seeded

TOKENS = torch.tensor([[1, 5, 9, 2], [3, 3, 16, 8], [7, 0, 4, 11]])


def steered(model, x, v, **options):
    with Steerer(model, v, **options), torch.no_grad():
        return model(x)


def hooked(model, x, site, delta):
    """The output with `delta` added by a hook of torch's own."""
    handle = model.get_submodule(site).register_forward_hook(lambda module, args, output: output + delta)
    with torch.no_grad():
        output = model(x)
    handle.remove()
    return output


# --- the whole pipeline on every model -----------------------------------------------------------------------------
PIPELINES = {
    "mlp": (mlp, "*[258]", (8, 12)),
    "cnn": (cnn, ["0", "2", "5"], (8, 3, 4, 4)),
    "LSTM": (lambda: recurrent(nn.LSTM, batch_first=True), "rnn", (8, 3, 3)),
    "GRU, sequence first": (lambda: recurrent(nn.GRU, batch_first=False), ["rnn", "head"], (3, 8, 3)),
    "encoder": (lambda: encoder(batch_first=True), "layers.[01]", (8, 3, 4)),
    "TransformerLens": (lens, ["hook_embed", "hook_mid"], (8, 3)),
    "TransformerLens on sequences": (lens, "hook_*", (8, 2, 3)),
}


@pytest.mark.parametrize(("build", "sites", "shape"), PIPELINES.values(), ids=PIPELINES.keys())
def test_fit_and_steer_moves_the_mean_activation_of_one_side_to_the_other(build, sites, shape):
    model = build()
    positive, negative = normal(*shape, seed=4) + 1, normal(*shape, seed=5)
    before = state(model)
    last = find_sites(model, sites)[-1:]  # steering an earlier site moves what the later ones give out
    v = fit(model, positive=[positive], negative=[negative], sites=last, progress=False)
    with Steerer(model, v):
        moved = collect(model, [negative], sites=last, progress=False)
    expected = collect(model, [positive], sites=last, progress=False)
    torch.testing.assert_close(moved[last[0]].mean, expected[last[0]].mean)
    assert state(model) == before


@pytest.mark.parametrize(("build", "sites", "shape"), PIPELINES.values(), ids=PIPELINES.keys())
def test_a_sweep_of_strengths_is_as_far_as_it_says(build, sites, shape):
    model, x = build(), normal(*shape)
    site = find_sites(model, sites)[-1]
    v = SteeringVector({site: normal(record(model, [x], sites=site, progress=False)[site].shape[1], seed=2)})

    def mean(model):
        return {"mean": collect(model, [x], sites=site, progress=False)[site].mean}

    zero, one, three = (row["mean"] for row in sweep(model, v, c=[0, 1, 3], evaluate=mean, progress=False))
    torch.testing.assert_close(one - zero, v[site])
    torch.testing.assert_close(three - zero, 3 * v[site])


# --- TransformerLens -----------------------------------------------------------------------------------------------
HIDDEN = SteeringVector({"hook_mid": torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)})


@pytest.mark.parametrize("shape", [(2, 3), (2, 5, 3)], ids=["rows", "sequences"])
def test_hook_points_are_sites_by_their_names(shape):
    model, x = lens(), normal(*shape)
    assert "hook_mid" in find_sites(model, "hook_*")
    expected = model.run_with_hooks(x, fwd_hooks=[("hook_mid", lambda value, hook: value + 2 * HIDDEN["hook_mid"])])
    assert torch.equal(steered(model, x, HIDDEN, c=2), expected)


def test_the_cache_has_the_steered_value():
    model, x = lens(), normal(2, 3)
    _, plain = model.run_with_cache(x)
    with Steerer(model, HIDDEN, c=3):
        output, cache = model.run_with_cache(x)
        assert torch.equal(output, model(x))
    assert torch.equal(cache["hook_mid"], plain["hook_mid"] + 3 * HIDDEN["hook_mid"])
    assert torch.equal(cache["hook_embed"], plain["hook_embed"])
    assert torch.equal(cache["hook_out"], output)


def test_resetting_the_hooks_inside_the_block_leaves_the_steering():
    model, x = lens(), normal(2, 3)
    with Steerer(model, HIDDEN):
        steered_output = model(x)
        model.reset_hooks(including_permanent=True)
        assert torch.equal(model(x), steered_output)


def test_a_name_that_is_no_hook_point_is_refused_with_the_close_ones():
    with pytest.raises(SiteNotFoundError, match=r"Toy has no site 'hook_middle'. Close names: 'hook_mid'"):
        Steerer(lens(), SteeringVector({"hook_middle": torch.ones(4)}))


# --- torch's own ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("site", ["layers.0", "layers.0.linear2", "layers.1.norm2", "layers.1.self_attn"])
def test_the_fast_path_of_the_encoder_is_steered_as_the_slow_one_is(site, batch_first):
    model, x, v = encoder(batch_first=batch_first), normal(2, 3, 4), normal(4, seed=2)
    with Steerer(model, SteeringVector({site: v}), c=2):
        slow = model(x)
        with torch.no_grad():
            fast = model(x)
        with torch.inference_mode():
            inferred = model(x)
    torch.testing.assert_close(fast, slow)
    torch.testing.assert_close(inferred, slow)
    with torch.no_grad():
        assert not torch.allclose(model(x), fast)


def test_an_image_model_is_steered_channel_by_channel():
    model, x, v = cnn(), normal(2, 3, 4, 4), normal(4, seed=2)
    assert torch.equal(steered(model, x, SteeringVector({"2": v})), hooked(model, x, "2", v[:, None, None]))


# --- Hugging Face --------------------------------------------------------------------------------------------------
BLOCK = "transformer.h.1"
IN_BLOCK = SteeringVector({BLOCK: normal(8, seed=2)})


def test_a_block_of_gpt2_is_steered_as_by_hand():
    model = gpt2()
    expected = hooked(model, TOKENS, BLOCK, 3 * IN_BLOCK[BLOCK]).logits
    assert torch.equal(steered(model, TOKENS, IN_BLOCK, c=3).logits, expected)
    assert not torch.allclose(steered(model, TOKENS, IN_BLOCK, c=0).logits, expected)


def test_attention_and_embedding_of_gpt2_are_sites():
    model = gpt2()
    v = SteeringVector({site: normal(8) for site in ("transformer.wte", "transformer.h.0.attn", "transformer.h.1.mlp")})
    with Steerer(model, v) as steerer, torch.no_grad():
        model(TOKENS)
    assert steerer.sites == v.sites


def test_one_strength_per_prompt_is_a_loop_over_prompts():
    model, c = gpt2(), torch.tensor([0.0, 2.0, -1.0])
    alone = [steered(model, row[None], IN_BLOCK, c=float(ci)).logits for row, ci in zip(TOKENS, c, strict=True)]
    torch.testing.assert_close(steered(model, TOKENS, IN_BLOCK, c=c).logits, torch.cat(alone))


def test_fitting_takes_what_a_tokenizer_gives():
    model = gpt2()
    sides = {}
    for side, tokens in {"positive": TOKENS, "negative": TOKENS.flip(0) // 2}.items():
        sides[side] = [{"input_ids": row[None], "attention_mask": torch.ones(1, 4, dtype=torch.long)} for row in tokens]
    v = fit(model, **sides, sites="transformer.h.[01]", concept="toy", progress=False)
    assert v.sites == ("transformer.h.0", "transformer.h.1")
    means = {side: [] for side in sides}
    for side, batches in sides.items():
        with torch.no_grad():
            hidden = [model(**batch, output_hidden_states=True).hidden_states[1] for batch in batches]
        means[side] = torch.cat(hidden).reshape(-1, 8).mean(dim=0)
    torch.testing.assert_close(v["transformer.h.0"].double(), means["positive"] - means["negative"])


@pytest.mark.parametrize("c", [2.0, torch.tensor([0.0, 2.0, -3.0])], ids=["number", "rows"])
def test_generating_with_a_cache_is_generating_without(c):
    model = gpt2()
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    with Steerer(model, IN_BLOCK, c=c):
        cached = model.generate(TOKENS, use_cache=True, **options)
        uncached = model.generate(TOKENS, use_cache=False, **options)
        step_by_step = TOKENS
        for _ in range(6):
            step_by_step = torch.cat([step_by_step, model(step_by_step).logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(cached, uncached)
    assert torch.equal(cached, step_by_step)
    assert not torch.equal(cached, model.generate(TOKENS, **options))


# --- what the layers of transformers give out ------------------------------------------------------------------------
SMALL = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 17}
GATED = {"intermediate_size": 12, "num_key_value_heads": 1, "max_position_embeddings": 32, "initializer_range": 0.5}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **GATED)))


def mixtral():
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SMALL, **GATED, num_local_experts=3, num_experts_per_tok=2, experts_implementation="eager")
    return seeded(lambda: MixtralForCausalLM(config))


def t5():
    from transformers import T5Config, T5EncoderModel

    sizes = {"d_model": 8, "d_kv": 4, "d_ff": 12, "num_layers": 2, "num_heads": 2, "vocab_size": 17}
    return seeded(lambda: T5EncoderModel(T5Config(**sizes, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)))


def bert():
    from transformers import BertConfig, BertModel

    return seeded(lambda: BertModel(BertConfig(**SMALL, intermediate_size=12, initializer_range=0.5)))


D = SteeringVector({"": torch.tensor([1.0, -2.0, 0.5, 4.0, 0.0, 3.0, -1.0, 2.0], dtype=torch.float64)})[""]


def first(value):
    """The tensor that a module gives, or the first of those."""
    return value if isinstance(value, torch.Tensor) else value[0]


def heard(model, site, **inputs):
    """A module's output, and the model's, by a hook of torch's own."""
    seen = []
    handle = model.get_submodule(site).register_forward_hook(lambda *given: seen.append(given[-1]))
    with torch.no_grad():
        output = model(**inputs)
    handle.remove()
    return seen[0], first(output)


LAYERS = {
    "gpt2": (gpt2, "transformer.h.0"),
    "gpt2 attention": (gpt2, "transformer.h.0.attn"),
    "llama": (llama, "model.layers.0"),
    "llama attention": (llama, "model.layers.0.self_attn"),
    "llama norm": (llama, "model.layers.1.input_layernorm"),
    "mixtral": (mixtral, "model.layers.0"),
    "mixtral experts": (mixtral, "model.layers.0.mlp.experts"),
    "mixtral mlp": (mixtral, "model.layers.1.mlp"),
    "t5 block": (t5, "encoder.block.0"),
    "t5 attention": (t5, "encoder.block.0.layer.0"),
    "bert": (bert, "encoder.layer.0"),
    "bert embeddings": (bert, "embeddings"),
}


@pytest.mark.parametrize(("build", "site"), LAYERS.values(), ids=LAYERS.keys())
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.case(18, 22)
def test_a_layer_is_steered_in_all_of_its_rows_and_positions_whatever_it_gives_out(build, site, backend):
    model = build()
    plain, before = heard(model, site, input_ids=TOKENS)
    with Steerer(model, SteeringVector({site: D}), backend=backend):
        steered_layer, after = heard(model, site, input_ids=TOKENS)
    assert type(steered_layer) is type(plain)
    assert torch.equal(first(steered_layer), first(plain) + D)
    assert not torch.allclose(after, before)
    again, restored = heard(model, site, input_ids=TOKENS)
    assert torch.equal(restored, before)
    rows = record(model, [{"input_ids": TOKENS}], sites=site, progress=False)[site]
    assert torch.equal(rows, first(again).reshape(-1, 8))


@pytest.mark.parametrize("c", [2.0, torch.tensor([0.0, 2.0, -1.0])], ids=["number", "rows"])
@pytest.mark.parametrize("build", [llama, mixtral])
@pytest.mark.case(18, 52)
def test_a_decoder_layer_takes_one_strength_or_one_per_row(build, c):
    model, v = build(), SteeringVector({"model.layers.0": D})
    out = steered(model, TOKENS, v, c=c).logits
    for index, row in enumerate(TOKENS):
        own = float(c[index]) if isinstance(c, torch.Tensor) else c
        torch.testing.assert_close(out[index], steered(model, row[None], v, c=own).logits[0])


@pytest.mark.case(22, 52)
def test_the_experts_have_tokens_and_no_rows():
    model, site = mixtral(), "model.layers.0.mlp.experts"
    with pytest.raises(StrengthError, match=r"3 rows of strength or gate against an activation of shape \(12, 8\)"):
        steered(model, TOKENS, SteeringVector({site: D}), c=torch.ones(3))


@pytest.mark.case(22)
def test_the_input_of_the_experts_is_asked_about_and_then_steered():
    model, site = mixtral(), "model.layers.0.mlp.experts:in"
    with pytest.raises(OutputError, match=r"the input .* holds several activations; name the one") as caught:
        steered(model, TOKENS, SteeringVector({site: D}))
    assert f"{site}.0" in str(caught.value)
    by_place = steered(model, TOKENS, SteeringVector({f"{site}.0": D})).logits
    by_name = steered(model, TOKENS, SteeringVector({f"{site}.hidden_states": D})).logits
    assert torch.equal(by_place, by_name)
    assert not torch.allclose(by_place, model(TOKENS).logits)


@pytest.mark.parametrize("suffix", ["", ".hidden_states", ".0"])
@pytest.mark.parametrize("backend", ["hook", "tap"])
@pytest.mark.case(23)
def test_the_attention_of_llama_is_steered_at_its_input_though_it_is_passed_by_name(suffix, backend):
    model, site = llama(), f"model.layers.0.self_attn:in{suffix}"
    norm = "model.layers.0.input_layernorm"  # gives that input, and nothing else takes it
    expected = steered(model, TOKENS, SteeringVector({norm: D})).logits
    assert torch.equal(steered(model, TOKENS, SteeringVector({site: D}), backend=backend).logits, expected)
    mine = record(model, [TOKENS], sites=site, progress=False)[site]
    assert torch.equal(mine, record(model, [TOKENS], sites=norm, progress=False)[norm])


@pytest.mark.case(18)
def test_a_model_output_is_steered_at_its_only_activation_or_at_the_one_named():
    model = bert()
    with torch.no_grad():
        plain = model(TOKENS)
    for site in (":out.last_hidden_state", "encoder"):
        with Steerer(model, SteeringVector({site: D})), torch.no_grad():
            out = model(TOKENS)
        assert type(out) is type(plain)
        torch.testing.assert_close(out.last_hidden_state, plain.last_hidden_state + D)
        assert torch.equal(out.pooler_output, plain.pooler_output) is (site != "encoder")
    assert torch.equal(model(TOKENS).last_hidden_state, plain.last_hidden_state)


@pytest.mark.case(18)
def test_a_loss_beside_the_logits_is_no_activation():
    model, v = gpt2(vocabulary=17), SteeringVector({"": torch.ones(17, dtype=torch.float64)})
    with torch.no_grad():
        plain = model(TOKENS, labels=TOKENS)
        with Steerer(model, v):
            out = model(TOKENS, labels=TOKENS)
    assert torch.equal(out.logits, plain.logits + 1)
    assert torch.equal(out.loss, plain.loss)
    assert type(out.past_key_values) is type(plain.past_key_values)


# --- torchvision -----------------------------------------------------------------------------------------------------
VISION = {
    "resnet18": ({}, {"relu": 1, "maxpool": 1, "layer1": 1, "layer1.0": 1, "layer2.0.relu": 1, "avgpool": 1}),
    "convnext_tiny": (
        {},
        {
            "features.0": 1,
            "features.0.1": 1,
            "features.1.0": 1,
            "features.1.0.block.0": 1,
            "features.1.0.block.1": 3,
            "features.1.0.block.4": 3,
            "features.1.0.block.6": 1,
            "features.1": 1,
            "features.2": 1,
            "classifier.1": 1,
        },
    ),
    "swin_t": (
        {},
        {
            "features.0.0": 1,
            "features.0.1": 3,
            "features.1.0": 3,
            "features.1.0.attn": 3,
            "features.1.0.mlp.1": 3,
            "features.2": 3,
            "flatten": 1,
        },
    ),
    "vit_b_16": (
        {"image_size": 32},
        {"conv_proj": 1, "encoder": 2, "encoder.layers.encoder_layer_0": 2, "encoder.layers.encoder_layer_0.mlp": 2},
    ),
}


@pytest.mark.parametrize(("name", "options", "axes"), [(name, *case) for name, case in VISION.items()], ids=VISION)
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.case(21)
def test_the_blocks_of_image_models_are_recorded_along_their_features_or_refused(name, options, axes, size):
    torchvision = pytest.importorskip("torchvision")
    if "image_size" in options:
        options = {"image_size": size}
    model, seen = getattr(torchvision.models, name)(weights=None, **options).eval(), {}

    def hook(site):
        return lambda module, args, output: seen.setdefault(site, []).append(output.clone())

    handles = [model.get_submodule(site).register_forward_hook(hook(site)) for site in axes]
    x, refused = torch.rand(1, 3, size, size), []
    for site, axis in axes.items():
        seen.clear()
        try:
            rows = record(model, x, sites=site, progress=False)[site]
        except ShapeError:
            refused.append(site)
            continue
        expected = torch.cat([call.movedim(axis, -1).reshape(-1, call.shape[axis]) for call in seen[site]])
        assert torch.equal(rows, expected), site
    for handle in handles:
        handle.remove()
    assert len(refused) <= 1
