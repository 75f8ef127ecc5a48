"""Whose tokens an activation has is known by where it is, or said by the user; never by a length that happens to fit.

The kind of fault: queries, an image's patches, or an encoder's text, are taken for the tokens of the call.
"""

import pytest
import torch
from torch import nn

from actsteer import Steerer, SteeringVector, collect, record
from tests.kinds.by_hand import added, every_backend, identity, moved, right_or_refused
from tests.zoo import seeded

IDS, MASK = torch.tensor([[3, 4, 5, 6], [7, 8, 3, 2]]), torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1]])
ALL = torch.ones_like(MASK)


class Queries(nn.Module):
    """Queries that read a text, as a Q-Former's: `n` of them; "t" has the text's tokens, "b" has not."""

    def __init__(self, n=4):
        super().__init__()
        self.n, self.e, self.t, self.b = n, nn.Embedding(9, 2), identity(), identity()

    def forward(self, input_ids, attention_mask=None):
        text = self.t(self.e(input_ids))
        return self.b(text.mean(1, keepdim=True).expand(-1, self.n, -1))


class Both(nn.Module):
    """Image and text beside each other, with as many patches as tokens."""

    def __init__(self):
        super().__init__()
        self.e, self.text, self.image = nn.Embedding(9, 2), identity(), identity()

    def forward(self, input_ids, pixel_values, attention_mask=None):
        return self.text(self.e(input_ids)), self.image(pixel_values)


# --- said by the user ------------------------------------------------------------------------------------------------
@every_backend
@pytest.mark.parametrize("n", [4, 3, 1])
def test_queries_are_no_tokens_of_the_text(backend, n):
    model = Queries(n)
    plain = model(IDS).detach()
    with torch.no_grad(), Steerer(model, SteeringVector({"b": torch.ones(2)}), mask={"b": None}, backend=backend):
        assert moved(model(IDS, attention_mask=MASK), plain) == [[1] * n] * 2


@pytest.mark.parametrize("n", [4, 3, 1])
def test_queries_are_all_collected(n):
    model = Queries(n)
    batch = {"input_ids": IDS, "attention_mask": MASK}
    options = {"sites": "b", "mask": {"b": None}, "progress": False}
    assert collect(model, [batch], **options)["b"].count == 2 * n
    assert torch.equal(record(model, [batch], positions="last", **options)["b"], model(IDS).detach()[:, -1])


@every_backend
@pytest.mark.parametrize(("positions", "want"), [("last", [0, 0, 0, 1]), (0, [1, 0, 0, 0]), ([1, -2], [0, 1, 1, 0])])
def test_positions_count_the_queries(backend, positions, want):
    model = Queries()
    plain, options = model(IDS).detach(), {"positions": positions, "mask": {"b": None}, "backend": backend}
    with torch.no_grad(), Steerer(model, SteeringVector({"b": torch.ones(2)}), **options):
        assert moved(model(IDS, attention_mask=MASK), plain) == [want] * 2


@every_backend
def test_one_site_has_the_text_s_tokens_and_another_has_not(backend):
    model = Both()
    image = torch.zeros(2, 4, 2)
    v = SteeringVector({"text": torch.ones(2), "image": torch.ones(2)})
    with torch.no_grad(), Steerer(model, v, mask={"image": None}, backend=backend):
        text, patches = model(IDS, image, attention_mask=MASK)
    assert moved(text, model.e(IDS)) == MASK.tolist() and moved(patches, image) == ALL.tolist()
    batch = {"input_ids": IDS, "pixel_values": image, "attention_mask": MASK}
    s = collect(model, [batch], sites=["text", "image"], mask={"image": None}, progress=False)
    assert s["text"].count == int(MASK.sum()) and s["image"].count == 8


@every_backend
def test_a_site_may_have_a_mask_of_its_own(backend):
    model = Both()
    patches = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 1]])
    v = SteeringVector({"text": torch.ones(2), "image": torch.ones(2)})
    with torch.no_grad(), Steerer(model, v, mask={"image": lambda inputs: patches.bool()}, backend=backend):
        text, image = model(IDS, torch.zeros(2, 4, 2), attention_mask=MASK)
    assert moved(text, model.e(IDS)) == MASK.tolist() and moved(image, torch.zeros(2, 4, 2)) == patches.tolist()


@every_backend
@pytest.mark.parametrize("n", [3, 5])
@pytest.mark.parametrize("positions", [None, "last"], ids=str)
def test_another_length_beside_pads_is_right_or_refused_until_it_is_said(backend, n, positions):
    model = Queries(n)
    plain, v = model(IDS).detach(), SteeringVector({"b": torch.ones(2)})
    want = [1] * n if positions is None else [0] * (n - 1) + [1]
    with torch.no_grad(), Steerer(model, v, positions=positions, backend=backend, strict=False):
        right_or_refused(lambda: moved(model(IDS, attention_mask=MASK), plain), [want] * 2)
    options = {"sites": "b", "positions": positions or "all", "progress": False}
    count = 2 * sum(want)
    right_or_refused(lambda: collect(model, [{"input_ids": IDS, "attention_mask": MASK}], **options)["b"].count, count)


