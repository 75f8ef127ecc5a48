"""Nothing in a steered pass waits for the device: on one that computes nothing, asking for a number is an error."""

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from actsteer import (
    Ablate,
    Add,
    Affine,
    And,
    Clamp,
    CosineAbove,
    LowRank,
    Not,
    ProbeAbove,
    ProjectionAbove,
    Replace,
    Rotate,
    Soft,
    Steerer,
    SteeringVector,
)
from tests.zoo import normal

SITE = "blocks.1"
V = SteeringVector({SITE: normal(8)})
FIRST = SteeringVector({"blocks.0": normal(8, seed=3)})
IDS = torch.ones(3, 5, dtype=torch.long, device="meta")
WAYS = {
    "add": {},
    "rows": {"c": torch.ones(3)},
    "rows and positions": {"c": torch.ones(3, 5)},
    "schedule": {"c": lambda step: 2.0},
    "step": {"gate": ProjectionAbove(V, 0.0)},
    "step at an earlier site": {"gate": CosineAbove(FIRST, 0.0)},
    "step per token": {"gate": ProjectionAbove(V, 0.0, per="token")},
    "probe": {"gate": ProbeAbove(V, offset=0.0)},
    "soft": {"gate": Soft(ProjectionAbove(V, 0.0), width=1.0)},
    "and": {"gate": And(ProjectionAbove(V, 0.0, per="token"), Not(CosineAbove(FIRST, 0.0)))},
    "prompt": {"positions": "prompt"},
    "first": {"positions": 0},
    "slice": {"positions": slice(-3, None)},
    "mask": {"positions": torch.ones(3, 5, dtype=torch.bool)},
    "relative": {"intervention": Add(relative=True)},
    "ablate": {"intervention": Ablate(), "gate": ProjectionAbove(V, 0.0), "positions": slice(1, None)},
    "clamp": {"intervention": Clamp(1.0), "positions": "generated"},
    "rotate": {"intervention": Rotate(0.5)},
    "rows of indices": {"positions": [[0], [1], [2]]},
    "integers": {"positions": torch.ones(3, 5, dtype=torch.long)},
    "clamp rows": {"intervention": Clamp(1.0), "c": torch.ones(3)},
    "rotate in a plane": {"intervention": Rotate(0.5, plane=FIRST[FIRST.sites[0]])},
}


class Model(nn.Module):
    """Two blocks on tokens, which asks nothing itself."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 8)
        self.blocks = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)])

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        for block in self.blocks:
            h = block(h)
        return h


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore:positions=.generated.")
def test_no_number_is_asked_for(way, masked):
    model = Model().double().to("meta")
    inputs = {"input_ids": IDS} | ({"attention_mask": torch.ones_like(IDS)} if masked else {})
    with Steerer(model, V, **way):
        steered = model(**inputs)
    assert steered.is_meta and steered.shape == (3, 5, 8) and steered.dtype is torch.float64


class Sent(TorchDispatchMode):
    """Notes what is copied from the CPU to another device, which the CPU waits for unless it is told not to."""

    def __init__(self):
        super().__init__()
        self.waited_for = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        if function is torch.ops.aten._to_copy.default and args[0].device != made.device:
            self.waited_for += [] if kwargs.get("non_blocking") else [tuple(made.shape)]
        return made


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore:positions=.generated.")
def test_what_lies_on_the_cpu_is_brought_to_the_device_once_or_without_waiting(way, masked):
    model = Model().double().to("meta")
    inputs = {"input_ids": IDS} | ({"attention_mask": torch.ones_like(IDS)} if masked else {})
    with Steerer(model, V, **way):
        model(**inputs)
        with Sent() as sent:
            model(**inputs)
    assert sent.waited_for == []


EDITS = {
    "vector": V,
    "part": SteeringVector({f"{SITE}[2:6]": normal(4)}),
    "replace": Replace({SITE: normal(8)}),
    "replace all": Replace({SITE: normal(3, 5, 8)}),
    "replace a part": Replace({f"{SITE}[2:6]": normal(4)}),
    "affine": Affine({SITE: (normal(8, 8), normal(8))}),
    "low rank": LowRank({SITE: (normal(2, 8), normal(2, 8), normal(2))}),
}
AMOUNTS = {
    "number": {"c": 0.5},
    "rows": {"c": torch.rand(3)},
    "positions": {"c": 0.5, "positions": "prompt"},
    "gate": {"gate": Soft(ProjectionAbove(FIRST, 0.0), width=1.0)},
}


@torch.no_grad()
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("amount", AMOUNTS.values(), ids=AMOUNTS)
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_no_edit_waits_for_what_it_sends(edit, amount, masked):
    model = Model().double().to("meta")
    inputs = {"input_ids": IDS} | ({"attention_mask": torch.ones_like(IDS)} if masked else {})
    with Steerer(model, edit, **amount), Sent() as sent:
        model(**inputs)  # which binds all anew, as each new shape does
        model(**inputs)
    assert sent.waited_for == []


@torch.no_grad()
def test_what_is_sent_each_time_is_noticed():
    with Sent() as sent:
        torch.ones(2).to("meta")
        torch.ones(3).to("meta", non_blocking=True)
    assert sent.waited_for == [(2,)]


@torch.no_grad()
def test_no_number_is_asked_for_by_an_edit():
    model = nn.Sequential(nn.Identity())
    edit = LowRank({"0": (normal(2, 8), normal(2, 8), normal(2))})
    with Steerer(model, edit, positions="last"):
        assert model(torch.ones(3, 5, 8, device="meta")).shape == (3, 5, 8)


def test_a_device_that_computes_nothing_notices_a_question():
    with pytest.raises(RuntimeError, match="meta"):
        bool(torch.ones((), device="meta"))
