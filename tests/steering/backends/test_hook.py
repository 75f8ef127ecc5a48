"""The hook backend: the default in eager mode, and what it cannot reach."""

import pytest
import torch
from torch import Tensor, nn

from actsteer import Steerer, SteeringNotApplied, SteeringVector
from tests.oracles import state
from tests.zoo import exact

X = torch.tensor([[1.0, -0.5, 0.25, 2.0], [0.0, 1.0, -1.0, 0.5]], dtype=torch.float64)
D = torch.tensor([1.0, -2.0, 0.5, 4.0], dtype=torch.float64)
V = SteeringVector({"1": D})


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("site", ["1", "1:in"])
def test_a_hook_is_registered_on_entering_and_removed_on_leaving(site):
    model = exact()
    before = state(model)
    with Steerer(model, SteeringVector({site: D}), backend="hook"):
        assert len(model[1]._forward_hooks) + len(model[1]._forward_pre_hooks) == 1
        model(X)
    assert state(model) == before


def test_a_hook_runs_after_the_users_own_and_before_those_that_come_later():
    model, seen = exact(), []
    model[1].register_forward_hook(lambda module, args, output: seen.append(output))
    with Steerer(model, V, c=2, backend="hook"):
        late = model[1].register_forward_hook(lambda module, args, output: seen.append(output))
        model(X)
        late.remove()
    assert torch.equal(seen[1], seen[0] + 2 * D)


class Direct(nn.Module):
    """Calls its site by `forward` alone."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return self.site.forward(x)


@pytest.mark.case(17)
@pytest.mark.parametrize("backend", ["auto", "hook"])
def test_a_site_whose_forward_is_called_alone_raises(backend):
    model = Direct()
    steerer = Steerer(model, SteeringVector({"site": D}), backend=backend)
    with pytest.raises(SteeringNotApplied, match=r"\{'site': 'Identity'\}.*called by its forward\(\) alone"), steerer:
        model(X)


@pytest.mark.case(17)
def test_a_root_whose_forward_is_called_alone_is_steered_or_raises():
    model = exact()
    steered = None
    try:
        with Steerer(model, SteeringVector({"": D}), backend="hook"):
            steered = model.forward(X)
    except SteeringNotApplied as error:
        assert "Sequential" in str(error)  # noqa: PT017
    else:
        assert torch.equal(steered, model(X) + D)
