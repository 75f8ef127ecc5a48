"""actsteer play: what it serves, what it refuses before it does, and how it ends."""

import json
import re
import signal
import urllib.request

import pytest
import torch

from actsteer import Steering, SteeringVector, VectorBank, steerers
from actsteer.looking.play import Page
from tests.cli.test_interrupts import launched

IMAGE = [0.0, 0.5, 1.0, 0.25]


@pytest.fixture
def files(folder):
    """Vectors for both models, and a steering with a strength."""
    generator = torch.Generator().manual_seed(3)
    v = {name: SteeringVector({"model.layers.1": torch.randn(16, generator=generator)}) for name in ("love", "calm")}
    VectorBank(v).save(folder / "bank.safetensors")
    nine = SteeringVector({"1": torch.arange(8.0)}, concept="nine")
    nine.save(folder / "nine.safetensors")
    Steering(nine, c=3.0).save(folder / "three.safetensors")


@pytest.fixture
def visit(monkeypatch):
    """What a visitor does while the command waits, and what is found."""
    found = []

    def during(path, body=None):
        def wait(page):
            data = None if body is None else json.dumps(body).encode()
            asked = urllib.request.Request(page.url + path, data, {"Content-Type": "application/json"})
            with urllib.request.urlopen(asked) as reply:
                found.extend(json.loads(line) for line in reply)
            found.append(page)

        monkeypatch.setattr(Page, "wait", wait)
        return found

    return during


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_a_language_model(run, files, visit, chat):
    found = visit("/answer", {"prompt": "I love this day", "length": 5, "c": {"love": 4.0}})
    done = run("play", "-m", "llama", "-b", "bank.safetensors", "--port", 0, *chat)
    assert done.code == 0, done.err
    assert re.fullmatch(r"http://127.0.0.1:\d+  \(Ctrl-C ends it\)\n", done.out)
    *_, last, page = found
    command = ["generate", "-m", "llama", "-b", "bank.safetensors", "-c", "love=4", "--max-new-tokens", 5, *chat]
    expected = run(*command, "I love this day")
    assert last["done"] and last["text"].strip() == expected.out.split("love 4")[-1].strip()
    assert [own["c"] for own in page.setup["concepts"]] == [0.0, 0.0]
    assert steerers(page.live.model) == ()


@pytest.mark.parametrize(
    ("arguments", "c"),
    [(["-b", "nine.safetensors"], 0.0), (["-b", "nine.safetensors", "-c", 2], 2.0), (["-b", "three.safetensors"], 3.0)],
)
def test_a_classifier_and_where_its_sliders_begin(run, files, visit, arguments, c):
    import nets

    found = visit("/classes", {"image": IMAGE, "c": {"nine": 0.0}})
    scale = ["--mean", 0.5, "--std", 2]
    done = run("play", "-m", "nets:build", *arguments, "--image", "2x2", *scale, "--port", 0)
    assert done.code == 0, done.err
    x = (torch.tensor([IMAGE]) - 0.5) / 2
    assert found[0]["plain"] == found[0]["steered"] == nets.build()(x).double().softmax(1)[0].tolist()
    assert found[-1].setup["concepts"][0]["c"] == c


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (["-m", "nets:build", "-b", "nine.safetensors"], 1, "Sequential generates no text; give a language model or"),
        (["-m", "nets:other", "-b", "nine.safetensors", "--image", "5x1"], 1, "'1'"),
        (["-m", "nets:build", "-b", "nine.safetensors", "--image", "3x3"], 1, "does not take an image as (1, 9)"),
        (["-m", "nets:build", "-b", "nine.safetensors", "--image", "3"], 2, "expected height x width, as in 28x28"),
        (["-m", "nets:build", "-b", "none.safetensors"], 2, "there is no such file"),
        (["-m", "nets:build", "-b", "nine.safetensors", "-c", 1, "-c", 2], 2, "expected one strength"),
        (["-m", "llama", "-b", "nine.safetensors"], 1, "'1'"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_served(run, files, monkeypatch, arguments, code, why):
    monkeypatch.setattr(Page, "__init__", lambda *_, **__: pytest.fail("it is served"))
    done = run("play", *arguments)
    assert done.code == code
    assert why in " ".join(done.err.split())
    assert done.out == ""


def test_ctrl_c_ends_it(folder, files):
    process = launched(folder, "play", "-m", "nets:build", "-b", "nine.safetensors", "--image", "2x2", "--port", "0")
    url = process.stdout.readline().split()[0]
    with urllib.request.urlopen(f"{url}/setup") as reply:
        assert json.load(reply)["size"] == [2, 2]
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")
