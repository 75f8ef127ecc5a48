"""Generation by other models, in compiled code, and by several threads: positions mean the same tokens there."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from actsteer import Ablate, And, ProjectionAbove, Steerer, SteeringVector
from tests.zoo import normal, seeded

pytest.importorskip("transformers")

IDS = torch.tensor([[5, 9, 4, 22, 0, 0], [7, 7, 3, 12, 5, 0], [3, 8, 8, 20, 11, 30]])
MASK = (IDS > 0).long()
OPTIONS = {"max_new_tokens": 6, "do_sample": False}
PLACES = [None, "prompt", "generated", "last", 0, [0, -1], slice(1, None), slice(7, 9)]
every_place = pytest.mark.parametrize("positions", PLACES, ids=str)


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 31}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "initializer_range": 0.5}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    return seeded(lambda: LlamaForCausalLM(LlamaConfig(**sizes, **heads, **tokens)))


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 31, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    tokens = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None, "tie_word_embeddings": False}

    def build():
        model = T5ForConditionalGeneration(T5Config(**sizes, **tokens))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        return model

    return seeded(build)


@pytest.fixture(scope="module")
def encoder_decoder():
    return t5()


ENCODER = SteeringVector({"encoder.block.0": 3 * normal(16, seed=1)})
DECODER = SteeringVector({"decoder.block.0": 9 * normal(16, seed=2)})


# --- an encoder and a decoder ----------------------------------------------------------------------------------------
@every_place
@pytest.mark.parametrize("v", [ENCODER, DECODER, ENCODER + DECODER], ids=["encoder", "decoder", "both"])
def test_an_encoder_has_positions_of_its_own(encoder_decoder, v, positions):
    model = encoder_decoder
    if v is not DECODER and isinstance(positions, list):
        positions = [0]  # the decoder's prompt is one token
    with Steerer(model, v, positions=positions):
        for options in ({}, {"num_beams": 2}):
            together = model.generate(input_ids=IDS, attention_mask=MASK, **OPTIONS, **options)
            uncached = model.generate(input_ids=IDS, attention_mask=MASK, use_cache=False, **OPTIONS, **options)
            assert torch.equal(uncached, together)
            for ids, mask, own in zip(IDS, MASK.bool(), together, strict=True):
                assert torch.equal(model.generate(input_ids=ids[mask][None], **OPTIONS, **options)[0], own)


def test_what_the_encoder_is_fed_is_a_prompt_and_the_decoder_s_first_token_too(encoder_decoder):
    model, inputs = encoder_decoder, {"input_ids": IDS, "attention_mask": MASK, **OPTIONS}
    plain = model.generate(**inputs)

    def steered(v, positions):
        with Steerer(model, v, positions=positions):
            return model.generate(**inputs)

    assert torch.equal(steered(ENCODER, "prompt"), steered(ENCODER, "all"))
    assert torch.equal(steered(ENCODER, "generated"), plain)
    assert torch.equal(steered(DECODER, "prompt"), steered(DECODER, 0))
    assert torch.equal(steered(DECODER, "generated"), steered(DECODER, slice(1, None)))
    assert len({tuple(steered(DECODER, p).flatten().tolist()) for p in ("all", "prompt", "generated")}) == 3


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
def test_a_gate_in_the_encoder_decides_for_the_decoder(encoder_decoder, options):
    model, w = encoder_decoder, SteeringVector({"encoder.block.1": normal(16, seed=5)})
    with torch.no_grad():
        hidden = []
        handle = model.get_submodule("encoder.block.1").register_forward_hook(lambda m, a, out: hidden.append(out[0]))
        model.encoder(input_ids=IDS, attention_mask=MASK)
        handle.remove()
    means = (hidden[0] * MASK[..., None]).sum(1) / MASK.sum(1, keepdim=True)
    scores = means @ w["encoder.block.1"] / w.norm()
    gate = ProjectionAbove(w, float(scores.sort().values[:2].mean()))
    fires = (scores > gate.threshold).double()
    assert 0 < fires.sum() < 3
    inputs = {"input_ids": IDS, "attention_mask": MASK, **OPTIONS, **options}
    with Steerer(model, DECODER, c=-1.0, gate=gate):
        gated = model.generate(**inputs)
    with Steerer(model, DECODER, c=-fires):
        assert torch.equal(model.generate(**inputs), gated)
    assert not torch.equal(model.generate(**inputs), gated)


# --- a bridge --------------------------------------------------------------------------------------------------------
@every_place
def test_a_bridge_generates_as_the_model_in_it(positions):
    pytest.importorskip("transformer_lens")
    from tests.test_lens import bridge

    model = bridge()
    tokens = torch.tensor([[1, 5, 9, 2, 7], [3, 3, 16, 8, 4]])
    v = SteeringVector({"blocks.0.hook_out": 3 * normal(8, seed=4)})
    options = {"max_new_tokens": 6, "do_sample": False, "verbose": False, "stop_at_eos": False}
    inner = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 6, "do_sample": False}
    cached = model.generate(tokens, **options)
    plain = model.generate(tokens, use_past_kv_cache=False, **options)
    with Steerer(model, v, positions=positions):
        whole = model.generate(tokens, use_past_kv_cache=False, **options)
        assert torch.equal(model.original_model.generate(tokens, use_cache=False, **inner), whole)
        if torch.equal(plain, cached):  # TransformerLens 4.3 loses the cache of transformers 5.24
            assert torch.equal(model.generate(tokens, **options), whole)
            assert torch.equal(model.original_model.generate(tokens, **inner), whole)
    assert positions is not None or not torch.equal(plain, whole)
    assert "generate" not in model.__dict__ and "generate" not in model.original_model.__dict__


# --- compiled --------------------------------------------------------------------------------------------------------
def compiled_options():
    from transformers.generation.configuration_utils import CompileConfig

    config = CompileConfig(backend="eager", fullgraph=True, mode=None)
    config._compile_all_devices = True
    return {"cache_implementation": "static", "compile_config": config}


V = SteeringVector({"model.layers.0": 2 * normal(16, seed=2), "model.layers.1:in": normal(16, seed=3)})
W = V.select("model.layers.0")
WAYS = {
    **{str(positions): {"positions": positions} for positions in PLACES},
    "schedule": {"c": lambda step: 2.0 * 0.5**step},
    "rows": {"c": torch.tensor([0.0, 1.0, 2.0])},
    "gate": {"gate": ProjectionAbove(W, 0.0)},
    "gate per token": {"gate": And(ProjectionAbove(W, -1.0), ProjectionAbove(W, 0.0, per="token"))},
    "ablate": {"intervention": Ablate(), "positions": "generated"},
}


@pytest.mark.slow
@pytest.mark.case(8, 39)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore")
def test_compiled_generation_is_steered_as_eager_generation_is(way):
    torch.compiler.reset()
    model, ids, mask = llama(), IDS.flip(1), MASK.flip(1)
    inputs = {"input_ids": ids, "attention_mask": mask, **OPTIONS}
    compiled = compiled_options()
    model.generate(**inputs, **compiled)  # compiled before anything is attached
    with Steerer(model, V, **way):
        eager = model.generate(**inputs)
        assert torch.equal(model.generate(**inputs, **compiled), eager)
        assert torch.equal(model.generate(**inputs, **compiled), eager)
    assert torch.equal(model.generate(**inputs, **compiled), model.generate(**inputs))
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.case(5, 8)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["number", "rows", "schedule"])
def test_new_strengths_compile_nothing(kind):
    from torch._dynamo.utils import counters

    torch.compiler.reset()
    model, inputs, compiled = (
        llama(),
        {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1), **OPTIONS},
        compiled_options(),
    )
    strengths = {
        "number": [0.5, 1.0, 2.0],
        "rows": [torch.tensor([0.5, c, 1.0]) for c in (1.0, 2.0, 3.0)],
        "schedule": [lambda step, c=c: c / (1 + step) for c in (1.0, 2.0, 3.0)],
    }[kind]
    with Steerer(model, V, c=strengths[0], positions="generated") as steerer:
        model.generate(**inputs, **compiled)
        before = counters["stats"]["unique_graphs"]
        for c in strengths:
            steerer.c = c
            assert torch.equal(model.generate(**inputs, **compiled), model.generate(**inputs))
        assert counters["stats"]["unique_graphs"] == before > 0
    torch.compiler.reset()


# --- threads ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("positions", ["generated", "last", slice(2, 5)], ids=str)
def test_threads_that_generate_at_once_do_not_disturb_one_another(positions):
    model, gate = llama(), ProjectionAbove(W, 0.0)
    texts = [
        torch.randint(3, 31, (2, length), generator=torch.Generator().manual_seed(length)) for length in range(3, 11)
    ]

    def generated(ids):
        return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **OPTIONS)

    with Steerer(model, V, positions=positions, gate=gate):
        expected = [generated(ids) for ids in texts]
        with ThreadPoolExecutor(4) as pool:
            for found, alone in zip(pool.map(generated, texts * 3), expected * 3, strict=True):
                assert torch.equal(found, alone)


def test_a_steerer_of_one_thread_leaves_the_generation_of_others_alone():
    model = llama()
    inputs = {"input_ids": IDS.flip(1), "attention_mask": MASK.flip(1), **OPTIONS}
    plain = model.generate(**inputs)
    with Steerer(model, V, positions="generated", scope="context"), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(lambda: model.generate(**inputs)).result(), plain)
        assert not torch.equal(model.generate(**inputs), plain)
