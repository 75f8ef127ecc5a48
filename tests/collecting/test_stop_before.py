"""A pass ends before the user's own modules that lie behind the last site, whatever they do."""

import pytest
import torch
from torch import nn

from actsteer import collect

CALLS = []
X = torch.zeros(3, 2)


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        CALLS.append(x.shape)
        return x


class Raises(nn.Module):
    def forward(self, x):
        raise AssertionError("it ran")


class Fails(nn.Module):
    def forward(self, x):
        pytest.fail("it ran")


class Net(nn.Module):
    def __init__(self, last):
        super().__init__()
        self.first, self.last = nn.Linear(2, 2), last

    def forward(self, x):
        h = torch.relu(self.first(x))
        return self.last(h)


class Language(nn.Module):
    """A decoder as people write them by hand, with a loop over its layers and a head."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(9, 4), nn.Linear(4, 9)
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True) for _ in range(3))

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        for layer in self.layers:
            h = layer(h)
        return self.head(h)


@pytest.mark.parametrize("last", [Counts, Raises, Fails])
def test_a_module_behind_the_site_does_not_run(last):
    CALLS.clear()
    for model, site in ((nn.Sequential(nn.Linear(2, 2), last()), "0"), (Net(last()), "first")):
        assert collect(model, X, sites=site, progress=False)[site].count == 3
    assert not CALLS


def test_neither_do_a_hand_written_decoders_later_layers_nor_its_head():
    ran, model = [], Language()
    model.layers[2].register_forward_hook(lambda *_: ran.append("layer"))
    model.head.register_forward_hook(lambda *_: ran.append("head"))
    batch = {"input_ids": torch.zeros(2, 3, dtype=torch.long), "attention_mask": torch.ones(2, 3)}
    assert collect(model, [batch], sites="layers.1", progress=False)["layers.1"].count == 6
    assert not ran
