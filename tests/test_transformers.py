"""Hugging Face's transformers, tiny and with random weights: outputs of every kind, generation, captured states."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actsteer import (
    OutputError,
    ProjectionAbove,
    ShapeError,
    Steerer,
    SteeringVector,
    UnsupportedModelError,
    collect,
    find_sites,
    fit,
    optimize,
    record,
)
from tests.oracles import state
from tests.zoo import gpt2, normal

transformers = pytest.importorskip("transformers")

D = 16
TOKENS = torch.tensor([[1, 5, 9, 2], [3, 3, 16, 8], [7, 1, 4, 11]])
PADDED = torch.tensor([[0, 0, 1, 5, 9], [3, 6, 3, 16, 8], [0, 7, 1, 4, 11]])
MASK = (PADDED != 0).long()
SIZES = {"hidden_size": D, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 17}
SPECIAL = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
IDS = {"input_ids": TOKENS}


def build(name, config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, name)(config).double().eval()


def llama():
    config = transformers.LlamaConfig(**SIZES, **SPECIAL, num_key_value_heads=1, initializer_range=0.5)
    return build("LlamaForCausalLM", config)


def mixtral():
    config = transformers.MixtralConfig(**SIZES, **SPECIAL, num_key_value_heads=1, num_local_experts=3)
    model = build("MixtralForCausalLM", config)
    model.set_experts_implementation("eager")  # the grouped product knows no float64
    return model


def bert():
    return build("BertModel", transformers.BertConfig(**SIZES, max_position_embeddings=16))


def vit():
    sizes = {key: value for key, value in SIZES.items() if key != "vocab_size"}
    return build("ViTModel", transformers.ViTConfig(**sizes, image_size=8, patch_size=4))


def t5():
    sizes = {"d_model": D, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 17}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0, eos_token_id=None)
    return build("T5ForConditionalGeneration", config)


def mamba():
    config = transformers.MambaConfig(hidden_size=D, num_hidden_layers=2, vocab_size=17, state_size=4, **SPECIAL)
    return build("MambaForCausalLM", config)


def small_gpt2():
    sizes = {"n_layer": 2, "n_embd": D, "n_head": 2, "n_positions": 32, "vocab_size": 17}
    return build("GPT2LMHeadModel", transformers.GPT2Config(**sizes, **SPECIAL, initializer_range=0.5))


T5_INPUTS = {"input_ids": TOKENS, "decoder_input_ids": TOKENS.flip(0)}
IMAGES = {"pixel_values": normal(3, 3, 8, 8)}
MODELS = {
    "GPT-2 block": (small_gpt2, IDS, "transformer.h.0", None),
    "GPT-2 attention": (small_gpt2, IDS, "transformer.h.0.attn", 0),
    "GPT-2 mlp": (small_gpt2, IDS, "transformer.h.1.mlp", None),
    "Llama block": (llama, IDS, "model.layers.0", None),
    "Llama attention": (llama, IDS, "model.layers.0.self_attn", 0),
    "Llama norm": (llama, IDS, "model.layers.1.input_layernorm", None),
    "Mixtral block": (mixtral, IDS, "model.layers.0", None),
    "Mixtral experts": (mixtral, IDS, "model.layers.0.mlp.experts", None),
    "Mixtral mixture": (mixtral, IDS, "model.layers.0.mlp", None),
    "BERT block": (bert, IDS, "encoder.layer.0", None),
    "BERT attention": (bert, IDS, "encoder.layer.0.attention.self", 0),
    "ViT block": (vit, IMAGES, "layers.0", None),
    "T5 encoder block": (t5, T5_INPUTS, "encoder.block.0", 0),
    "T5 decoder block": (t5, T5_INPUTS, "decoder.block.0", 0),
    "T5 attention": (t5, T5_INPUTS, "encoder.block.0.layer.0.SelfAttention", 0),
    "Mamba block": (mamba, IDS, "backbone.layers.0", None),
    "Mamba mixer": (mamba, IDS, "backbone.layers.0.mixer", None),
}
models = pytest.mark.parametrize(("make", "inputs", "site", "part"), MODELS.values(), ids=MODELS.keys())


def first(output):
    """Of what the root gives, the part that the tests compare."""
    return output.logits if "logits" in output else output.last_hidden_state


def steered(model, inputs, vectors, *, options=None, **call):
    with Steerer(model, vectors, **(options or {})), torch.no_grad():
        return first(model(**inputs, **call))


def adding(delta, part):
    """A hook of torch's own that adds to an output, or to a part of it, out of place."""

    def add(module, args, output):
        if part is None:
            assert isinstance(output, torch.Tensor)
            return output + delta
        return (*output[:part], output[part] + delta, *output[part + 1 :])

    return add


