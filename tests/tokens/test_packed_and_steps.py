"""Tokens that do not lie as one text a row: packed rows, cells in a loop, heads that answer at the end, windows."""

import pytest
import torch
from torch import nn

from actsteer import ProjectionAbove, ShapeError, Steerer, SteeringVector, StrengthError, collect, record
from actsteer.integrations.transformers import text_batches
from tests.zoo import normal, seeded

transformers = pytest.importorskip("transformers")


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.site = nn.Embedding(30, 2), nn.Identity()

    def forward(self, input_ids, position_ids=None, attention_mask=None):
        return self.site(self.embed(input_ids))


IDS = torch.arange(12).view(2, 6)
ANEW = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3]])
SIZES = [3, 3, 2, 4]
V = SteeringVector({"site": torch.tensor([1.0, 0.5])})


@pytest.fixture(scope="module")
def text():
    return seeded(Text)


# --- packed rows -----------------------------------------------------------------------------------------------------
WANTED = {
    "all": lambda t: t,
    "last": lambda t: t[-1:],
    "mean": lambda t: t.mean(0, keepdim=True),
    "0": lambda t: t[:1],
    "[1, -1]": lambda t: t[[1, -1]],
    "slice(-2, None, None)": lambda t: t[-2:],
}


@pytest.mark.parametrize("positions", ["all", "last", "mean", 0, [1, -1], slice(-2, None)], ids=str)
def test_positions_of_packed_rows_are_those_of_each_text(text, positions):
    batch = {"input_ids": IDS, "position_ids": ANEW}
    texts = text.embed(IDS).detach().flatten(0, 1).split(SIZES)
    expected = torch.cat([WANTED[str(positions)](own) for own in texts])
    found = record(text, [batch], sites="site", positions=positions, progress=False)["site"]
    torch.testing.assert_close(found.sort(0).values, expected.sort(0).values)
    assert collect(text, [batch], sites="site", positions=positions, progress=False)["site"].count == len(expected)


@pytest.mark.parametrize("positions", ["last", 0, slice(-2, None)], ids=str)
def test_packed_rows_are_steered_as_each_text_alone(text, positions):
    with torch.no_grad(), Steerer(text, V, positions=positions):
        together = text(IDS, position_ids=ANEW).flatten(0, 1).split(SIZES)
        alone = [text(own[None])[0] for own in IDS.flatten().split(SIZES)]
    for one, other in zip(together, alone, strict=True):
        torch.testing.assert_close(one, other)


def test_position_ids_beside_a_mask_with_pads_are_not_packed(text):
    batch = {"input_ids": IDS, "position_ids": ANEW * 0, "attention_mask": torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])}
    assert collect(text, [batch], sites="site", positions="last", progress=False)["site"].count == 2


# --- cells in a loop -------------------------------------------------------------------------------------------------
class Loop(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.cell = kind(2, 3)

    def forward(self, x, attention_mask=None):
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        return state


@pytest.mark.parametrize(("kind", "site"), [(nn.LSTMCell, "cell:out.0"), (nn.GRUCell, "cell"), (nn.RNNCell, "cell")])
def test_a_cell_in_a_loop_is_refused_where_there_are_pads(kind, site):
    model, x, pads = seeded(lambda: Loop(kind)), normal(2, 4, 2), torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])
    v = SteeringVector({site: torch.ones(3)})
    assert collect(model, [(x,)], sites=site, progress=False)[site].count == 8
    assert collect(model, [(x, torch.ones(2, 4))], sites=site, progress=False)[site].count == 8
    with pytest.raises(ShapeError, match=r"mask=\{site: None\}"):
        collect(model, [(x, pads)], sites=site, progress=False)
    with torch.no_grad(), Steerer(model, v), pytest.raises(ShapeError, match=r"mask=\{site: None\}"):
        model(x, pads)
    assert collect(model, [(x, pads)], sites=site, mask={site: None}, progress=False)[site].count == 8
    for positions in ("last", "mean", 0):
        with pytest.raises(ShapeError, match="positions="):
            collect(model, [(x,)], sites=site, positions=positions, progress=False)


