"""An edit as an affine map: thin where the edit is, right where it is not, and linear in the number of sites."""

import pytest
import torch
from torch import nn

from actsteer import (
    Ablate,
    Add,
    Affine,
    Chain,
    Clamp,
    KeepNorm,
    LowRank,
    NotFoldable,
    Replace,
    Steerer,
    SteeringVector,
    VectorBank,
    fold,
)
from actsteer.folding.affine import affine_maps, same_projections
from tests.zoo import normal

D = 80


def vector(seed=1, d=D):
    return SteeringVector({"0": normal(d, seed=seed)})


def low_rank(r):
    return LowRank({"0": (normal(r, D, seed=2), normal(r, D, seed=3), normal(r, seed=4))})


def doubled(activation, direction, c):
    """What a user may write: two reads of the activation, neither of which says so."""
    read = torch.stack([activation[..., 0], activation @ direction], dim=-1)
    return activation + c * (read @ read.new_tensor([[1.0] * D, [2.0] * D])) + direction


BANK = VectorBank({str(seed): vector(seed) for seed in range(20)})
EDITS = {  # vectors or an edit, c, intervention -> the rank of M - 1
    "Add": (vector(), 2.0, None, 0),
    "Add in a Chain": (vector(), 2.0, Chain(Add(), Add()), 0),
    "Ablate": (vector(), 1.0, Ablate(), 1),
    "a tenth ablated": (vector(), 0.1, Ablate(), 1),
    "Ablate at 0": (vector(), 0.0, Ablate(), 0),
    "Ablate around": (vector(), 1.0, Ablate(around={"0": normal(D, seed=5)}), 1),
    "Clamp": (vector(), 1.0, Clamp(1e6), 1),
    "Chain": (vector(), 0.5, Chain(Ablate(), Add(), Clamp(3.0)), 1),
    "LowRank": (low_rank(3), 0.5, None, 3),
    "many concepts": (BANK, 1.0, Ablate(), 20),
    "two kinds": (BANK.select("1", "2", "3"), 1.0, {"1": Ablate(), "2": Clamp(2.0)}, 2),
    "a function": (vector(), 0.5, doubled, 1),
    "Affine": (Affine({"0": (normal(D, D, seed=6), normal(D, seed=7))}), 0.5, None, D),
    "Replace": (Replace({"0": normal(D, seed=8)}), 1.0, None, D),
}


def maps_of(vectors, c, intervention, sites=("0",), model=None):
    steerer = Steerer(nn.Sequential(nn.Identity()) if model is None else model, vectors, intervention=intervention)
    return affine_maps(steerer.edits, [torch.tensor(c, dtype=torch.float64)] * len(steerer.bank))


@pytest.mark.parametrize("edit", EDITS)
def test_it_has_the_rank_of_the_edit_and_gives_what_the_steerer_gives(edit):
    vectors, c, intervention, rank = EDITS[edit]
    found, rows = maps_of(vectors, c, intervention)["0"], normal(5, D, seed=9)
    assert found.adds.shape == (D, rank) and found.reads.shape == (rank, D)
    assert torch.allclose(found.adds.T @ found.adds, torch.eye(rank).double(), atol=1e-12)
    model = nn.Sequential(nn.Identity())
    with Steerer(model, vectors, c=c, intervention=intervention):
        assert torch.allclose(found(rows), model(rows), rtol=1e-9, atol=1e-9)
    assert found.is_identity == (edit == "Ablate at 0") and found.mixes == (rank > 0)


@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 63, 64, 65, 300])
def test_of_any_width(d):
    found, rows = maps_of(vector(d=d), 1.0, Ablate())["0"], normal(5, d, seed=9)
    assert found.adds.shape == (d, 1) and found.is_projection
    assert torch.allclose(found(rows) @ vector(d=d)["0"], torch.zeros(5).double(), atol=1e-12)
    weight = normal(d, 7, seed=10)
    matrix = torch.eye(d).double() + found.adds @ found.reads
    assert torch.allclose(found.after(weight, axis=0), matrix @ weight)
    assert torch.allclose(found.after(weight.T, axis=1), weight.T @ matrix.T)
    assert torch.allclose(found.before(weight.T, axis=1), weight.T @ matrix)
    assert torch.allclose(found.before(weight, axis=0), matrix.T @ weight)


@pytest.mark.parametrize(
    "intervention",
    [KeepNorm(Add()), Add(relative=True), Ablate(one_sided=True), lambda h, v, c: h / 0, lambda h, v, c: h + h.abs()],
)
def test_what_is_not_affine_is_refused(intervention):
    with pytest.raises(NotFoldable, match="is not an affine map of the activation"):
        maps_of(vector(), 1.0, intervention)


def test_no_more_rows_than_the_identity_has_are_edited_and_never_all_at_once():
    edited = []

    def counted(activation, direction, c):
        edited.append(len(activation))
        return Ablate()(activation, direction, c)

    d = 2000
    maps_of(vector(d=d), 1.0, counted)
    assert sum(edited) < d + 100 and max(edited) < d / 4


# --- several sites -----------------------------------------------------------------------------------------------
def test_the_same_projections_are_found_whatever_else_there_is():
    first, last = torch.eye(D).double()[[0, -1]]
    directions = [first, last, first - last, normal(D), *torch.eye(D).double()[1:6]]
    names = [str(index) for index in range(3 * len(directions))]
    v = SteeringVector({name: directions[int(name) % len(directions)] for name in names})
    model = nn.Sequential(*(nn.Identity() for _ in names))
    found = same_projections(maps_of(v, 1.0, Ablate(), model=model))
    for name in names:
        assert found[name] == {other for other in names if int(other) % len(directions) == int(name) % len(directions)}
    for options in ((0.5, Ablate()), (1.0, Clamp(1.0)), (1.0, None)):  # no projections
        maps = maps_of(v, *options, model=model)
        assert same_projections(maps) == {name: {name} for name in names}


def test_sites_of_several_widths_have_nothing_in_common():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    v = SteeringVector({"0": torch.ones(4).double(), "1": torch.ones(5).double()})
    assert same_projections(maps_of(v, 1.0, Ablate(), model=model)) == {"0": {"0"}, "1": {"1"}}


class Stream(nn.Module):
    """A residual stream with a site at each of its states; it counts how often it runs, its copies too."""

    ran = 0

    def __init__(self, blocks):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(blocks))
        self.states = nn.ModuleList(nn.Identity() for _ in range(blocks + 1))

    def forward(self, x):
        Stream.ran += 1
        h = self.states[0](self.embed(x))
        for block, state in zip(self.blocks, self.states[1:], strict=True):
            h = state(h + block(torch.tanh(h)))
        return self.head(torch.tanh(h))


@pytest.mark.parametrize("blocks", [2, 6])
def test_how_often_the_model_runs_does_not_depend_on_how_many_sites_there_are(blocks):
    """Once to trace, four times plain and hooked, and for two proofs: every site goes by its likeliest way."""
    model, x, before = Stream(blocks), normal(5, 3).float(), Stream.ran
    v = SteeringVector({f"states.{index}": normal(8).float() for index in range(blocks + 1)})
    folded = fold(model, v, intervention=Ablate(), verify_on=x)
    assert Stream.ran - before == 7
    with Steerer(model, v, intervention=Ablate()):
        assert torch.allclose(folded(x), model(x), atol=1e-5)
