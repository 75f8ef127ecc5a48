"""The page as a browser has it: over HTTP, from a real server on a free port."""

import http.client
import json
import re
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

import actsteer.looking.play
from actsteer import Steerer, SteeringVector, steerers
from actsteer.looking.play import play
from tests.oracles import state
from tests.zoo import llama

ENDLESS = 100_000  # tokens, of which none of these tests waits for the last
WAIT = 20.0  # seconds after which a test that hangs fails
JSON = {"Content-Type": "application/json"}


@pytest.fixture
def page(model, bank, letters, capsys):
    with play(model, bank, tokenizer=letters, port=0) as page:
        yield page
    assert capsys.readouterr() == ("", "")
    assert steerers(model) == ()
    assert state(model) == state(llama(vocab_size=35, eos_token_id=None))


@contextmanager
def asked(page, path, body=None, method="POST", **headers):
    """The reply to a request, its lines not yet read."""
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=WAIT)
    connection.request(method, path, None if body is None else json.dumps(body), (JSON if body else {}) | headers)
    reply = connection.getresponse()
    try:
        yield reply
    finally:
        reply.close()
        connection.close()


def said(page, path, body):
    with asked(page, path, body) as reply:
        return [json.loads(line) for line in reply]


def until(law):
    end = time.monotonic() + WAIT
    while not law() and time.monotonic() < end:
        time.sleep(0.01)
    assert law()


def alone(letters, bank, prompt, length, **steering):
    model, ids = llama(vocab_size=35, eos_token_id=None), torch.tensor([letters(prompt)["input_ids"]])
    with Steerer(model, bank, **({"c": 0.0} | steering)):
        found = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length)
    return letters.decode(found[0, ids.shape[1] :], skip_special_tokens=True)


def test_two_people_at_once_and_one_who_leaves(page, letters, bank):
    bodies = [
        {"prompt": "the sea", "length": 30},
        {"prompt": "the sea", "length": 30, "c": {"love": 2.0}, "sites": ["model.layers.0"], "positions": "prompt"},
        {"prompt": "a quiet day", "length": 30, "c": {"love": -1.0, "calm": 1.0}, "positions": ""},
    ]
    where = {"sites": ["model.layers.0"], "positions": "prompt"}
    expected = [
        alone(letters, bank, "the sea", 30),
        alone(letters, bank, "the sea", 30, c={"love": 2.0}, **where),
        alone(letters, bank, "a quiet day", 30, c={"love": -1.0, "calm": 1.0}),
    ]
    with ThreadPoolExecutor(3) as pool:
        with asked(page, "/answer", {"prompt": "sea", "length": ENDLESS, "c": {"love": 3.0}}) as leaving:
            leaving.readline(), leaving.readline()
            assert len(page.running) == len(steerers(page.live.model)) == 1
            replies = [pool.submit(said, page, "/answer", body) for body in bodies]
            found = [reply.result(WAIT) for reply in replies]
            assert len(page.running) == 1
        until(lambda: not page.running)
    for lines, text in zip(found, expected, strict=True):
        assert [line["text"] for line in lines[1:-1]] == [text[:end] for end in range(1, 31)]
        assert lines[-1] == {"text": text, "done": True}
    assert steerers(page.live.model) == ()
    assert said(page, "/answer", bodies[1])[-1]["text"] == expected[1]


def test_a_slider_that_moves_steers_the_answer_that_is_being_made(page):
    body = {"prompt": "the sea", "length": ENDLESS, "c": {"love": 0.0, "calm": 0.0}}
    with asked(page, "/answer", body) as reply:
        name = json.loads(reply.readline())["name"]
        (steerer,) = steerers(page.live.model)
        assert said(page, "/strengths", {"name": name, "c": {"love": 4.0}}) == [{"found": True}]
        assert steerers(page.live.model) == (steerer,) and dict(steerer.c) == {"love": 4.0}
        assert "expected a finite number" in said(page, "/strengths", {"name": name, "c": {"love": 1e999}})[0]["error"]
        assert dict(steerer.c) == {"love": 4.0}
    until(lambda: not page.running)
    assert said(page, "/strengths", {"name": name, "c": {}}) == [{"found": False}]