def by_hand(model, inputs, site, delta, part=None, **call):
    handle = model.get_submodule(site).register_forward_hook(adding(delta, part))
    with torch.no_grad():
        output = first(model(**inputs, **call))
    handle.remove()
    return output


# --- outputs of every kind -------------------------------------------------------------------------------------------
@pytest.mark.case(18, 22, 29)
@models
@pytest.mark.parametrize("backend", ["auto", "tap", "buffer"])
def test_a_module_is_steered_as_by_hand(make, inputs, site, part, backend):
    model, v = make(), normal(D, seed=2)
    before = state(model)
    expected = by_hand(model, inputs, site, 1.5 * v, part)
    vectors = SteeringVector({site: v})
    assert torch.equal(steered(model, inputs, vectors, options={"c": 1.5, "backend": backend}), expected)
    assert state(model) == before
    with torch.no_grad():
        assert not torch.allclose(first(model(**inputs)), expected)


@pytest.mark.case(18)
@pytest.mark.parametrize("site", ["encoder.block.0:out.0", "encoder.block.0:out", "encoder.block.0"])
def test_the_first_member_of_a_tuple_may_be_named(site):
    model, v = t5(), normal(D, seed=2)
    expected = by_hand(model, T5_INPUTS, "encoder.block.0", v, 0)
    assert torch.equal(steered(model, T5_INPUTS, SteeringVector({site: v})), expected)


@pytest.mark.case(18)
def test_a_part_that_a_tuple_lacks_is_refused():
    with pytest.raises(OutputError, match=r"'encoder\.block\.0:out\.7'.* has no part '7'"):
        steered(t5(), T5_INPUTS, SteeringVector({"encoder.block.0:out.7": normal(D)}))


@pytest.mark.case(18)
@pytest.mark.parametrize("return_dict", [True, False])
def test_the_type_of_the_output_is_kept(return_dict):
    model = small_gpt2()
    with torch.no_grad():
        plain = model(TOKENS, return_dict=return_dict)
        with Steerer(model, SteeringVector({"transformer.h.0": normal(D)})):
            output = model(TOKENS, return_dict=return_dict)
    assert type(output) is type(plain)
    assert len(output) == len(plain)


@pytest.mark.case(18)
def test_the_logits_of_a_model_output_at_the_root():
    model, v = small_gpt2(), normal(17, seed=2)
    with torch.no_grad():
        plain = model(TOKENS)
        with Steerer(model, SteeringVector({":out.logits": v}), c=2):
            output = model(TOKENS)
    assert type(output) is type(plain)
    assert torch.equal(output.logits, plain.logits + 2 * v)
    assert torch.equal(output[0], output.logits)
    assert list(output) == list(plain)
    assert output.past_key_values is not None


