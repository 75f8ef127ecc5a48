"""choose_sites: the sites, attention heads among them, at which data that was held out is told apart best."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from torch import nn

from actsteer import (
    LogisticDirection,
    ModelMismatchError,
    StatisticsError,
    Steerer,
    SteeringVector,
    choose_sites,
    find_sites,
    fit,
    record,
)
from tests.oracles import state
from tests.strategies import eighths
from tests.zoo import normal

HEADS, SIZE, CARRIES = 4, 3, 2


class Attention(nn.Module):
    """Causal attention over (rows, tokens, 8); head 2 alone is given the first feature, which tells the sides apart."""

    def __init__(self):
        super().__init__()
        width = HEADS * SIZE
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(8, width, bias=False) for _ in range(3))
        self.o_proj = nn.Linear(width, 2)
        with torch.no_grad():
            for projection in (self.q_proj, self.k_proj, self.v_proj):
                own = projection.weight[CARRIES * SIZE : (CARRIES + 1) * SIZE, 0].clone()
                projection.weight[:, 0] = 0
                projection.weight[CARRIES * SIZE : (CARRIES + 1) * SIZE, 0] = own

    def forward(self, x):
        q, k, v = (
            own(x).unflatten(-1, (HEADS, SIZE)).transpose(1, 2) for own in (self.q_proj, self.k_proj, self.v_proj)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = nn.ModuleDict({"self_attn": Attention()}).double().eval()
    found.config = SimpleNamespace(num_attention_heads=HEADS, head_dim=SIZE)
    found.forward = found.self_attn.__call__
    return found


def side(sign, rows, seed):
    x = normal(rows, 4, 8, seed=seed)
    x[..., 0] = sign * (1 + x[..., 0].abs())
    return x


SITES = "self_attn.o_proj:in[head=*]"
TRAIN = {"positive": side(1, 60, 1), "negative": side(-1, 60, 2)}
HELD_OUT = {"positive": side(1, 40, 3), "negative": side(-1, 40, 4)}


@pytest.mark.parametrize("estimator", [None, LogisticDirection(streamed=True)], ids=["means", "probe"])
def test_the_head_that_carries_the_concept_is_found(estimator):
    network = model()
    before = state(network)
    v = fit(network, **TRAIN, sites=SITES, positions="last", estimator=estimator, concept="sign")
    assert v.sites == tuple(f"self_attn.o_proj:in[{i}:{i + 3}]" for i in range(0, 12, 3))
    chosen = choose_sites(network, v, **HELD_OUT, count=1, positions="last")
    assert chosen.sites == (f"self_attn.o_proj:in[{CARRIES * SIZE}:{(CARRIES + 1) * SIZE}]",)
    assert float(chosen.metadata[f"accuracy {chosen.sites[0]}"]) > 0.9
    assert chosen.concept == "sign"
    assert torch.equal(chosen[chosen.sites[0]], v[chosen.sites[0]])
    assert state(network) == before
    with Steerer(network, chosen, c=1.0):
        assert not torch.equal(network(HELD_OUT["negative"]), model()(HELD_OUT["negative"]))


@pytest.mark.parametrize("batch_size", [7, 256])
def test_the_accuracy_is_that_of_the_best_threshold(batch_size):
    network = model()
    v = fit(network, **TRAIN, sites=SITES, positions="last")
    chosen = choose_sites(network, v, **HELD_OUT, count=4, positions="last", batch_size=batch_size)
    rows = {word: record(network, x, sites=SITES, positions="last") for word, x in HELD_OUT.items()}
    assert chosen.sites == v.sites == find_sites(network, SITES)
    for site in v:
        high, low = (rows[word][site] @ v[site].double() for word in ("positive", "negative"))
        best = max(((high > t).double().mean() + (low <= t).double().mean()).item() / 2 for t in [*high, *low])
        assert float(chosen.metadata[f"accuracy {site}"]) == pytest.approx(best, abs=1e-4)


@given(eighths(6, 3), eighths(5, 3), eighths(3))
def test_accuracies_rank_the_sites(positive, negative, direction):
    network = nn.Sequential(nn.Identity()).double()
    v = SteeringVector({f"0[{i}:{i + 1}]": direction[i : i + 1] for i in range(3)})
    every, some = (choose_sites(network, v, positive=positive, negative=negative, count=n) for n in (3, 2))
    accuracy = [float(every.metadata[f"accuracy {site}"]) for site in v]
    assert all(0.5 <= own <= 1 for own in accuracy)
    left = [own for site, own in zip(v, accuracy, strict=True) if site not in some]
    assert left == [min(accuracy)]


def test_bad_input_is_refused():
    network, x = nn.Sequential(nn.Identity()), torch.ones(2, 3)
    v = fit(network, positive=x, negative=-x, sites="0")
    for count in (0, 2, 1.0):
        with pytest.raises(ValueError, match=f"count: expected from 1 to the number of sites, 1, got {count}"):
            choose_sites(network, v, positive=x, negative=-x, count=count)
    with pytest.raises(StatisticsError, match=r"site '0': expected rows of finite activations on the negative side"):
        choose_sites(network, v, positive=x, negative=x / 0, count=1)
    with pytest.raises(ModelMismatchError):
        choose_sites(nn.Sequential(nn.Linear(3, 3)), v, positive=x, negative=-x, count=1)


def test_the_axis_is_the_vectors():
    network, x = nn.Sequential(nn.Identity()).double(), normal(4, 3, 5)
    v = fit(network, positive=x + 1, negative=x - 1, sites="0[1:2]", axis=1)
    chosen = choose_sites(network, v, positive=x + 1, negative=x - 1, count=1)
    assert chosen.metadata["axis 0[1:2]"] == "1"
    rows = [(x + sign)[:, 1].flatten() for sign in (1, -1)]
    best = max(((rows[0] > t).double().mean() + (rows[1] <= t).double().mean()).item() / 2 for t in torch.cat(rows))
    assert float(chosen.metadata["accuracy 0[1:2]"]) == pytest.approx(best, abs=1e-4)
