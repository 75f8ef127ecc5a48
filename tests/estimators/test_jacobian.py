"""discover(method="jacobian"): the singular vectors of the Jacobian, without its rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from actsteer import PositionsError, ShapeError, StatisticsError, Steerer, UnsupportedModelError, discover
from actsteer.estimators.jacobian import strongest
from tests.oracles import state

LENGTHS = torch.tensor([4, 2, 3])


class Attends(nn.Module):
    """site -> attention -> target, with a mask of pads; nonlinear, in float64."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.site, self.target = nn.Identity(), nn.Identity()
            self.qkv, self.out = nn.Linear(6, 18), nn.Linear(6, 5)
        self.double()

    def forward(self, x, attention_mask):
        q, k, v = self.qkv(self.site(x)).chunk(3, dim=-1)
        seen = attention_mask.bool()[:, None, :]
        return self.target(nn.functional.silu(self.out(nn.functional.scaled_dot_product_attention(q, k, v, seen))))


def batch():
    x = torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {"x": x, "attention_mask": (torch.arange(4) < LENGTHS[:, None]).long()}


def found(model=None, data=None, **options):
    options = {"site": "site", "target": "target", "norm": 2.0, "method": "jacobian", "progress": False} | options
    generator = torch.Generator().manual_seed(0)
    return discover(model or Attends(), [batch()] if data is None else data, generator=generator, **options)


def whole_jacobian(model, added, counted):
    """d target / d v at v = 0, a row for each number of the target that counts."""
    given = batch()

    def target(v):
        x = given["x"] + added[..., None] * v
        return model(x, given["attention_mask"])[counted].flatten()

    return torch.autograd.functional.jacobian(target, torch.zeros(6, dtype=torch.float64))


REAL = torch.arange(4) < LENGTHS[:, None]
LAST = torch.arange(4) == LENGTHS[:, None] - 1


@pytest.mark.parametrize(
    ("options", "added", "counted"),
    [
        ({}, REAL, REAL),
        ({"positions": "last"}, LAST, REAL),
        ({"target_positions": "last"}, REAL, LAST),
        ({"positions": 0, "target_positions": LAST}, REAL & (torch.arange(4) == 0), LAST),
        ({"positions": slice(0, 2), "target_positions": [0, -1]}, REAL & (torch.arange(4) < 2), None),
    ],
    ids=["all", "added last", "counted last", "first and a mask", "slice and list"],
)
def test_they_are_the_singular_vectors_of_the_whole_jacobian(options, added, counted):
    counted = LAST | (torch.arange(4) == 0) if counted is None else counted
    _, sizes, right = torch.linalg.svd(whole_jacobian(Attends(), added, counted), full_matrices=False)
    bank = found(count=3, **options)
    for concept, size, row in zip(bank.concepts, sizes, right, strict=False):
        v = bank[concept]["site"]
        torch.testing.assert_close(v * torch.sign(v @ row), 2 * row, rtol=0, atol=1e-9)
        gain = float(bank[concept].metadata["gain"])
        assert gain == pytest.approx(float(size) / int(counted.sum()) ** 0.5, rel=1e-9)


def test_it_does_not_matter_how_the_rows_are_cut_into_batches():
    parts = [{name: own[rows] for name, own in batch().items()} for rows in ([0], [1, 2])]
    whole, cut = found(count=2), found(count=2, data=parts)
    for concept in whole.concepts:
        torch.testing.assert_close(cut[concept]["site"], whole[concept]["site"], rtol=0, atol=1e-9)


@given(st.integers(0, 2**16), st.integers(1, 3), st.integers(1, 12), st.sampled_from([1.0, 0.1, 1e-3]))
def test_of_few_steps_none_is_better_than_the_best_and_all_are_orthonormal(seed, count, steps, decay):
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(9, 7, generator=generator, dtype=torch.float64) * decay ** torch.arange(7)
    matrix = root.T @ root
    vectors, values = strongest(lambda rows: rows @ matrix, 7, count=count, steps=steps, generator=generator)
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(count).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close((vectors @ matrix @ vectors.T).diagonal(), values, rtol=0, atol=1e-10 * float(values[0]))
    best = torch.linalg.eigvalsh(matrix).flip(0)[:count]
    assert bool((values <= best + 1e-12 * best[0]).all())
    if steps * count >= 7:
        torch.testing.assert_close(values, best, rtol=0, atol=1e-10 * float(best[0]))