@pytest.mark.parametrize("mask", [{"c": None}, {"t": None}], ids=str)
def test_a_site_that_is_not_steered_is_refused_in_mask_or_left_alone(mask):
    model = Queries(4)
    plain = model(IDS).detach()

    def run():
        with torch.no_grad(), Steerer(model, SteeringVector({"b": torch.ones(2)}), mask=mask) as steerer:
            return moved(steerer.model(IDS, attention_mask=ALL), plain)

    right_or_refused(run, ALL.tolist())


# --- known by the architecture ---------------------------------------------------------------------------------------
transformers = pytest.importorskip("transformers")
DEC_IDS, DEC_MASK = torch.tensor([[9, 8, 7, 6], [5, 4, 3, 3]]), torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
TEXT = {"input_ids": IDS, "attention_mask": MASK}
TWO = {**TEXT, "decoder_input_ids": DEC_IDS, "decoder_attention_mask": DEC_MASK}


def randomised(build):
    def made():
        model = build()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model

    return seeded(made)


def t5():
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    return randomised(lambda: transformers.T5ForConditionalGeneration(config))


def bart():
    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16}
    sizes |= {"decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(**sizes, max_position_embeddings=16)
    return randomised(lambda: transformers.BartForConditionalGeneration(config))


def bert_that_reads():
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = transformers.BertConfig(**sizes, num_attention_heads=2, is_decoder=True, add_cross_attention=True)
    return randomised(lambda: transformers.BertModel(config))


def whisper():
    sizes = {"vocab_size": 40, "num_mel_bins": 4, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"max_source_positions": 4, "max_target_positions": 8, "pad_token_id": 0, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, bos_token_id=1, eos_token_id=2)
    return randomised(lambda: transformers.WhisperForConditionalGeneration(config))


def clip():
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "eos_token_id": 39}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 6, "patch_size": 3}  # four patches and a class: five, as the text below
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    return randomised(lambda: transformers.CLIPModel(config))


def blip2():
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 6, "patch_size": 3}
    qformer = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    qformer |= {"num_attention_heads": 2, "encoder_hidden_size": 16, "cross_attention_frequency": 1}
    text = {"model_type": "opt", "vocab_size": 40, "hidden_size": 16, "ffn_dim": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 32, "word_embed_proj_dim": 16}
    config = transformers.Blip2Config(
        vision_config=vision, qformer_config=qformer, text_config=text, num_query_tokens=4, image_token_index=39
    )
    return randomised(lambda: transformers.Blip2ForConditionalGeneration(config))


AUDIO = torch.linspace(-1, 1, 2 * 4 * 8, dtype=torch.float64).view(2, 4, 8).sin()
IMAGE = torch.linspace(-1, 1, 2 * 3 * 36, dtype=torch.float64).view(2, 3, 6, 6).sin()
FIVE = {
    "input_ids": torch.tensor([[3, 4, 39, 2, 2], [7, 8, 3, 5, 39]]),
    "attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]),
    "pixel_values": IMAGE,
}
READ = {
    **TEXT,
    "encoder_hidden_states": torch.linspace(-1, 1, 2 * 4 * 16, dtype=torch.float64).view(2, 4, 16).cos(),
    "encoder_attention_mask": DEC_MASK,
}
TALK = {
    "input_features": AUDIO,
    "decoder_input_ids": DEC_IDS,
    "decoder_attention_mask": DEC_MASK,
}
SAW = {
    "input_ids": torch.tensor([[39, 39, 39, 39, 5, 6, 1], [39, 39, 39, 39, 7, 8, 9]]),
    "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0], [1] * 7]),
    "pixel_values": IMAGE,
}
E5 = "encoder.block.0"
D5 = "decoder.block.0.layer"
BD = "model.decoder.layers.0"
ATTENTION = "encoder.layer.0.crossattention.self"
CASES = {
    "T5 encoder": (t5, E5, TWO, MASK),
    "T5 decoder": (t5, "decoder.block.0", TWO, DEC_MASK),
    "T5 cross, keys": (t5, f"{D5}.1.EncDecAttention.k", TWO, MASK),
    "T5 cross, values": (t5, f"{D5}.1.EncDecAttention.v", TWO, MASK),
    "T5 cross, queries": (t5, f"{D5}.1.EncDecAttention.q", TWO, DEC_MASK),
    "T5 cross, out": (t5, f"{D5}.1.EncDecAttention.o", TWO, DEC_MASK),
    "T5 self, keys": (t5, f"{D5}.0.SelfAttention.k", TWO, DEC_MASK),
    "Bart encoder": (bart, "model.encoder.layers.0", TWO, MASK),
    "Bart decoder": (bart, BD, TWO, DEC_MASK),
    "Bart cross, keys": (bart, f"{BD}.encoder_attn.k_proj", TWO, MASK),
    "Bart cross, values": (bart, f"{BD}.encoder_attn.v_proj", TWO, MASK),
    "Bart cross, queries": (bart, f"{BD}.encoder_attn.q_proj", TWO, DEC_MASK),
    "Bart cross, out": (bart, f"{BD}.encoder_attn.out_proj", TWO, DEC_MASK),
    "Bart self, values": (bart, f"{BD}.self_attn.v_proj", TWO, DEC_MASK),
    "Bert cross, keys": (bert_that_reads, f"{ATTENTION}.key", READ, DEC_MASK),
    "Bert cross, values": (bert_that_reads, f"{ATTENTION}.value", READ, DEC_MASK),
    "Bert cross, queries": (bert_that_reads, f"{ATTENTION}.query", READ, MASK),
    "Bert layer": (bert_that_reads, "encoder.layer.0", READ, MASK),
    "Whisper encoder": (whisper, "model.encoder.layers.0", TALK, ALL),
    "Whisper decoder": (whisper, BD, TALK, DEC_MASK),
    "Whisper cross, keys": (whisper, f"{BD}.encoder_attn.k_proj", TALK, ALL),
    "Whisper cross, queries": (whisper, f"{BD}.encoder_attn.q_proj", TALK, DEC_MASK),
    "CLIP image": (clip, "vision_model.encoder.layers.0", FIVE, torch.ones(2, 5).long()),
    "CLIP image, mlp": (clip, "vision_model.encoder.layers.0.mlp.fc1", FIVE, torch.ones(2, 5).long()),
    "CLIP text": (clip, "text_model.encoder.layers.0", FIVE, FIVE["attention_mask"]),
    "BLIP-2 image": (blip2, "vision_model.encoder.layers.0", SAW, torch.ones(2, 5).long()),
    "BLIP-2 queries": (blip2, "qformer.encoder.layer.0", SAW, torch.ones(2, 4).long()),
    "BLIP-2 text": (blip2, "language_model.model.decoder.layers.0", SAW, SAW["attention_mask"]),
}
REFUSABLE = {"BLIP-2 image", "BLIP-2 queries", "Bert cross, keys", "Bert cross, values"}
ways = pytest.mark.parametrize("name", CASES)