def test_to_close_the_page_ends_what_is_being_written(model, bank, letters):
    page, decode = play(model, bank, tokenizer=letters, port=0), letters.decode

    def slow(ids, *, skip_special_tokens):
        time.sleep(0.5 * page.closing)  # an answer that is not over when the server is
        return decode(ids, skip_special_tokens=skip_special_tokens)

    letters.decode = slow
    with asked(page, "/answer", {"prompt": "sea", "length": ENDLESS, "c": {"love": 1.0}}) as reply:
        reply.readline(), reply.readline()
        assert len(steerers(model)) == 1
        page.close()
        assert steerers(model) == ()
        *_, last = (json.loads(line) for line in reply)
        assert last["done"] and len(last["text"]) < ENDLESS
    assert state(model) == state(llama(vocab_size=35, eos_token_id=None))
    with pytest.raises(ConnectionError), asked(page, "/setup", method="GET"):
        pass
    with pytest.raises(ConnectionError, match="the page is closed"), page.request():
        pass
    page.close()


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ({"prompt": "sea", "length": 3, "c": {"hate": 1.0}}, "hate"),
        ({"prompt": "sea", "length": 3, "c": {"love": "x"}}, "expected a number"),
        ({"prompt": "sea", "length": 3, "c": {}, "sites": []}, "no sites were named"),
        ({"prompt": "sea", "length": 3, "c": {}, "positions": "here"}, "expected all, last, prompt"),
        ({"prompt": "", "length": 3}, "has no tokens"),
        ({"prompt": "sea"}, "length"),
    ],
)
def test_what_cannot_be_done_is_said(page, body, why):
    assert why in said(page, "/answer", body)[-1]["error"]
    assert steerers(page.live.model) == ()
    assert len(said(page, "/answer", {"prompt": "sea", "length": 3})) == 5


def test_classes_with_and_without_the_steering():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3)).eval()
    v = SteeringVector({"0": torch.ones(4), "1": torch.tensor([1.0, -2.0, 3.0, 0.5])}, concept="nine")
    image = [0.0, 0.5, 1.0, 0.25, 0.75, 0.0]
    x = torch.tensor([image])
    with play(model, v, image=(2, 3), port=0) as page:
        (found,) = said(page, "/classes", {"image": image, "c": {"nine": 2.0}, "sites": ["1"]})
        assert found["plain"] == model(x).double().softmax(1)[0].tolist()
        with Steerer(model, v, c=2.0, sites="1"):
            assert found["steered"] == model(x).double().softmax(1)[0].tolist()
        assert "expected 2 x 3 pixels" in said(page, "/classes", {"image": [0.0], "c": {}})[0]["error"]
        with asked(page, "/setup", method="GET") as reply:
            assert json.loads(reply.read())["size"] == [2, 3]
    assert steerers(model) == ()


# --- for this page alone -----------------------------------------------------------------------------------------
def test_the_page_fetches_nothing_from_elsewhere(page):
    with asked(page, "/", method="GET") as reply:
        html, policy = reply.read().decode(), reply.getheader("Content-Security-Policy")
    assert policy.startswith("default-src 'none';") and "connect-src 'self'" in policy
    assert re.findall(r"https?:|//[a-z]+\.|@import|url\(|src=", html) == []
    assert re.findall(r'href="([^"]*)"', html) == ["data:,"]


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://elsewhere.example"}, 403),
        ({"Host": "elsewhere.example:80"}, 403),
        ({"Content-Type": "text/plain"}, 403),
        ({"Host": "localhost:9000", "Origin": "http://localhost:9000"}, 200),  # a tunnel
    ],
)
def test_no_other_site_can_ask_through_the_browser(page, headers, status):
    with asked(page, "/strengths", {"name": "", "c": {}}, **headers) as reply:
        assert reply.status == status
        reply.read()


@pytest.mark.parametrize(("method", "path"), [("GET", "/../live.py"), ("GET", "/x"), ("POST", "/x"), ("POST", "/")])
def test_there_is_nothing_else(page, method, path):
    with asked(page, path, {"a": 1}, method=method) as reply:
        assert reply.status == 404


def test_what_is_no_json_is_an_error_and_no_end(page):
    connection = http.client.HTTPConnection("127.0.0.1", page.port, timeout=WAIT)
    connection.request("POST", "/answer", b"{", JSON)
    assert "JSONDecodeError" in json.loads(connection.getresponse().read())["error"]
    connection.close()
    assert len(said(page, "/answer", {"prompt": "sea", "length": 3})) == 5


def test_a_port_that_is_taken_is_named(page, model, bank, letters):
    with pytest.raises(OSError, match=f"127.0.0.1, port {page.port}: Address already in use; give another"):
        play(model, bank, tokenizer=letters, port=page.port)


def test_the_page_is_a_file_of_the_package():
    assert Path(actsteer.looking.play.__file__).with_name("play.html").is_file()
