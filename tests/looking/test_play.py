"""The page as a browser has it: through Gradio's client, from a real server on a free port."""

import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from actsteer import ShapeError, SiteNotFoundError, Steerer, SteeringVector, UnsupportedModelError, steerers
from actsteer.looking import play as module
from actsteer.looking.play import play
from tests.oracles import state
from tests.zoo import llama

pytest.importorskip("gradio")
import httpx
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from PIL import Image

ENDLESS = 100_000  # tokens, of which none of these tests waits for the last
WAIT = 20.0  # seconds after which a test that hangs fails
SITES = ["model.layers.0", "model.layers.1"]


@pytest.fixture
def page(model, bank, letters, port):
    with play(model, bank, tokenizer=letters, c=0.0, port=port) as page:
        yield page
    assert steerers(model) == ()
    assert state(model) == state(llama(vocab_size=35, eos_token_id=None))


def visitor(page):
    return Client(page.url, verbose=False)


def until(law):
    end = time.monotonic() + WAIT
    while not law() and time.monotonic() < end:
        time.sleep(0.01)
    assert law()


def begun(visitor, page, *c):
    """An answer without end, and what steers it."""
    before = steerers(page.live.model)
    job = visitor.submit("sea", ENDLESS, SITES, "", *c, api_name="/steered")
    until(lambda: len(steerers(page.live.model)) > len(before) and job.outputs())
    (steerer,) = set(steerers(page.live.model)) - set(before)
    return job, steerer


def alone(letters, bank, prompt, length, **steering):
    """What `generate` writes of a model that nobody else has."""
    model, ids = llama(vocab_size=35, eos_token_id=None), torch.tensor([letters(prompt)["input_ids"]])
    with Steerer(model, bank, **({"c": 0.0} | steering)):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length)
    return letters.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


# --- text --------------------------------------------------------------------------------------------------------
def test_people_at_once_and_one_who_stops(page, letters, bank):
    where = {"sites": SITES[:1], "positions": "prompt"}
    expected = [
        alone(letters, bank, "the sea", 40),
        alone(letters, bank, "the sea", 40, c={"love": 2.0}, **where),
        alone(letters, bank, "a quiet day", 40, c={"love": -1.0, "calm": 1.0}, positions=slice(1, 4)),
    ]
    assert len(set(expected)) == 3
    one, two, three = (visitor(page) for _ in range(3))
    stopped, _ = begun(three, page, 1.0, 0.0)
    jobs = [
        one.submit("the sea", 40, api_name="/plain"),
        one.submit("the sea", 40, SITES[:1], "prompt", 2.0, 0.0, api_name="/steered"),
        two.submit("a quiet day", 40, SITES, "1:4", -1.0, 1.0, api_name="/steered"),
    ]
    assert [job.result(WAIT) for job in jobs] == expected
    assert all(text.startswith(part) for job, text in zip(jobs, expected, strict=True) for part in job.outputs())
    assert len(steerers(page.live.model)) == 1
    stopped.cancel()
    until(lambda: not steerers(page.live.model))
    assert three.predict("the sea", 40, SITES[:1], "prompt", 2.0, 0.0, api_name="/steered") == expected[1]


def test_a_slider_that_moves_steers_this_persons_answer_that_is_being_written(page):
    one, two = visitor(page), visitor(page)
    (first, mine), (second, other) = begun(one, page, 0.0, 0.0), begun(two, page, 1.0, 0.0)
    one.predict(2.0, -1.0, api_name="/strengths")
    assert dict(mine.c) == {"love": 2.0, "calm": -1.0} and dict(other.c) == {"love": 1.0, "calm": 0.0}
    first.cancel()
    until(lambda: steerers(page.live.model) == (other,))
    one.predict(1.0, 1.0, api_name="/strengths")  # nothing is written
    assert dict(mine.c) == {"love": 2.0, "calm": -1.0} and dict(other.c) == {"love": 1.0, "calm": 0.0}
    second.cancel()
    until(lambda: not steerers(page.live.model))


def test_a_tab_that_is_closed_ends_its_answers(page):
    (place,) = (own["id"] for own in visitor(page).config["dependencies"] if own["api_name"] == "steered")
    asked = {"data": ["sea", ENDLESS, SITES, "", 1.0, 0.0], "fn_index": place, "session_hash": "tab"}
    httpx.post(f"{page.url}gradio_api/queue/join", json=asked).raise_for_status()
    with httpx.stream("GET", f"{page.url}gradio_api/queue/data", params={"session_hash": "tab"}) as tab:
        assert "process_starts" in next(line for line in tab.iter_lines() if line and "estimation" not in line)
        until(lambda: len(steerers(page.live.model)) == 1)
    until(lambda: not steerers(page.live.model))