# --- heads, towers, parts --------------------------------------------------------------------------------------------
def llama():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 40}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, pad_token_id=0, eos_token_id=None)
    return seeded(lambda: transformers.LlamaForCausalLM(config))


def fed(model, site, size, run, **options):
    """Where the outputs at a site are moved, pass by pass, in the first row."""
    seen = []
    with torch.no_grad(), Steerer(model, SteeringVector({site: torch.full((size,), 1000.0)}), **options):
        handle = model.get_submodule(site).register_forward_hook(
            lambda m, a, out: seen.append(((out[0] if isinstance(out, tuple) else out).mean(-1) / 1000).round().int())
        )
        run()
        handle.remove()
    return [own.tolist() for own in seen]


@pytest.mark.parametrize(
    ("options", "where"),
    [
        ({"positions": "generated"}, [[[0]], [[1]], [[1]]]),
        ({"positions": "prompt"}, [[[1]], [[0]], [[0]]]),
        ({"positions": "last"}, [[[1]], [[0]], [[0]]]),
        ({"positions": 6}, [[[0]], [[0]], [[1]]]),
        ({"c": lambda step: float(step)}, [[[0]], [[1]], [[2]]]),
    ],
    ids=lambda value: "schedule" if "at 0x" in str(value) else str(value),
)
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_head_has_the_positions_at_which_it_answers(options, where, use_cache):
    model = llama()
    generate = {"max_new_tokens": 3, "do_sample": False, "use_cache": use_cache}
    assert fed(model, "lm_head", 40, lambda: model.generate(torch.arange(3, 8)[None], **generate), **options) == where


def test_the_inner_model_knows_positions_from_the_start_or_says_what_to_do():
    from actsteer import PositionsError

    model = llama()
    generate = {"max_new_tokens": 3, "do_sample": False}

    def run(**options):
        with Steerer(model.model, SteeringVector({"layers.0": torch.ones(16)}), **options):
            model.generate(torch.arange(3, 8)[None], **generate)

    run()
    run(positions=0)
    with pytest.raises(PositionsError, match="the model that the Steerer is on"):
        run(positions="generated")


