"""What needs a CUDA device: skipped, and so not proved, where there is none."""

import copy

import pytest
import torch
from torch import nn

from actsteer import ProjectionAbove, Steerer, SteeringVector, collect
from tests.zoo import cnn, exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
V = SteeringVector({"1": torch.tensor([1.0, 2.0, 3.0, 4.0]), "3": torch.ones(4)})


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def on_cpu(c, **options):
    model, x = exact(), torch.arange(8.0, dtype=torch.float64).view(2, 4)
    with Steerer(model, V, c=c, **options):
        return model(x)


def on_gpu():
    return exact().cuda(), torch.arange(8.0, dtype=torch.float64).view(2, 4).cuda()


@pytest.mark.parametrize("backend", ["hook", "tap", "buffer", "fold"])
def test_vectors_from_the_cpu_steer_a_model_on_the_gpu(backend):
    model, x = on_gpu()
    v = V if backend != "fold" else SteeringVector({"2": V["1"]})
    cpu = exact()
    with Steerer(model, v, c=2, backend=backend), Steerer(cpu, v, c=2):
        assert torch.equal(model(x).cpu(), cpu(x.cpu()))


def test_rows_and_gates_on_the_gpu_decide_as_on_the_cpu():
    model, x = on_gpu()
    rows, gate = torch.tensor([0.0, 2.0]), ProjectionAbove(SteeringVector({"0": torch.ones(4)}), 0.0)
    for options in ({"c": rows}, {"c": rows.cuda()}, {"c": 2, "gate": gate}):
        with Steerer(model, V, **options):
            assert torch.equal(
                model(x).cpu(), on_cpu(**{k: v.cpu() if k == "c" and v is rows else v for k, v in options.items()})
            )


def test_a_model_that_moves_while_it_is_steered_stays_steered():
    model, x = exact(), torch.arange(8.0, dtype=torch.float64).view(2, 4)
    with Steerer(model, V, c=2):
        before = model(x)
        assert torch.equal(model.cuda()(x.cuda()).cpu(), before)


@pytest.mark.case(5)
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_cuda_graphs_replay_the_strength_that_is_in_the_buffer(mode):
    model, x = on_gpu()
    steerer = Steerer(model, V, c=0.0, backend="buffer").install()
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    with torch.no_grad():
        for _ in range(4):  # warm up, record, replay
            compiled(x)
        for c in (1.0, -2.0, 0.0, 3.0):
            steerer.c = c
            with steerer:
                assert torch.allclose(compiled(x).cpu(), on_cpu(c))
            assert torch.allclose(compiled(x).cpu(), exact()(x.cpu()))
    steerer.uninstall()


@pytest.mark.case(24)
def test_autocast_on_the_gpu_keeps_the_dtype_of_the_output():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).cuda(), torch.ones(2, 4, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16), Steerer(model, SteeringVector({"0": torch.ones(4)})):
        assert model(x).dtype is torch.bfloat16


def test_statistics_of_the_gpu_are_those_of_the_cpu():
    model, x = cnn(), torch.randn(6, 3, 4, 4, dtype=torch.float64)
    there = collect(copy.deepcopy(model).cuda(), x.cuda(), sites="0", covariance=True)
    here = collect(model, x, sites="0", covariance=True)
    assert torch.allclose(there["0"].mean.cpu(), here["0"].mean)
    assert torch.allclose(there["0"].covariance.cpu(), here["0"].covariance)
