"""discover: directions that change a later site most."""

import pytest
import torch
from torch import nn

from actsteer import ShapeError, SiteNotFoundError, StatisticsError, Steerer, discover
from tests.oracles import state

X = torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


def network(*between):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(5, 6), *(between or (nn.Identity(),)), nn.Linear(6, 4), nn.Linear(4, 3))


def found(model=None, *, seed=0, **options):
    options = {"site": "1", "target": "3", "norm": 2.0, "steps": 300, "progress": False} | options
    return discover(model or network(), X, generator=torch.Generator().manual_seed(seed), **options)


def test_between_linear_layers_they_are_the_singular_vectors_of_what_lies_between():
    model = network()
    between = (model[3].weight @ model[2].weight).detach()
    expected = torch.linalg.svd(between)[2]
    bank = found(model, count=2)
    for concept, right in zip(bank.concepts, expected, strict=False):
        assert abs(float(bank[concept]["1"] @ right)) / 2.0 > 0.999


def test_they_have_the_norm_asked_for_and_are_orthogonal():
    gram = found(count=3, steps=30).gram()
    torch.testing.assert_close(gram, 4 * torch.eye(3).to(gram), rtol=1e-4, atol=1e-4)


def test_a_generator_makes_them_reproducible():
    one, other = (found(steps=20, count=2) for _ in range(2))
    assert all(one[concept].equal(other[concept]) for concept in one.concepts)


def test_the_first_changes_the_target_more_than_random_ones():
    model = network(nn.Softplus())
    v = discover(model, X, site="1", target="3", norm=1.0, steps=200, generator=torch.Generator().manual_seed(0))["0"]
    plain = model(X)

    def change(vector):
        with Steerer(model, vector), torch.no_grad():
            return float((model(X) - plain).square().sum())

    directions = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    assert all(change(type(v)({"1": d / d.norm()})) < change(v) for d in directions)


def test_the_model_is_left_as_it_was():
    model = network().train()
    before = state(model)
    found(model, steps=3)
    assert state(model) == before and all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_is_refused():
    with pytest.raises(ShapeError, match="6 features, got 7"):
        found(count=7)
    with pytest.raises(SiteNotFoundError, match="site"):
        found(site="*")
    with pytest.raises(StatisticsError, match="does not react"):
        found(site="3", target="1")
    for site, target in (("1", "1"), ("1[0:2]", "1"), ("1", "1:out"), ("1", "1[2:4]")):
        with pytest.raises(StatisticsError, match="is the site itself"):
            found(site=site, target=target)
    for bad in ({"norm": 0.0}, {"lr": -1.0}, {"count": 0}, {"steps": 0}):
        with pytest.raises(ValueError, match="expected"):
            found(**bad)


class Conversion:
    """As TransformerLens shows a hook point to its users: heads apart."""

    def convert(self, tensor):
        return tensor.unflatten(-1, (2, -1))

    def revert(self, tensor):
        return tensor.flatten(-2)


def test_a_target_is_read_as_its_users_see_it():
    model, plain = network(), found(target="2", steps=20)["0"]
    model[2].hook_conversion = Conversion()
    shown = found(model, target="2", steps=20)["0"]  # the sum of the squares is the same
    torch.testing.assert_close(shown["1"], plain["1"], rtol=1e-4, atol=1e-5)


class Ragged(nn.Module):
    """Gives its rows as a nested tensor of two rows, and nothing that is padded."""

    def forward(self, x):
        return torch.nested.as_nested_tensor([x[:5], x[5:]], layout=torch.jagged)


class RaggedTarget(nn.Module):
    def __init__(self):
        super().__init__()
        self.net, self.ragged = network(), Ragged()

    def forward(self, x):
        return self.ragged(self.net(x))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_target_counts_every_row_that_it_holds():
    plain = found(steps=20)["0"]
    nested = found(RaggedTarget(), site="net.1", target="ragged", steps=20)["0"]
    torch.testing.assert_close(nested["net.1"], plain["1"], rtol=1e-4, atol=1e-5)