@pytest.mark.case(18)
@pytest.mark.parametrize(
    ("make", "inputs", "name"),
    [
        (small_gpt2, IDS, "transformer"),
        (llama, IDS, "model"),
        (bert, IDS, ""),
        (vit, IMAGES, ""),
        (mamba, IDS, "backbone"),
    ],
)
def test_the_last_hidden_state_of_a_base_model(make, inputs, name):
    model, v = make(), normal(D, seed=2)
    base = model.get_submodule(name)
    with torch.no_grad():
        plain = base(**inputs)
        with Steerer(model, SteeringVector({f"{name}:out.last_hidden_state": v}), strict=bool(name == "")):
            output = base(**inputs)
    assert type(output) is type(plain)
    assert torch.equal(output.last_hidden_state, plain.last_hidden_state + v)
    assert torch.equal(output[0], output.last_hidden_state)


@pytest.mark.case(18)
def test_what_a_model_output_lacks_is_refused_with_what_it_has():
    with pytest.raises(OutputError, match=r"has no part 'hidden'; there are \['logits'"):
        steered(small_gpt2(), IDS, SteeringVector({":out.hidden": normal(17)}))


@pytest.mark.case(18)
def test_an_ambiguous_model_output_asks_for_the_part():
    """With labels the loss comes first; a 0-dim tensor is no activation."""
    model = small_gpt2()
    v = normal(17, seed=2)
    with torch.no_grad():
        plain = model(TOKENS, labels=TOKENS)
        with Steerer(model, SteeringVector({":out.logits": v})):
            assert torch.equal(model(TOKENS, labels=TOKENS).logits, plain.logits + v)
    ambiguous, message = t5(), r"several activations.*':out\.logits', .*':out\.encoder_last_hidden_state'"
    with pytest.raises(OutputError, match=message), Steerer(ambiguous, SteeringVector({":out": v})):
        ambiguous(**T5_INPUTS)


@pytest.mark.case(18)
@models
@pytest.mark.parametrize("call", [{"output_attentions": True}, {"output_hidden_states": True}, {"use_cache": False}])
def test_what_else_is_asked_of_the_model_does_not_change_what_is_edited(make, inputs, site, part, call):
    if call == {"use_cache": False} and make in (bert, vit):
        pytest.skip("it keeps no cache")
    if call == {"output_attentions": True} and make is mamba:
        pytest.skip("it has no attention")
    model, v = make(), normal(D, seed=2)
    expected = by_hand(model, inputs, site, v, part, **call)
    torch.testing.assert_close(steered(model, inputs, SteeringVector({site: v}), **call), expected)
    torch.testing.assert_close(steered(model, inputs, SteeringVector({site: v})), expected)


# --- inputs ----------------------------------------------------------------------------------------------------------
@pytest.mark.case(23)
@pytest.mark.parametrize("site", ["model.layers.0.self_attn:in.hidden_states", "model.layers.0.self_attn:in.0"])
@pytest.mark.parametrize("backend", ["hook", "tap", "buffer"])
def test_an_input_given_by_keyword_is_steered(site, backend):
    model, v = llama(), normal(D, seed=2)
    expected = by_hand(model, IDS, "model.layers.0.input_layernorm", v)
    assert torch.equal(steered(model, IDS, SteeringVector({site: v}), options={"backend": backend}), expected)


@pytest.mark.case(23)
def test_an_input_of_several_activations_is_found_or_asks_which():
    """position_embeddings are a tuple, so that the hidden states are the only tensor."""
    model, v = llama(), normal(D, seed=2)
    expected = by_hand(model, IDS, "model.layers.0.input_layernorm", v)
    try:
        output = steered(model, IDS, SteeringVector({"model.layers.0.self_attn:in": v}))
    except OutputError as error:
        assert "model.layers.0.self_attn:in.hidden_states" in str(error)  # noqa: PT017
    else:
        assert torch.equal(output, expected)


@pytest.mark.case(23)
def test_an_input_that_is_not_there_is_refused_with_what_is():
    with pytest.raises(OutputError, match=r"has no part 'states'; there are .*'hidden_states'"):
        steered(llama(), IDS, SteeringVector({"model.layers.0.self_attn:in.states": normal(D)}))