def numbers(output):
    """Every floating tensor of an output, as one."""
    found = [value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return torch.cat([value.flatten() for value in found])


@pytest.fixture(scope="module")
def built():
    made = {}
    return lambda build: made.setdefault(build, build())


def directed(model, site, inputs):
    """A direction of the site's size, found by a pass."""
    with torch.no_grad(), added(model, site, torch.zeros(1).double()) as shapes:
        plain = model(**inputs)
    return numbers(plain), torch.linspace(-2, 2, shapes[0][-1]).double(), shapes[0]


@every_backend
@ways
def test_pads_are_those_of_the_site_s_tokens(built, backend, name):
    build, site, inputs, mask = CASES[name]
    model = built(build)
    _, v, shape = directed(model, site, inputs)
    assert shape[:2] == tuple(mask.shape)
    with torch.no_grad():
        with added(model, site, mask[..., None] * v):
            want = numbers(model(**inputs))

        def run():
            with Steerer(model, SteeringVector({site: v}), backend=backend):
                return numbers(model(**inputs))

        if name in REFUSABLE:
            right_or_refused(run, want)
        else:
            torch.testing.assert_close(run(), want)


@ways
def test_collect_counts_the_site_s_tokens(built, name):
    build, site, inputs, mask = CASES[name]
    model, seen = built(build), []
    handle = model.get_submodule(site).register_forward_hook(
        lambda m, a, out: seen.append((out[0] if isinstance(out, tuple) else out).detach())
    )
    with torch.no_grad():
        model(**inputs)
    handle.remove()
    for positions in ("all", "last"):
        last = mask * (mask.flip(1).cumsum(1).flip(1) == 1)
        where = (mask if positions == "all" else last).bool()
        options = {"sites": site, "positions": positions, "progress": False}

        def run(options=options):
            return collect(model, [inputs], **options)[site]

        def both(run=run):
            s = run()
            return torch.cat([s.mean, torch.tensor([s.count]).double()])

        want = torch.cat([seen[0][where].mean(0), torch.tensor([float(where.sum())]).double()])
        if name in REFUSABLE:
            right_or_refused(both, want)
        else:
            torch.testing.assert_close(both(), want)


@every_backend
@pytest.mark.parametrize("name", ["CLIP image", "BLIP-2 queries", "BLIP-2 image", "Whisper encoder"])
def test_what_the_user_says_holds(built, backend, name):
    build, site, inputs, mask = CASES[name]
    model = built(build)
    _, v, _ = directed(model, site, inputs)
    with torch.no_grad():
        with added(model, site, v):
            want = numbers(model(**inputs))
        with Steerer(model, SteeringVector({site: v}), mask={site: None}, backend=backend):
            torch.testing.assert_close(numbers(model(**inputs)), want)
    assert collect(model, [inputs], sites=site, mask={site: None}, progress=False)[site].count == mask.numel()
