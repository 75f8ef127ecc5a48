"""actsteer calibrate, and what show, generate and verify make of what it has written."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from actsteer import Evidence, Steering, SteeringVector
from actsteer.files import sealed

SITE = "model.layers.1"
SCORES = '''
"""Metrics, as a user has them."""


def calm(texts):
    return [text.count("calm") + 0.01 * len(text.split()) for text in texts]


def far(texts):
    """How many texts are not those of the model as it is, which are scored first."""
    plain.extend([] if plain else texts)
    return [float(text != own) for text, own in zip(texts, plain)]


plain = []


def up(output):
    return output[:, 0].double()


def down(output):
    return -output[:, 0].double()


number = 3


class Kind:
    pass
'''


@pytest.fixture
def ready(folder):
    """A folder with a bank for each model, metrics, prompts and neutral texts."""
    (folder / "scores.py").write_text(SCORES)
    torch.manual_seed(0)
    SteeringVector({SITE: torch.randn(16), "model.layers.0": torch.randn(16)}, concept="calm").save("calm.safetensors")
    import nets

    SteeringVector({"1": nets.build()[2].weight.detach()[0]}, concept="up").save("up.safetensors")  # no other does more
    save_file({"x": torch.randn(40, 4)}, "inputs.safetensors")
    save_file({"x": torch.randn(40, 4)}, "neutral.safetensors")
    return folder


UP = ["-m", "nets:build", "-b", "up.safetensors", "--retain", "neutral.safetensors", "--prompts", "inputs.safetensors"]
UP += ["--metric", "scores:up", "--controls", "19", "--budget", "1000"]


@pytest.fixture
def calibrated(run, ready):
    model = run("calibrate", *UP, "-o", "out.safetensors")
    assert model.code == 0, model.err
    return model


def test_it_writes_a_steering_with_evidence_a_table_and_a_picture(calibrated, ready):
    head, *rest = calibrated.lines
    assert head == ["sites", "c", "dose", "effect", "cost"]
    assert any(line[0] == "*" for line in rest if line)
    assert "percentile 100.0 of 19 controls" in calibrated.out
    assert calibrated.lines[-1] == ["written", "to", "out.safetensors"]
    assert (ready / "out.png").read_bytes().startswith(b"\x89PNG")
    steering = Steering.load("out.safetensors")
    assert steering.vectors.sites == ("1",)
    assert steering.c != 0
    assert Evidence.of(steering).metric == "scores:up"
    assert not list(ready.glob(".*"))
    assert sealed.kind_of("out.safetensors") == "steering"


def test_show_prints_what_was_measured(run, calibrated):
    done = run("show", "out.safetensors")
    assert done.code == 0, done.err
    for words in (
        "measured: c ",
        "effect: ",
        "by scores:up",
        "cost: mean ",
        "controls: percentile 100.0 of 19",
        "versions:",
    ):
        assert words in done.out
    assert "dose response: c, effect, cost" in done.out


def test_verify_measures_it_again(run, calibrated):
    done = run("verify", "out.safetensors", "-m", "nets:build")
    assert done.code == 0, done.err
    assert [line[0] for line in done.lines] == ["whole:", "fits:", "recorded:", "not"]
    done = run("verify", "out.safetensors", "-m", "nets:build", "--on", "neutral.safetensors")
    assert done.code == 0, done.err
    assert "cost (mean)" in done.out
    done = run("verify", "out.safetensors", "-m", "nets:build", "--on", "inputs.safetensors", "--metric", "scores:up")
    assert done.code == 0, done.err
    assert "effect" in done.out.splitlines()[-2]
    assert done.out.splitlines()[-1].startswith("not measured again: cost (mean);")
    assert run("verify", "out.safetensors").lines[-2][0] == "recorded:"
    assert run("verify", "out.safetensors", "-m", "nets:build", "--metric", "scores:up").code == 2
    other = run(
        "verify", "out.safetensors", "-m", "nets:build", "--on", "inputs.safetensors", "--metric", "scores:down"
    )
    assert other.code == 2
    assert "the effect was measured by scores:up" in " ".join(other.err.split())
    done = run("verify", "out.safetensors", "-m", "nets:build", "-c", "0.1")
    assert done.code == 1
    assert "no longer as recorded: ‖c·v‖ of up at 1 was" in done.err


def test_verify_says_what_no_longer_holds(run, calibrated):
    steering = Steering.load("out.safetensors")
    other = SteeringVector({"1": -steering.vectors["up"]["1"]}, metadata=steering.vectors["up"].metadata)
    Steering(other, c=steering.c).save("flipped.safetensors")
    done = run(
        "verify", "flipped.safetensors", "-m", "nets:build", "--on", "inputs.safetensors", "--metric", "scores:up"
    )
    assert done.code == 1
    assert "no longer as recorded: direction of up at 1 was as recorded, and is the reverse" in done.err
    assert "no longer as recorded: effect was" in done.err


def test_a_picture_is_drawn_where_it_is_asked_for_and_none_is_lost(run, ready):
    (ready / "out.png").write_bytes(b"another")
    done = run("calibrate", *UP, "-o", "out.safetensors")
    assert done.code == 2
    assert "it is there already" in done.err
    assert run("calibrate", *UP, "-o", "out.safetensors", "--picture", "pareto.svg").code == 0
    assert (ready / "pareto.svg").read_text().startswith("<?xml")
    assert (ready / "out.png").read_bytes() == b"another"


def test_texts_are_scored_by_what_the_model_writes_after_them(run, ready):
    done = run(
        *("calibrate", "-m", "llama", "-b", "calm.safetensors", "--retain", "love.txt", "--prompts", "hate.txt"),
        *(
            "--metric",
            "scores:calm",
            "--controls",
            "1",
            "--budget",
            "50",
            "--max-new-tokens",
            "4",
            "-o",
            "out.safetensors",
        ),
        *("--positions", "all", "--positions", "generated", "--dose", "0.5", "--dose", "1"),
    )
    assert done.code in (0, 1), done.err
    assert "controls" in done.out
    assert (ready / "out.safetensors").exists() == (done.code == 0)
    assert "generated" in done.out


def test_what_is_not_worth_steering_with_is_not_written(run, ready):
    save_file({"x": load_file("inputs.safetensors")["x"]}, "other.safetensors")
    done = run("calibrate", *UP, "-o", "out.safetensors", "--budget", "0")
    assert done.code == 1
    assert "c = 0: no strength is within the budget" in done.out
    assert "error: nothing is written, for nothing that was tried is worth steering with" in done.err
    assert not (ready / "out.safetensors").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--metric", "scores:none"], "'scores' has no 'none'"),
        (["--metric", "scores:number"], "expected a function, got int"),
        (["--metric", "scores:Kind"], "expected a function, got type"),
        (["--metric", "nowhere:f"], "no module 'nowhere' here or installed; expected module:function"),
        (["--retain", "none.txt"], "none.txt"),
        (["-o", "out.txt"], "expected a name with .safetensors"),
        (["-o", "inputs.safetensors"], "it is read, and would be lost"),
        (["--picture", "x.jpg"], "expected a name with .png or .svg or .pdf"),
        (["--positions", "nowhere"], "positions"),
    ],
)
def test_wrong_usage_is_refused(run, ready, change, message):
    done = run("calibrate", *UP, "-o", "out.safetensors", *change)
    assert done.code == 2, done.err
    assert message in done.err.replace("\n", " ")
    assert not (ready / "out.safetensors").exists()


def test_generate_steers_by_what_was_written(run, ready):
    """At the strength of the file, which is all that it needs to be told."""
    words = ["I love", "this day", "the weather is", "very good", "bad", "that is", "calm weather", "I hate this"]
    (ready / "many.txt").write_text("\n".join(words))
    done = run(
        *("calibrate", "-m", "llama", "-b", "calm.safetensors", "--retain", "love.txt", "--prompts", "many.txt"),
        *("--metric", "scores:far", "--controls", "0", "--budget", "1000", "--max-new-tokens", "4", "--dose", "3"),
        *("-o", "out.safetensors"),
    )
    assert done.code == 0, done.err + done.out
    c = Steering.load("out.safetensors").c
    done = run("generate", "-m", "llama", "-b", "out.safetensors", "I love", "--max-new-tokens", "4")
    assert done.code == 0, done.err
    heads = [line for line in done.out.splitlines() if line.startswith("c = ")]
    assert heads == ["c = 0", f"c = {c:g}"]
