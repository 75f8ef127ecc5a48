"""Whisper writes a long recording window by window: each window has its own prompt, and rows end one by one.

The kind of fault: state of one window is read in the next; strengths per row slip when rows are finished.
"""

import pytest
import torch
from torch import nn

from actsteer import ProjectionAbove, Steerer, SteeringVector
from tests.kinds.by_hand import added, every_backend, listening, right_or_refused
from tests.zoo import seeded

transformers = pytest.importorskip("transformers")

SITE, AFTER = "model.decoder.layers.0", "model.decoder.layers.1"
V = SteeringVector({SITE: torch.full((16,), 1e6).double()})  # it shows in whatever comes after
WINDOW, NEW = 16, 5
OPTIONS = {"return_timestamps": True, "max_new_tokens": NEW, "do_sample": False}
pytestmark = pytest.mark.filterwarnings("ignore")  # transformers, of its own arguments


def whisper():
    sizes = {"vocab_size": 64, "num_mel_bins": 4, "d_model": 16, "encoder_layers": 1, "decoder_layers": 2}
    sizes |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    sizes |= {"max_source_positions": WINDOW // 2, "max_target_positions": 32, "pad_token_id": 0, "bos_token_id": 1}
    rest = {"eos_token_id": 2, "decoder_start_token_id": 1, "suppress_tokens": None, "begin_suppress_tokens": None}
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**sizes, **rest))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    model.generation_config.no_timestamps_token_id = 40
    model.generation_config.is_multilingual = False
    return model


@pytest.fixture(scope="module")
def model():
    return seeded(whisper)


def recordings(rows, frames):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, frames, generator=generator, dtype=torch.float64)


def write(model, sound, frames=None):
    """The text of each recording, which may be shorter than the longest one."""
    mask = torch.ones(sound.shape[0], sound.shape[2], dtype=torch.long)
    for row, length in enumerate(frames or []):
        mask[row, length:] = 0
    return model.generate(input_features=sound, attention_mask=mask, **OPTIONS)


def strengths(hidden):
    """How strongly each row of one pass was steered, to the nearest number."""
    return (hidden.mean((1, 2)) / 1e6).round().int().tolist()


def steps(positions):
    """Of the passes of one window which are steered: the first computes the prompt, each other a token."""
    return {None: [1] * NEW, "prompt": [1, *[0] * (NEW - 1)], "generated": [0, *[1] * (NEW - 1)]}[positions]


@every_backend
@pytest.mark.parametrize("windows", [1, 3])
@pytest.mark.parametrize("positions", [None, "prompt", "generated"], ids=str)
def test_each_window_has_its_own_prompt(model, backend, windows, positions):
    sound, flags = recordings(2, windows * WINDOW), steps(positions)
    with added(model, SITE, lambda h, n: V[SITE] * flags[n % NEW]) as shapes:
        want = write(model, sound)
    assert shapes == [(2, 1, 16)] * (NEW * windows)
    with Steerer(model, V, positions=positions, backend=backend), listening(model, AFTER) as seen:
        assert torch.equal(write(model, sound), want)
    assert [strengths(h) for h in seen] == [[flag] * 2 for flag in flags] * windows


@every_backend
def test_strengths_follow_the_rows_when_some_are_finished(model, backend):
    """The first recording ends after one window, the last after two."""
    sound, c = recordings(3, 3 * WINDOW), torch.tensor([0.0, 1.0, -2.0]).double()
    frames = [WINDOW, 3 * WINDOW, 2 * WINDOW]

    def amounts(h, n):
        left = [row for row in range(3) if frames[row] > n // NEW * WINDOW]
        assert len(left) == h.shape[0]
        return c[left][:, None, None] * V[SITE]

    with added(model, SITE, amounts) as shapes:
        want = write(model, sound, frames)
    assert [shape[0] for shape in shapes] == [3] * NEW + [2] * NEW + [1] * NEW

    def run():
        with Steerer(model, V, c=c, backend=backend), listening(model, AFTER) as seen:
            got = write(model, sound, frames)
        assert torch.equal(got, want)
        return [strengths(h) for h in seen]

    right_or_refused(run, [[0, 1, -2]] * NEW + [[1, -2]] * NEW + [[1]] * NEW)


@every_backend
@pytest.mark.parametrize("threshold", [-1e9, 0.0, 1e9])
def test_a_gate_decides_for_each_window_as_for_one_alone(model, backend, threshold):
    """From the window's prompt, which is one token: the same decision in every one."""
    sound, gate = recordings(2, 3 * WINDOW), ProjectionAbove(V, threshold)
    with listening(model, AFTER) as seen, Steerer(model, V, gate=gate, backend=backend):
        write(model, sound)
    assert len(seen) == 3 * NEW
    with listening(model, AFTER) as plain:
        write(model, sound)
    # the projection onto ones is four times the mean of 16 features; the window's first pass depends on no other
    fires = [(4 * plain[n].mean((1, 2)) > threshold).int().tolist() for n in (0, NEW, 2 * NEW)]
    assert [strengths(seen[n]) for n in (0, NEW, 2 * NEW)] == fires
    for n, h in enumerate(seen):
        assert strengths(h) == fires[n // NEW]


@every_backend
def test_a_short_recording_after_a_long_one_is_as_without_it(model, backend):
    short, long = recordings(1, WINDOW), recordings(2, 3 * WINDOW)
    with Steerer(model, V, positions="generated", backend=backend):
        want = write(model, short)
        write(model, long)
        assert torch.equal(write(model, short), want)