def test_what_the_target_does_not_see_is_not_found():
    """In float32, where what lies in no row of a matrix of rank 2 moves the target by rounding alone."""
    flat = network(nn.Linear(16, 2))
    x = torch.randn(64, 16, generator=torch.Generator().manual_seed(0))
    bank = found(flat, x, site="0", target="1", count=2, norm=1.0)
    right = torch.linalg.svd(flat[1].weight.detach())[2][:2]
    spanned = torch.stack([bank[concept]["0"] for concept in bank.concepts])
    torch.testing.assert_close((spanned @ right.T).abs(), torch.eye(2), rtol=0, atol=1e-3)


def test_a_small_direction_moves_the_target_by_its_gain():
    v, data, model = found(norm=1e-4)["0"], batch(), Attends()
    plain = model(**data)
    with Steerer(model, v), torch.no_grad():
        change = (model(**data) - plain)[REAL].square().sum(dim=-1).mean().sqrt()
    assert float(change) == pytest.approx(1e-4 * float(v.metadata["gain"]), rel=1e-3)


def test_the_model_is_left_as_it_was():
    model = Attends().train()
    before = state(model)
    found(model)
    assert state(model) == before and all(parameter.grad is None for parameter in model.parameters())


def network(*layers):
    return nn.Sequential(nn.Identity(), *layers)


class Padded(Attends):
    def forward(self, x, padding_mask):
        return super().forward(x, padding_mask)


@pytest.mark.parametrize("target_positions", ["all", "last"])
def test_where_pads_cannot_be_told_they_are_not_guessed(target_positions):
    x, mask = batch().values()
    with pytest.raises(ShapeError, match=r"'padding_mask', .*may say which tokens are pads"):
        found(Padded(), [{"x": x, "padding_mask": mask}], target_positions=target_positions)


class Cut(nn.Module):
    def forward(self, x):
        with torch.no_grad():
            return 2 * x


class Opaque(torch.autograd.Function):
    """A kernel that has gradients, and no forward derivative."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Kernel(nn.Module):
    def forward(self, x):
        return Opaque.apply(x)


@pytest.mark.parametrize(
    ("layer", "message"),
    [(Cut(), "by forward derivatives and 0 by gradients"), (Kernel(), "no forward derivative")],
    ids=["no gradients", "no forward derivative"],
)
def test_a_model_that_cannot_be_differentiated_both_ways_is_refused(layer, message):
    model, x = network(layer), torch.ones(4, 3)
    with pytest.raises(UnsupportedModelError, match=message):
        found(model, x, site="0", target="1")
    assert torch.equal(model(x), 2 * x)


def test_what_cannot_be_is_refused():
    flat, x = network(nn.Linear(3, 2)), torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    with pytest.raises(StatisticsError, match="in direction 2"):
        found(flat, x, site="0", target="1", count=3)
    with pytest.raises(StatisticsError, match="in direction 0"):
        found(flat, x, site="1", target="0")
    with pytest.raises(ValueError, match="lr: nothing is trained"):
        found(lr=0.1)
    with pytest.raises(ValueError, match="method: expected one of 'trained', 'jacobian', got 'svd'"):
        found(method="svd")
    for word in ("mean", "generated"):
        for name in ("positions", "target_positions"):
            with pytest.raises(ValueError, match=f"positions: '{word}' is for"):
                found(**{name: word})


@pytest.mark.parametrize("method", ["trained", "jacobian"])
def test_positions_that_cannot_be_told_are_refused(method):
    flat, x = network(nn.Linear(3, 2)), torch.ones(4, 3)
    for name in ("positions", "target_positions"):
        with pytest.raises((ShapeError, PositionsError), match="positions"):
            found(flat, x, site="0", target="1", method=method, **{name: "last"})


def test_training_looks_at_the_same_positions():
    options = {"positions": "last", "target_positions": "last", "norm": 1e-3}
    trained = found(method="trained", **options)["0"]
    assert abs(float(trained.cosine(found(**options)["0"]))) > 0.999


@pytest.mark.slow
def test_in_a_language_model_the_gain_is_that_of_small_differences():
    from reference.language.model import load

    model, tokenizer = load()
    data = dict(tokenizer(["The sea is wide and", "I like"], return_tensors="pt", padding=True))
    v = found(model, [data], site="model.layers.6", target="model.layers.20", norm=1e-2, steps=4)["0"]
    seen = []
    handle = model.model.layers[20].register_forward_hook(lambda module, args, output: seen.append(output))
    with torch.no_grad():
        model(**data)
        with Steerer(model, v):
            model(**data)
    handle.remove()
    change = (seen[1] - seen[0])[data["attention_mask"].bool()].square().sum(dim=-1).mean().sqrt()
    assert float(change) == pytest.approx(1e-2 * float(v.metadata["gain"]), rel=0.02)