def test_to_close_the_page_ends_what_is_being_written(page):
    _, steerer = begun(visitor(page), page, 1.0, 0.0)
    page.close()
    assert not steerer.attached
    assert state(page.live.model) == state(llama(vocab_size=35, eos_token_id=None))
    with pytest.raises(httpx.ConnectError):
        httpx.get(page.url)
    page.wait()  # no longer
    page.close()


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        (["sea", 3, [], "", 0.0, 0.0], "no sites were named"),
        (["sea", 3, SITES, "here", 0.0, 0.0], "expected all, last, prompt"),
        (["", 3, SITES, "", 0.0, 0.0], "has no tokens"),
    ],
)
def test_what_cannot_be_done_is_said(page, asked, why):
    one = visitor(page)
    with pytest.raises(AppError, match=why):
        one.predict(*asked, api_name="/steered")
    assert steerers(page.live.model) == ()
    assert len(one.predict("sea", 3, SITES, "", 0.0, 0.0, api_name="/steered")) == 3


# --- images ------------------------------------------------------------------------------------------------------
def classifier():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()


V = SteeringVector({"0": torch.ones(4), "1": torch.tensor([1.0, -2.0, 3.0, 0.5])}, concept="nine")


def test_classes_of_what_is_drawn_with_and_without_the_steering(tmp_path, port):
    model, grey = classifier(), [0, 51, 102, 255, 204, 255]
    Image.frombytes("L", (3, 2), bytes(grey)).save(tmp_path / "drawn.png")
    drawn = {"background": None, "layers": [], "composite": handle_file(str(tmp_path / "drawn.png"))}
    ink, paper = torch.tensor([[1 - own / 255 for own in grey]]), torch.zeros(1, 6)

    def shares(x):
        return dict(enumerate(model(x).double().softmax(1)[0].tolist()))

    with play(model, V, image=(2, 3), port=port) as page:
        people = [visitor(page) for _ in range(2)]
        for x, shown in ((ink, drawn), (paper, None)):
            with ThreadPoolExecutor(2) as pool:
                asked = [(shown, ["1"], 2.0), (shown, ["0", "1"], -1.0)]
                found = list(pool.map(lambda one, own: one.predict(*own, api_name="/classes"), people, asked))
            for (plain, steered), (_, sites, c) in zip(found, asked, strict=True):
                expected = [shares(x)]
                with Steerer(model, V, c=c, sites=sites):
                    expected.append(shares(x))
                for label, own in zip((plain, steered), expected, strict=True):
                    assert {int(one["label"]): one["confidence"] for one in label["confidences"]} == own
                    assert label["label"] == str(max(own, key=own.get))
    assert steerers(model) == ()


def test_a_slider_that_moves_attaches_nothing_anew(port, monkeypatch):
    model, attached = classifier(), []
    attach = Steerer.attach
    monkeypatch.setattr(Steerer, "attach", lambda self: attached.append(self.sites) or attach(self))
    with play(model, V, image=(2, 3), port=port) as page:
        person = visitor(page)
        for c in (1.0, -2.0, 3.0):
            person.predict(None, ["1"], c, api_name="/classes")
        assert attached == [("1",)]
        person.predict(None, ["0", "1"], 3.0, api_name="/classes")
        assert attached == [("1",), ("0", "1")]
        assert len(steerers(model)) == 1
    assert steerers(model) == ()


# --- before, and around ------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("v", "image", "kind"),
    [
        (SteeringVector({"9": torch.ones(4)}), (2, 3), SiteNotFoundError),
        (SteeringVector({"0": torch.ones(5)}), (2, 3), ShapeError),
        (V, (2, 2), UnsupportedModelError),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_served(monkeypatch, v, image, kind):
    monkeypatch.setattr(module, "Page", lambda *_, **__: pytest.fail("it is served"))
    with pytest.raises(kind):
        play(classifier(), v, image=image)


def test_the_page_fetches_nothing_from_elsewhere(page):
    html = httpx.get(page.url).text
    parts = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']([^\"']*)", html)
    assert parts and [part for part in parts if re.match(r"https?:|//", part)] == []
    theme = httpx.get(f"{page.url}theme.css").text
    assert "--body-text-color" in theme and re.findall(r"url\(.?(?:https?:|//)|@import", theme) == []


@pytest.mark.filterwarnings("ignore:unclosed .socket.socket:ResourceWarning")  # with which Gradio looks for ports
def test_a_port_that_is_taken_is_named(page, model, bank, letters, port):
    with pytest.raises(OSError, match=rf"127.0.0.1, port {port}: it cannot be served there; give another host or port"):
        play(model, bank, tokenizer=letters, port=port)


def test_without_gradio_the_extra_is_named(monkeypatch, model, bank, letters):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(ImportError, match=r"pip install 'actsteer\[play\]'"):
        play(model, bank, tokenizer=letters)
