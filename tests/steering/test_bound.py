"""What is bound once per shape must not outlive what it was bound for: checkpoints, passes, blocks, dtypes, classes."""

from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from actsteer import CosineAbove, GateError, ProjectionAbove, Steerer, SteeringVector, UnsupportedModelError

V = torch.arange(1.0, 5)
IDS, MASK = torch.ones(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [1, 1, 1]])
BACKENDS = pytest.mark.parametrize("backend", ["tap", "hook", "buffer"])


class Frozen(nn.Module):
    """What is steered asks for no gradient, and runs inside a checkpoint in training."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(9, 4).requires_grad_(False)
        self.low, self.high = nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4)

    def rest(self, h):
        return self.high(self.low(h).tanh()).tanh()

    def forward(self, input_ids, attention_mask=None):
        h = self.embed(input_ids)
        return checkpoint(self.rest, h, use_reentrant=False) if self.training else self.rest(h)


@BACKENDS
def test_what_ran_outside_of_a_checkpoint_is_looked_at_anew_inside_of_one(backend):
    model = Frozen().eval()
    with Steerer(model, SteeringVector({"low": V}), backend=backend):
        model(IDS, MASK)
        with pytest.raises(UnsupportedModelError, match="pads are not known any more"):
            model.train()(IDS, MASK)


@BACKENDS
def test_leaving_before_the_backward_pass_warns_after_a_plain_call_too(backend):
    model = Frozen().eval()
    steerer = Steerer(model, SteeringVector({"low": V}), backend=backend).attach()
    model(IDS)
    output = model.train()(IDS)
    with pytest.warns(UserWarning, match="a steered forward pass was checkpointed"):
        steerer.detach()
    output.sum().backward()


class Texts(nn.Module):
    """Two sites behind an embedding."""

    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Embedding(9, 4), nn.Identity(), nn.Identity()

    def forward(self, input_ids, attention_mask=None):
        return self.b(self.a(self.embed(input_ids)))


@BACKENDS
def test_a_strength_that_is_set_while_a_pass_runs_waits_for_the_next_where_it_has_positions(backend):
    model = Texts()
    plain, v = model(IDS), SteeringVector({"b": V})
    with Steerer(model, v, c=0.0, positions="last", strict=False, backend=backend) as steerer:
        handle = model.a.register_forward_hook(lambda *_: setattr(steerer, "c", 1.0))
        during = (model(IDS, MASK) - plain).abs().sum(-1).gt(0.5)
        handle.remove()
        moved = (model(IDS, MASK) - plain).abs().sum(-1).gt(0.5)
    assert moved.tolist() == [[False, False, True]] * 2
    assert not during[:, :-1].any()  # a buffer may be written into at any time
    assert backend == "buffer" or not during.any()


def test_a_gates_decision_does_not_outlive_its_block():
    model = nn.Sequential(nn.Identity(), nn.Identity())
    steerer = Steerer(
        model, SteeringVector({"1": V}), gate=ProjectionAbove(SteeringVector({"0": V}), 0.0), strict=False
    )
    x = torch.stack([V, -V])
    with steerer:
        model[0](x)
        assert torch.equal(model[1](torch.zeros(2, 4)), torch.stack([V, 0 * V]))
    with steerer, pytest.raises(GateError, match="runs before site '0'"):
        model[1](torch.zeros(2, 4))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@BACKENDS
def test_an_intervention_in_another_dtype_is_rounded_to_the_activations(backend, dtype):
    model = nn.Sequential(nn.Identity())
    wide = lambda h, v, c: h.double() + c * v.double()  # noqa: E731
    with Steerer(model, SteeringVector({"0": V}), intervention=wide, backend=backend):
        assert [model(torch.ones(1, 4, dtype=dtype)).dtype for _ in range(2)] == [dtype, dtype]


class Times(nn.Module):
    """Its forward is replaced while it is steered."""

    def forward(self, x):
        return x * 1


@BACKENDS
def test_a_forward_of_the_class_may_be_replaced_and_put_back(backend):
    model, x = nn.Sequential(Times()), torch.ones(1, 4)
    with Steerer(model, SteeringVector({"0": V}), backend=backend):
        with mock.patch.object(Times, "forward", lambda self, x: x * 100):
            assert torch.equal(model(x), 100 + V[None])
        assert torch.equal(model(x), 1 + V[None])


class Dropped(nn.Module):
    """Calls an in-place module and looks at what it was given."""

    def __init__(self, *, by_name):
        super().__init__()
        self.act, self.by_name = nn.ReLU(inplace=True), by_name

    def forward(self, x):
        x = x * 1
        _ = self.act(input=x) if self.by_name else self.act(x)
        return x


@BACKENDS
@pytest.mark.parametrize("by_name", [False, True])
def test_an_edit_of_what_an_in_place_module_gives_or_takes_is_seen_where_its_result_is_dropped(backend, by_name):
    model, x = Dropped(by_name=by_name), torch.tensor([[-5.0, -1.0, 1.0, 2.0]])
    with torch.no_grad():
        with Steerer(model, SteeringVector({"act": V}), backend=backend):
            assert torch.equal(model(x), x.relu() + V)
        if not by_name:
            with Steerer(model, SteeringVector({"act:in": V}), backend=backend):
                assert torch.equal(model(x), (x + V).relu())


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_gate_per_token_reads_nested_activations():
    layers = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
    encoder, pads = nn.TransformerEncoder(layers, 1).eval(), torch.tensor([[False, False, True], [False] * 3])
    x, v = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(0)), SteeringVector({"layers.0": V})
    with torch.no_grad():
        plain = encoder(x, src_key_padding_mask=pads)
        fires = (plain @ V > 0) & ~pads
        with Steerer(encoder, v, gate=ProjectionAbove(v, 0.0, per="token")):
            steered = encoder(x, src_key_padding_mask=pads)
    torch.testing.assert_close(steered, plain + fires[..., None] * V)


@pytest.mark.parametrize("given", [[1.0], None, torch.tensor(1.0)], ids=["a list", "None", "a scalar"])
def test_what_a_gate_gives_is_looked_at(given):
    class Gate:
        site, per = "0", "sequence"

        def __call__(self, rows):
            return given

    model = nn.Sequential(nn.Identity())
    steerer = Steerer(model, SteeringVector({"0": V}), gate=Gate(), strict=False)
    with steerer, pytest.raises(GateError, match="expected one weight for each of 1 rows, got"):
        model(torch.ones(1, 4))


@pytest.mark.parametrize("threshold", [1e-40, 1e-6, 0.5])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e37])
def test_a_prepared_cosine_decides_as_the_gate_does(threshold, size):
    rows = torch.randn(200, 4, generator=torch.Generator().manual_seed(0)) * size
    gate = CosineAbove(SteeringVector({"0": V}), threshold)
    assert torch.equal(gate.prepare(rows)(rows), gate(rows))