@pytest.mark.case(23)
@pytest.mark.parametrize("site", ["model.layers.1:in", "model.layers.1:in.hidden_states", "model.layers.1:in.0"])
def test_the_input_of_a_block_is_the_output_of_the_one_before(site):
    model, v = llama(), normal(D, seed=2)
    expected = by_hand(model, IDS, "model.layers.0", v)
    assert torch.equal(steered(model, IDS, SteeringVector({site: v})), expected)
    rows = record(model, [IDS], sites=[site, "model.layers.0"], progress=False)
    assert torch.equal(rows[site], rows["model.layers.0"])


# --- mixtures of experts ---------------------------------------------------------------------------------------------
@pytest.mark.case(22)
def test_rows_of_strength_are_refused_where_tokens_are_not_in_rows():
    model = mixtral()
    v = SteeringVector({"model.layers.0.mlp.experts": normal(D)})
    with pytest.raises(Exception, match=r"3 rows of strength or gate against an activation of shape \(12, 16\)"):
        steered(model, IDS, v, options={"c": torch.tensor([0.0, 1.0, 2.0])})
    twelve = torch.arange(12.0) / 4
    output = by_hand(model, IDS, "model.layers.0.mlp.experts", twelve.double()[:, None] * v[v.sites[0]])
    torch.testing.assert_close(steered(model, IDS, v, options={"c": twelve}), output)


