"""Live: several people at one model; each gets, bit for bit, what a Steerer and the model alone give."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event, Thread

import pytest
import torch
from torch import nn

from actsteer import (
    Ablate,
    Add,
    BatchError,
    ProjectionAbove,
    ShapeError,
    SiteNotFoundError,
    Steerer,
    Steering,
    SteeringVector,
    StrengthError,
    UnsupportedModelError,
    record,
    steerers,
)
from actsteer.looking.live import PROMPT, Live
from tests.oracles import state
from tests.zoo import llama

WAIT = 20.0  # seconds after which a test that hangs fails
PROMPTS = ("the sea", "a quiet day", "once upon")


@pytest.fixture
def live(model, bank, letters):
    return Live(model, bank, tokenizer=letters)


@pytest.fixture
def alone(bank, letters):
    """What a model that nobody else has gives, by `generate` itself."""

    def given(prompt, length, **steering):
        model = llama(vocab_size=35, eos_token_id=None)
        ids = torch.tensor([letters(prompt)["input_ids"]])
        call = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": length}
        if not steering:
            return letters.decode(model.generate(ids, **call)[0, ids.shape[1] :], skip_special_tokens=True)
        with Steerer(model, bank, **steering):
            return letters.decode(model.generate(ids, **call)[0, ids.shape[1] :], skip_special_tokens=True)

    return given


def silent(text):
    return True


# --- text --------------------------------------------------------------------------------------------------------
def test_people_at_once_get_what_each_gets_alone(live, alone):
    strengths = [{"love": 1.0, "calm": 0.0}, {"love": -2.0, "calm": 1.5}, None]
    expected = [alone(p, 24, **({"c": c} if c else {})) for p, c in zip(PROMPTS, strengths, strict=True)]
    assert len(set(expected)) == 3
    all_are_here = Barrier(3, timeout=WAIT)

    def ask(number):
        def say(text):
            if len(text) == 1:
                all_are_here.wait()  # no answer is over before all have begun
            return True

        if strengths[number] is None:
            return live.answer(PROMPTS[number], length=24, say=say)
        with live.steerer(c=strengths[number]):
            return live.answer(PROMPTS[number], length=24, say=say)

    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(ask, range(3))) == expected
    assert steerers(live.model) == ()
    assert state(live.model) == state(llama(vocab_size=35, eos_token_id=None))


def test_the_text_is_told_after_every_token(live, alone):
    told = []
    text = live.answer("the sea", length=6, say=lambda text: told.append(text) or True)
    assert text == alone("the sea", 6)
    assert told == [text[:end] for end in range(1, 7)]


class LeftError(Exception):
    """Whoever asked has gone."""


def test_an_answer_that_is_left_half_way_leaves_nothing(live, alone):
    told = []

    def leave(text):
        told.append(text)
        if len(text) == 3:
            raise LeftError
        return True

    with pytest.raises(LeftError), live.steerer(c=1.0):
        live.answer("the sea", length=1000, say=leave)
    assert len(told) == 3
    assert steerers(live.model) == ()
    assert state(live.model) == state(llama(vocab_size=35, eos_token_id=None))
    assert live.answer("the sea", length=9, say=silent) == alone("the sea", 9)
    with live.steerer(c=2.0):
        assert live.answer("the sea", length=9, say=silent) == alone("the sea", 9, c=2.0)


def test_an_answer_ends_where_no_more_is_wanted(live, alone):
    with live.steerer(c=1.0):
        text = live.answer("the sea", length=1000, say=lambda text: len(text) < 4)
    assert text == alone("the sea", 4, c=1.0)
    assert steerers(live.model) == ()


def test_strengths_change_between_answers_and_nothing_is_attached_anew(live, alone):
    with live.steerer(c=0.0) as steerer:
        assert steerers(live.model) == (steerer,)
        for c in (0.0, 1.0, {"love": -1.0, "calm": 2.0}, 0.0):
            live.change(steerer, c)
            assert live.answer("the sea", length=12, say=silent) == alone("the sea", 12, c=c)
            assert steerers(live.model) == (steerer,)


@pytest.mark.parametrize("before", [0.0, 1.0])
def test_strengths_that_change_while_it_writes_hold_from_the_next_token_on(live, alone, before):
    with live.steerer(c={"love": before, "calm": 0.0}) as steerer:

        def say(text):
            if len(text) == 5:
                in_another_thread = Thread(target=live.change, args=(steerer, {"love": -3.0, "calm": 1.0}))
                in_another_thread.start()
                in_another_thread.join(WAIT)
            return True

        text = live.answer("the sea", length=14, say=say)
    schedules = {"love": lambda step: before if step < 5 else -3.0, "calm": lambda step: float(step >= 5)}
    assert text == alone("the sea", 14, c=schedules)
    assert text != alone("the sea", 14, c={"love": before, "calm": 0.0})


@pytest.mark.parametrize(
    "where",
    [
        {"sites": ["model.layers.1"]},
        {"positions": "prompt"},
        {"positions": "generated", "sites": ["model.layers.0", "model.layers.1"]},
        {"positions": slice(1, 4)},
    ],
)
def test_sites_and_positions_are_those_of_a_steerer(live, alone, where):
    with live.steerer(c=1.5, **where):
        text = live.answer("the sea", length=12, say=silent)
    assert text == alone("the sea", 12, c=1.5, **where)
    assert text != alone("the sea", 12, c=1.5)


def test_a_steering_keeps_its_gates(model, bank, letters):
    gate = ProjectionAbove(SteeringVector({"model.layers.0": torch.ones(16).double()}), 1e9)
    live = Live(model, Steering(bank, gate=gate), tokenizer=letters)
    plain = live.answer("the sea", length=9, say=silent)
    with live.steerer(c=3.0):
        assert live.answer("the sea", length=9, say=silent) == plain


def test_a_chat_goes_through_the_template(model, bank, letters, alone):
    def template(messages, *, tokenize, return_dict, add_generation_prompt):
        return letters("say " + messages[0]["content"])

    letters.apply_chat_template = template
    live = Live(model, bank, tokenizer=letters, chat=True)
    assert live.answer("the sea", length=9, say=silent) == alone("say the sea", 9)


@pytest.mark.parametrize(("prompt", "length", "why"), [("", 3, "has no tokens"), ("sea", 0, "1 or more, got 0")])
def test_what_cannot_be_answered_is_refused_and_others_have_their_turn(live, prompt, length, why):
    with pytest.raises(BatchError, match=why):
        live.answer(prompt, length=length, say=silent)
    assert len(live.answer("sea", length=3, say=silent)) == 3


def test_a_model_that_searches_with_beams_tells_its_likeliest_text(live, alone):
    live.model.generation_config.num_beams = 2
    told = []
    text = live.answer("the sea", length=6, say=lambda text: told.append(text) or True)
    assert text == told[-1] == alone("the sea", 6)


def test_an_encoder_and_a_decoder(letters):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"vocab_size": 35, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    torch.manual_seed(0)
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": None}
    model = T5ForConditionalGeneration(T5Config(**sizes, **ends, initializer_factor=3.0)).eval()
    v = SteeringVector({"encoder.block.0": torch.ones(16), "decoder.block.1": torch.linspace(-1, 1, 16)}, concept="v")
    live, ids = Live(model, v, tokenizer=letters), torch.tensor([letters("the sea")["input_ids"]])
    assert live.sliders() == [("v", 1.0, 5.0, {})]
    with live.steerer(c=2.0):
        text = live.answer("the sea", length=6, say=silent)
    with Steerer(model, v, c=2.0):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6)
    assert len(text) == 6
    assert text == letters.decode(found[0, 1:], skip_special_tokens=True)


def test_one_thread_at_a_time_runs_the_model():
    class Counts(nn.Module):
        now, most = 0, 0

        def forward(self, x):
            Counts.now += 1
            Counts.most = max(Counts.most, Counts.now)
            Event().wait(0.01)
            Counts.now -= 1
            return x

    live = Live(flat().insert(0, Counts()).eval(), SteeringVector({"2": torch.ones(5)}), image=(3, 4))
    with ThreadPoolExecutor(4) as pool:
        assert len({tuple(found) for found in pool.map(live.classes, [X] * 8)}) == 1
    assert Counts.most == 1


# --- images ------------------------------------------------------------------------------------------------------
X = torch.linspace(0, 1, 12).tolist()


def flat():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3)).eval()


def convolution():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 5, 3), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 1 * 2, 3)).eval()


@pytest.mark.parametrize(
    ("build", "image", "shape"),
    [
        (flat, (3, 4), (1, 12)),
        (convolution, (1, 3, 4), (1, 1, 3, 4)),
        (lambda: flat().double(), (3, 4), (1, 12)),
    ],
    ids=["flat", "channel", "float64"],
)
def test_classes_are_the_softmax_of_what_the_model_returns(build, image, shape):
    model = build()
    dtype = next(model.parameters()).dtype
    generator = torch.Generator().manual_seed(1)
    v = SteeringVector({"1": torch.randn(5, generator=generator, dtype=dtype)}, concept="nine")
    live = Live(model, v, image=image, mean=0.25, std=0.5)
    x = ((torch.tensor(X) - 0.25) / 0.5).reshape(shape).to(dtype)
    plain = model(x).double().softmax(1)[0].tolist()
    assert live.classes(X) == plain
    with live.steerer(c={"nine": 2.0}) as steerer:
        with Steerer(build(), v, c=2.0) as other:
            assert live.classes(X) == other.model(x).double().softmax(1)[0].tolist() != plain
        live.change(steerer, 0.0)
        assert live.classes(X) == plain
    assert steerers(model) == ()


def test_an_image_of_another_size_is_refused():
    with pytest.raises(ShapeError, match="expected 3 x 4 pixels, got 11"):
        Live(flat(), SteeringVector({"1": torch.ones(5)}), image=(3, 4)).classes(X[1:])


# --- before anything is served -----------------------------------------------------------------------------------
V = SteeringVector({"1": torch.ones(5)}, concept="nine")
ROW = r"expected a row with a number for each class, got \(1, 3, 1\)"


@pytest.mark.parametrize(
    ("build", "steering", "options", "kind", "why"),
    [
        (flat, SteeringVector({"9": torch.ones(5)}), {"image": (3, 4)}, SiteNotFoundError, "'9'"),
        (flat, SteeringVector({"0": torch.ones(7)}), {"image": (3, 4)}, ShapeError, "7"),
        (flat, V, {}, UnsupportedModelError, "generates no text; give .* the size of its images, as in 28x28"),
        (flat, V, {"image": (2, 4)}, UnsupportedModelError, r"does not take an image as \(1, 8\).*1x28x28"),
        (flat, V, {"image": (3, 3, 4)}, ShapeError, r"expected \(height, width\)"),
        (lambda: flat().train(), V, {"image": (3, 4)}, UnsupportedModelError, "training mode; call model.eval"),
        (flat, V, {"c": abs, "image": (3, 4)}, StrengthError, r"c\['nine'\]: a slider has one number, got builtin"),
        (flat, V, {"c": torch.ones(2), "image": (3, 4)}, StrengthError, "a slider has one number, got Tensor"),
        (lambda: flat().append(nn.Unflatten(1, (3, 1))).eval(), V, {"image": (3, 4)}, UnsupportedModelError, ROW),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_served(build, steering, options, kind, why):
    with pytest.raises(kind, match=why):
        Live(build(), steering, **options)


def test_a_language_model_needs_its_tokenizer(model, bank):
    with pytest.raises(UnsupportedModelError, match="there is no tokenizer; give its own"):
        Live(model, bank)


# --- what a page shows -------------------------------------------------------------------------------------------
def test_sliders_say_how_large_a_vector_is_beside_the_activations(live, model, bank, letters):
    ids = torch.tensor([letters(PROMPT)["input_ids"]])
    acts = record(model, {"input_ids": ids}, sites=list(bank["love"].sites), progress=False)
    assert live.sites == ("model.layers.0", "model.layers.1") and live.size is None
    assert [slider.concept for slider in live.sliders()] == ["love", "calm"]
    for own in live.sliders():
        shares = {
            site: float(bank[own.concept][site].norm()) / float(acts[site].norm(dim=1).median()) for site in live.sites
        }
        assert own.shares == pytest.approx(shares)
        assert 1 / max(shares.values()) <= own.reach * (1 + 1e-6) < 2.6 / max(shares.values())
        assert own.c == 1.0


def test_what_is_not_added_in_the_activations_units_has_no_share(model, bank, letters):
    kinds = {"love": Add(relative=True), "calm": Ablate()}
    live = Live(model, Steering(bank, intervention=kinds), tokenizer=letters)
    assert [(own.shares, own.reach) for own in live.sliders()] == [({}, 5.0)] * 2


@pytest.mark.parametrize(("c", "starts", "reach"), [(1.0, 1.0, 5.0), (30.0, 30.0, 100.0), ({}, 0.0, 5.0)])
def test_sliders_begin_at_the_steerings_strengths_and_have_room_for_them(c, starts, reach):
    assert Live(flat(), V, image=(3, 4), c=c).sliders() == [("nine", starts, reach, {})]
    assert Live(flat(), Steering(V, c=c), image=(3, 4)).sliders() == [("nine", starts, reach, {})]