def test_other_entry_points_have_the_positions_of_their_call():
    text = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    text |= {"num_attention_heads": 2, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 39}
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 6, "patch_size": 3}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    model = seeded(lambda: transformers.CLIPModel(config))
    ids, mask = torch.tensor([[3, 4, 39, 2, 2], [7, 8, 3, 5, 39]]), torch.tensor([[1, 1, 1, 0, 0], [1] * 5])
    site = "text_model.encoder.layers.0"

    def run():
        model.get_text_features(input_ids=ids, attention_mask=mask)

    assert fed(model, site, 16, run) == [mask.tolist()]
    assert fed(model, site, 16, run, positions="last") == [[[0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]]


def whisper():
    sizes = {"vocab_size": 60, "num_mel_bins": 4, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"max_source_positions": 8, "max_target_positions": 12, "pad_token_id": 0, "decoder_start_token_id": 1}
    config = transformers.WhisperConfig(**sizes, bos_token_id=1, eos_token_id=2, begin_suppress_tokens=None)
    model = seeded(lambda: transformers.WhisperForConditionalGeneration(config))
    found = {"no_timestamps_token_id": 40, "max_initial_timestamp_index": None, "is_multilingual": False}
    found |= {"suppress_tokens": None, "begin_suppress_tokens": None, "alignment_heads": None, "max_length": None}
    for name, value in found.items():
        setattr(model.generation_config, name, value)
    return model


@pytest.mark.filterwarnings("ignore")
def test_each_window_of_a_recording_has_its_prompt_and_rows_that_are_dropped_are_refused():
    model, site = whisper(), "model.decoder.layers.0"
    options = {"return_timestamps": True, "max_new_tokens": 4}
    audio, heard = normal(2, 4, 40), torch.ones(2, 40).long()

    def run(rows):
        model.generate(audio[:rows], attention_mask=heard[:rows], **options)

    found = fed(model, site, 16, lambda: run(1), positions="prompt")
    assert [own[0][0] for own in found] == [1, 0, 0, 0] * (len(found) // 4) and len(found) >= 8
    heard[1, 18:] = 0
    with pytest.raises(StrengthError, match="goes on with other rows"):
        fed(model, site, 16, lambda: run(2), c=torch.tensor([0.0, 1.0]))


# --- gates that read the last token ----------------------------------------------------------------------------------
@pytest.mark.parametrize("side", ["right", "left"])
def test_a_gate_may_read_the_last_token_of_each_prompt(text, side):
    mask = torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    mask = mask if side == "right" else mask.flip(1)
    last = [3, 5] if side == "right" else [5, 5]
    scores = (text.embed(IDS).detach()[[0, 1], last] @ V["site"].double()) / V.norm()
    gate = ProjectionAbove(V, float(scores.mean()), per="last")
    with torch.no_grad(), Steerer(text, V, c=8.0, gate=gate):
        moved = (text(IDS, attention_mask=mask) - text.embed(IDS)).abs().amax(-1) > 1
    assert torch.equal(moved, (scores > scores.mean())[:, None] & mask.bool())


# --- chats -----------------------------------------------------------------------------------------------------------
class Chat:
    """A tokenizer of letters, whose template ends each answer with "#"."""

    def apply_chat_template(
        self, messages, *, add_generation_prompt, tokenize, return_dict, continue_final_message=False
    ):
        assert tokenize and return_dict and not (add_generation_prompt and continue_final_message)
        whole = "".join(message["content"] + "#" for message in messages)
        whole = whole[:-1] if continue_final_message else whole + ">" * add_generation_prompt
        return {"input_ids": [ord(letter) for letter in whole]}

    def __call__(self, text):
        return {"input_ids": [ord(letter) for letter in text]}


ASKED = [{"role": "user", "content": "ab"}]
ANSWERED = [*ASKED, {"role": "assistant", "content": "cd"}]


@pytest.mark.parametrize(
    ("texts", "options", "expected"),
    [
        ([ANSWERED], {}, "ab#cd"),
        ([ANSWERED], {"continue_final_message": False}, "ab#cd#"),
        ([ASKED], {}, "ab#>"),
        ([ASKED], {"continue_final_message": True}, "ab"),
        ([ANSWERED], {"truncation": 2}, "ab"),
    ],
    ids=str,
)
def test_a_chat_ends_with_its_answer(texts, options, expected):
    (batch,) = text_batches(Chat(), texts, chat=True, **options)
    assert "".join(map(chr, batch["input_ids"][0].tolist())) == expected


def test_texts_may_be_cut_off():
    (batch,) = text_batches(Chat(), ["abcd", "a"], truncation=3)
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    with pytest.raises(ValueError, match="truncation"):
        text_batches(Chat(), ["a"], truncation=0)


# --- modules that are replaced ---------------------------------------------------------------------------------------
def test_an_encoder_that_was_replaced_has_its_pads():
    sizes = {"vocab_size": 40, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, pad_token_id=0)
    model, other = (seeded(lambda: transformers.T5ForConditionalGeneration(config)) for _ in range(2))
    steerer = Steerer(model, SteeringVector({"encoder.block.0": torch.full((16,), 1000.0)}))
    model.encoder = other.encoder
    ids, mask = torch.tensor([[3, 4, 5]]), torch.tensor([[1, 1, 0]])
    seen = []
    handle = model.encoder.block[0].register_forward_hook(lambda m, a, out: seen.append(out[0].mean(-1) > 500))
    with torch.no_grad(), steerer:
        model(input_ids=ids, attention_mask=mask, decoder_input_ids=ids)
    handle.remove()
    assert seen[0].int().tolist() == mask.tolist()