# --- the pipeline ----------------------------------------------------------------------------------------------------
@pytest.mark.case(18, 22, 23)
@models
def test_fitting_moves_the_mean_of_one_side_to_the_other(make, inputs, site, part):
    model = make()
    other = {key: value.flip(0) // 2 if not value.is_floating_point() else value + 1 for key, value in inputs.items()}
    v = fit(model, positive=[inputs], negative=[other], sites=site, progress=False)
    with Steerer(model, v):
        moved = collect(model, [other], sites=site, progress=False)
    expected = collect(model, [inputs], sites=site, progress=False)
    torch.testing.assert_close(moved[site].mean, expected[site].mean)
    rows = record(model, [inputs], sites=site, progress=False)[site]
    torch.testing.assert_close(rows.mean(dim=0), expected[site].mean)


@pytest.mark.case(18)
@pytest.mark.parametrize(("make", "site"), [(small_gpt2, "transformer.h.0"), (llama, "model.layers.0.self_attn:in.0")])
def test_optimize_lowers_the_loss(make, site):
    def loss(output):
        return -output.logits.log_softmax(dim=-1)[..., 5].mean()

    model = make()
    before = state(model)
    v = optimize(model, [IDS], sites=site, loss=loss, lr=0.1, steps=10, progress=False)
    assert state(model) == before
    with torch.no_grad():
        plain = loss(model(**IDS))
        with Steerer(model, v):
            assert loss(model(**IDS)) < plain


@pytest.mark.case(24)
@pytest.mark.parametrize("make", [small_gpt2, llama])
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_autocast_keeps_the_dtype_of_every_output(make, backend):
    model = make().float()
    site = "transformer.h.0.mlp" if make is small_gpt2 else "model.layers.0.mlp"
    seen = []
    model.get_submodule(site).register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    v = SteeringVector({site: normal(D).float()})
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        plain = model(TOKENS).logits
        with Steerer(model, v, c=2, backend=backend):
            output = model(TOKENS).logits
    assert seen == [torch.bfloat16] * 2
    assert output.dtype is plain.dtype
    assert not torch.equal(output, plain)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        delta = (2 * v[site]).to(torch.bfloat16)
        assert torch.equal(by_hand(model, IDS, site, delta), output)


# --- captured hidden states ------------------------------------------------------------------------------------------
CAPTURING = {"GPT-2": (small_gpt2, "transformer.h.{}"), "Llama": (llama, "model.layers.{}")}


def hidden(model, v, *, backend, c=1.5):
    with Steerer(model, v, c=c, backend=backend), torch.no_grad():
        return model(TOKENS, output_hidden_states=True)


@pytest.mark.case(41)
@pytest.mark.parametrize(("make", "name"), CAPTURING.values(), ids=CAPTURING.keys())
@pytest.mark.parametrize("backend", ["tap", "auto"])  # a hook comes after those that capture
@pytest.mark.parametrize("before", [True, False], ids=["captured before", "first captured inside"])
@pytest.mark.parametrize("layer", [0, 1])
def test_hidden_states_show_the_edit_and_agree_with_the_logits(make, name, backend, before, layer):
    model, v = make(), normal(D, seed=2)
    with torch.no_grad():
        plain = make()(TOKENS, output_hidden_states=True)
        if before:
            model(TOKENS, output_hidden_states=True)
    output = hidden(model, SteeringVector({name.format(layer): v}), backend=backend)
    expected = by_hand(make(), IDS, name.format(layer), 1.5 * v)
    assert torch.equal(output.logits, expected)
    if layer == 0:  # the last hidden state is the one after the final norm
        assert torch.equal(output.hidden_states[1], plain.hidden_states[1] + 1.5 * v)
    assert torch.equal(model.lm_head(output.hidden_states[-1]), output.logits)
    assert torch.equal(output.hidden_states[0], plain.hidden_states[0])
    with torch.no_grad():
        after = model(TOKENS, output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(after.hidden_states, plain.hidden_states, strict=True))


@pytest.mark.case(41)
@pytest.mark.parametrize("backend", ["hook", "tap"])
def test_captured_attention_outputs_agree_too(backend):
    """The attention returns a tuple whose second member is captured."""
    model, v = llama(), normal(D, seed=2)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        model(TOKENS, output_attentions=True)
        plain = model(TOKENS, output_attentions=True)
        with Steerer(model, SteeringVector({"model.layers.0.self_attn": v}), backend=backend):
            output = model(TOKENS, output_attentions=True)
    assert torch.equal(output.attentions[0], plain.attentions[0])
    assert not torch.equal(output.attentions[1], plain.attentions[1])
    assert torch.equal(output.logits, by_hand(model, IDS, "model.layers.0.self_attn", v, 0))


@pytest.mark.case(41, 31)
def test_nested_edits_show_in_the_captured_states_in_the_order_entered():
    model = llama()
    first_vector, second = normal(D, seed=2), normal(D, seed=3)
    with torch.no_grad():
        plain = model(TOKENS, output_hidden_states=True).hidden_states[1]

    def double(activation, direction, c):
        return activation * 2

    with (
        Steerer(model, SteeringVector({"model.layers.0": first_vector})),
        Steerer(model, SteeringVector({"model.layers.0": second}), intervention=double),
        torch.no_grad(),
    ):
        output = model(TOKENS, output_hidden_states=True)
    torch.testing.assert_close(output.hidden_states[1], (plain + first_vector) * 2)


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.case(41, 1)
@pytest.mark.parametrize("before", [True, False], ids=["captured before", "first captured inside"])
def test_hidden_states_show_the_edit_after_something_was_compiled(fresh_compiler, before):
    model, v = llama(), normal(D, seed=2)
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    with torch.no_grad():
        plain = llama()(TOKENS, output_hidden_states=True)
        if before:
            model(TOKENS, output_hidden_states=True)
    steerer = Steerer(model, SteeringVector({"model.layers.0": v}))
    assert steerer.choices()["model.layers.0"].mechanism == "tap"
    with steerer, torch.no_grad():
        output = model(TOKENS, output_hidden_states=True)
    assert torch.equal(output.hidden_states[1], plain.hidden_states[1] + v)
    assert torch.equal(output.logits, by_hand(llama(), IDS, "model.layers.0", v))


# --- generation ------------------------------------------------------------------------------------------------------
GENERATING = {
    "GPT-2 block": (small_gpt2, "transformer.h.0"),
    "GPT-2 attention": (small_gpt2, "transformer.h.1.attn"),
    "Llama block": (llama, "model.layers.0"),
    "Llama attention's input": (llama, "model.layers.1.self_attn:in.hidden_states"),
    "Mixtral experts": (mixtral, "model.layers.0.mlp.experts"),
}
generating = pytest.mark.parametrize(("make", "site"), GENERATING.values(), ids=GENERATING.keys())
GREEDY = {"max_new_tokens": 5, "do_sample": False}


def generate(model, v, inputs, *, backend="auto", c=3.0, **options):
    with Steerer(model, v, c=c, backend=backend):
        return model.generate(**inputs, **GREEDY, **options)


@pytest.mark.case(39, 8)
@generating
@pytest.mark.parametrize("backend", ["auto", "tap"])
def test_generating_with_a_cache_is_generating_without(make, site, backend):
    model, v = make(), SteeringVector({site: normal(D, seed=2)})
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    cached = generate(model, v, inputs, backend=backend)
    assert torch.equal(cached, generate(model, v, inputs, backend=backend, use_cache=False))
    tokens = TOKENS
    for _ in range(5):
        logits = steered(model, {"input_ids": tokens}, v, options={"c": 3.0})
        tokens = torch.cat([tokens, logits[:, -1:].argmax(dim=-1)], dim=1)
    assert torch.equal(cached, tokens)
    assert not torch.equal(cached, model.generate(**inputs, **GREEDY))


MODES = {
    "beams": {"num_beams": 3},
    "several sequences": {"num_beams": 4, "num_return_sequences": 2},
    "chunked prefill": {"prefill_chunk_size": 2},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2, "eos_token_id": 10_000},  # no token; transformers 5.9 needs one
}


