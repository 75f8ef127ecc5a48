"""actsteer play: what it serves, what it refuses before it does, and how it ends."""

import re
import signal
import socket

import pytest
import torch

from actsteer import Steering, SteeringVector, VectorBank, steerers
from actsteer.looking.play import Page
from tests.cli.test_interrupts import launched

pytest.importorskip("gradio")
import httpx
from gradio_client import Client

WAIT = 60.0  # seconds after which a test that hangs fails


@pytest.fixture
def port():
    """A free one."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


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
    """What a visitor asks while the command waits, and what is found."""
    found = []

    def during(*asked, api_name):
        def wait(page):
            found.extend([Client(page.url, verbose=False).predict(*asked, api_name=api_name), page])

        monkeypatch.setattr(Page, "wait", wait)
        return found

    return during


@pytest.mark.parametrize("chat", [[], ["--chat"]])
def test_a_language_model(run, files, visit, port, chat):
    found = visit("I love this day", 5, ["model.layers.1"], "", 4.0, 0.0, api_name="/steered")
    done = run("play", "-m", "llama", "-b", "bank.safetensors", "--port", port, *chat)
    assert done.code == 0, done.err
    assert re.fullmatch(rf"http://127.0.0.1:{port}/  \(Ctrl-C ends it\)\n", done.out)
    text, page = found
    command = ["generate", "-m", "llama", "-b", "bank.safetensors", "-c", "love=4", "--max-new-tokens", 5, *chat]
    expected = run(*command, "I love this day")
    assert text.strip() == expected.out.split("love 4")[-1].strip() != ""
    assert page.live.c == {"love": 0.0, "calm": 0.0}
    assert steerers(page.live.model) == ()


@pytest.mark.parametrize(
    ("arguments", "c"),
    [(["-b", "nine.safetensors"], 0.0), (["-b", "nine.safetensors", "-c", 2], 2.0), (["-b", "three.safetensors"], 3.0)],
)
def test_a_classifier_and_where_its_sliders_begin(run, files, visit, port, arguments, c):
    import nets

    found = visit(None, ["1"], 0.0, api_name="/classes")
    scale = ["--mean", 0.5, "--std", 2]
    done = run("play", "-m", "nets:build", *arguments, "--image", "2x2", *scale, "--port", port)
    assert done.code == 0, done.err
    (plain, steered), page = found
    expected = nets.build()(torch.full((1, 4), -0.25)).double().softmax(1)[0].tolist()
    assert plain == steered
    assert {int(one["label"]): one["confidence"] for one in plain["confidences"]} == dict(enumerate(expected))
    assert page.live.c == {"nine": c}


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


def test_ctrl_c_ends_it_and_what_is_being_written(folder, files, port):
    process = launched(folder, "play", "-m", "llama", "-b", "bank.safetensors", "--port", str(port))
    url = process.stdout.readline().split()[0]
    (place,) = (own["id"] for own in httpx.get(f"{url}config").json()["dependencies"] if own["api_name"] == "plain")
    asked = {"data": ["I love", 100_000], "fn_index": place, "session_hash": "tab"}
    httpx.post(f"{url}gradio_api/queue/join", json=asked).raise_for_status()
    with httpx.stream("GET", f"{url}gradio_api/queue/data", params={"session_hash": "tab"}, timeout=WAIT) as tab:
        lines = tab.iter_lines()
        assert any("process_generating" in line for line in lines)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=WAIT)
    assert (process.returncode, out, err) == (130, "", "")
