"""Pages to look at: a tokenizer of words, models, and what a page holds."""

import json
from html.parser import HTMLParser

import torch
from torch import nn

from actsteer import Calibration, LowRank, ProjectionAbove, Steering, SteeringVector, VectorBank
from actsteer.looking.look import look
from tests.zoo import cnn, llama, mlp, normal

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)>&\"$x^{$"


class Words:
    """A tokenizer: "w3" is the token 3, which says "w3"; but "w35" says something hostile."""

    pad_token_id, eos_token_id = 2, None
    words = (*(f"w{number}" for number in range(35)), HOSTILE, "\n")

    def __call__(self, text):
        return {"input_ids": [36 if word == "\n" else int(word[1:]) for word in text.split(" ")]}

    def decode(self, ids, *, clean_up_tokenization_spaces):
        assert not clean_up_tokenization_spaces
        return "".join(("" if not place else " ") + self.words[own] for place, own in enumerate(ids))


class Page(HTMLParser):
    """What a browser would make of a page: its items, its numbers, its tags and what it refers to."""

    EMPTY = ("meta", "link", "input", "img", "br")

    def __init__(self, source):
        super().__init__()
        self.source, self.open, self.tags, self.items, self.references, self.text = source, [], [], [], [], ""
        self.scripts = []
        self.feed(source)
        self.close()
        assert self.open == []
        self.numbers = json.loads(self.scripts[0])

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.EMPTY:
            self.open.append(tag)
        if tag == "script":
            self.scripts.append("")
        if tag == "button" and "item" in dict(attrs)["class"].split():
            self.items.append(dict(attrs) | {"text": ""})
        self.references += [own for name, own in attrs if name in ("src", "href", "srcset", "action", "data")]

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            self.scripts[-1] += data
        elif self.open and self.open[-1] != "style":
            self.text += data
            if "button" in self.open:
                self.items[-1]["text"] += data


def shown(model, steering, **options):
    """The page of a look."""
    return Page(look(model, steering, **options, progress=False).html)


def texts_page():
    """Two texts, two concepts at two sites, one of them with a gate for each token."""
    v = SteeringVector({"model.layers.0": normal(16), "model.layers.1": normal(16, seed=2)})
    bank = VectorBank({"calm": v, HOSTILE: SteeringVector({"model.layers.1": normal(16, seed=3)})})
    gate = ProjectionAbove(bank[HOSTILE], 0.0, per="token")
    texts = ["w3 w4 \n w5 w6 w35 w7 w8", "w9 w10"]
    options = {"inputs": texts, "tokenizer": Words(), "c": 2.0, "gate": {HOSTILE: gate}, "max_new_tokens": 12}
    return look(llama(), bank, **options, progress=False).html


def rows_page():
    """One vector on an MLP."""
    v = SteeringVector({"5": normal(6)}, concept="nine")
    return look(mlp(), v, inputs=normal(9, 12), c=3.0, classes=["a", HOSTILE, "c"], progress=False).html


def images_page():
    """An edit of low rank in a convolutional network."""
    torch.manual_seed(0)
    edit = LowRank({"0": (normal(1, 4), normal(1, 4, seed=4), normal(1, seed=5))})
    return look(cnn(), edit, inputs=normal(5, 3, 4, 4), calibration=measured(), progress=False).html


def measured(*, site="2"):
    """A calibration of four points, of which the last is chosen."""
    points = [("0", 0.1, 0.2, True), ("0", 0.4, None, False), ("2", 0.1, -0.1, True), (site, 0.4, 0.5, True)]
    same = {"intervention": "Add(relative=False)", "positions": "all", "effect_interval": None, "cost_interval": None}
    table = [
        {"sites": (own,), "dose": dose, "c": 2 * dose, "effect": effect, "cost": dose**2, "feasible": feasible, **same}
        | {"costs": {"mean": (dose**2, None)}}
        for own, dose, effect, feasible in points
    ]
    return Calibration(
        best=Steering(SteeringVector({"2": torch.ones(4)}), c=0.8),
        table=table,
        chosen=table[-1],
        unsteered=0.0,
        unsteered_interval=None,
        controls=(0.1, 0.2),
        percentile=100.0,
        budget={"mean": 0.3},
        reported_on_choice=False,
    )


def identity(*sites):
    """A model that gives out what comes in."""
    return nn.Sequential(*(nn.Identity() for _ in sites or "0"))