@pytest.mark.case(40)
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES.keys())
@pytest.mark.parametrize("padded", [False, True], ids=["", "left padding"])
@pytest.mark.parametrize("site", ["model.layers.0", "model.layers.1.mlp"])
def test_every_way_of_generating_is_steered_as_by_hand(mode, padded, site):
    rows = slice(1, 2) if "prompt_lookup_num_tokens" in mode else slice(None)
    tokens, mask = (PADDED, MASK) if padded else (TOKENS, torch.ones_like(TOKENS))
    inputs = {"input_ids": tokens[rows], "attention_mask": mask[rows]}
    model, v = llama(), normal(D, seed=2)
    handle = model.get_submodule(site).register_forward_hook(adding(3 * v, None))
    expected = model.generate(**inputs, **GREEDY, **mode)
    handle.remove()
    assert torch.equal(generate(model, SteeringVector({site: v}), inputs, **mode), expected)
    assert not torch.equal(model.generate(**inputs, **GREEDY, **mode), expected)


@pytest.mark.case(40)
def test_padding_on_the_left_changes_no_row():
    model, v = llama(), SteeringVector({"model.layers.0": normal(D, seed=2)})
    together = generate(model, v, {"input_ids": PADDED, "attention_mask": MASK})[:, PADDED.shape[1] :]
    for row, mask, own in zip(PADDED, MASK, together, strict=True):
        alone = row[mask.bool()][None]
        longer = generate(model, v, {"input_ids": alone, "attention_mask": torch.ones_like(alone)})
        assert torch.equal(longer[0, alone.shape[1] :], own)


@pytest.mark.case(39, 52)
@pytest.mark.parametrize("use_cache", [True, False])
def test_one_strength_per_prompt_while_generating(use_cache):
    model, v = llama(), SteeringVector({"model.layers.0": normal(D, seed=2)})
    c = torch.tensor([0.0, 3.0, -2.0])
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    together = generate(model, v, inputs, c=c, use_cache=use_cache)
    for row, strength, own in zip(TOKENS, c, together, strict=True):
        alone = {"input_ids": row[None], "attention_mask": torch.ones(1, 4, dtype=torch.long)}
        assert torch.equal(generate(model, v, alone, c=float(strength))[0], own)


@pytest.mark.case(40, 52)
def test_one_strength_per_prompt_serves_all_of_its_beams():
    model, v = llama(), SteeringVector({"model.layers.0": normal(D, seed=2)})
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    strengths = torch.tensor([0.0, 1.0, 2.0])
    together = generate(model, v, inputs, c=strengths, num_beams=2)
    for row, c, own in zip(TOKENS, strengths, together, strict=True):
        alone = {"input_ids": row[None], "attention_mask": torch.ones_like(row[None])}
        assert torch.equal(generate(model, v, alone, c=float(c), num_beams=2)[0], own)
    with pytest.raises(ValueError, match="2 rows of strength or gate against an activation of shape"):
        generate(model, v, inputs, c=torch.ones(2), num_beams=2)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.case(39)
def test_a_gated_model_generates_steered_and_unsteered_rows():
    """A gate decides once, from the prompt."""
    model, site = llama(), "model.layers.0"
    v = SteeringVector({site: normal(D, seed=2)})
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    expected = {-1e9: generate(model, v, inputs), 1e9: model.generate(**inputs, **GREEDY)}
    assert not torch.equal(*expected.values())
    for threshold, tokens in expected.items():
        with Steerer(model, v, c=3.0, gate=ProjectionAbove(v, threshold)):
            assert torch.equal(model.generate(**inputs, **GREEDY), tokens)


@pytest.mark.case(39)
def test_t5_generates_steered():
    model, v = t5(), normal(D, seed=2)
    inputs = {"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}
    for site in ("encoder.block.1", "decoder.block.0"):
        handle = model.get_submodule(site).register_forward_hook(adding(30 * v, 0))
        expected = model.generate(**inputs, **GREEDY)
        handle.remove()
        for use_cache in (True, False):
            output = generate(model, SteeringVector({site: v}), inputs, c=30.0, use_cache=use_cache)
            assert torch.equal(output, expected)


# --- refusals --------------------------------------------------------------------------------------------------------
def test_a_scripted_part_is_refused_and_its_neighbours_are_not():
    class Silero(nn.Module):
        """A model of which a part was published as a script."""

        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(4, 4)
            self.scripted = torch.jit.script(nn.Sequential(nn.Linear(4, 4), nn.ReLU()))

        def forward(self, x):
            return self.scripted(self.front(x))

    model = Silero().eval()
    before = state(model.front)
    for site in ("scripted", "scripted.0", "scripted:in"):
        with pytest.raises(UnsupportedModelError, match=rf"site '{site}': .* is scripted and ignores hooks"):
            Steerer(model, SteeringVector({"front": torch.ones(4), site: torch.ones(4)}))
        with pytest.raises(UnsupportedModelError, match="is scripted"):
            collect(model, torch.ones(2, 4), sites=site, progress=False)
    assert state(model.front) == before
    x = torch.ones(2, 4)
    with torch.no_grad(), Steerer(model, SteeringVector({"front": torch.ones(4)})):
        assert torch.equal(model(x), model.scripted(nn.functional.linear(x, model.front.weight, model.front.bias) + 1))


@pytest.mark.case(18)
def test_a_vector_of_another_model_is_refused_at_every_site():
    model = small_gpt2()
    unused = ("attn_dropout",)  # a module that the attention reads and never calls
    names = [
        site for site in find_sites(model, lambda name, _: name.startswith("transformer.")) if not site.endswith(unused)
    ]
    assert len(names) > 15
    for site in names:
        with pytest.raises(ShapeError, match=rf"site '{site}': the activation has \d+ features.* the vector 17"):
            steered(model, IDS, SteeringVector({site: torch.ones(D + 1)}))
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.case(18)
def test_the_zoo_has_the_same_results():
    model, v = gpt2(), normal(8, seed=2)
    expected = by_hand(model, IDS, "transformer.h.1", 3 * v)
    assert torch.equal(steered(model, IDS, SteeringVector({"transformer.h.1": v}), options={"c": 3}), expected)
