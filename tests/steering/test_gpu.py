"""What needs a CUDA device: skipped, and so not proved, where there is none."""

import copy
import warnings
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from actsteer import Ablate, Add, ProjectionAbove, Steerer, SteeringVector
from tests.steering.test_no_waiting import WAYS, Model
from tests.steering.test_no_waiting import V as W
from tests.zoo import exact

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
EMPTY = "ignore:The CUDA Graph is empty"  # torch's first one is, on purpose
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


@contextmanager
def no_waiting():
    """A block in which waiting for the device is an error."""
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # it says that it does not see all of it
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


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
@pytest.mark.filterwarnings(EMPTY)
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
    assert counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.case(24)
def test_autocast_on_the_gpu_keeps_the_dtype_of_the_output():
    model, x = nn.Sequential(nn.Linear(4, 4), nn.ReLU()).cuda(), torch.ones(2, 4, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16), Steerer(model, SteeringVector({"0": torch.ones(4)})):
        assert model(x).dtype is torch.bfloat16


@torch.no_grad()
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.filterwarnings("ignore:positions=.generated.")
def test_a_steered_pass_never_waits_for_the_gpu_and_computes_what_the_cpu_does(way):
    torch.manual_seed(0)
    here = Model().double()
    there, ids = copy.deepcopy(here).cuda(), torch.tensor([[1, 2, 3, 4, 0], [0, 0, 1, 1, 2], [4, 4, 2, 3, 1]])
    inputs = {"input_ids": ids, "attention_mask": torch.tensor([[1] * 5, [1] * 5, [0, 0, 1, 1, 1]])}
    moved = {name: value.cuda() for name, value in inputs.items()}
    with Steerer(here, W, **way), Steerer(there, W, **way):
        there(**moved)  # brings to the device what lies on the CPU
        with no_waiting():
            found = there(**moved)
        torch.testing.assert_close(found.cpu(), here(**inputs))


def test_a_question_to_the_gpu_is_noticed():
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones((), device="cuda").item()


@pytest.mark.parametrize("intervention", [Add(), Ablate(), Add(relative=True)], ids=repr)
def test_a_graph_that_is_captured_by_hand_replays_the_strength_that_is_in_the_buffer(intervention):
    model, x = on_gpu()
    steerer = Steerer(model, V, c=0.0, backend="buffer", intervention=intervention).install()
    graph = torch.cuda.CUDAGraph()
    with torch.no_grad(), steerer:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            model(x)
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            out = model(x)
        for c in (1.0, -2.0, 0.0, 3.0):
            steerer.c = c
            graph.replay()
            torch.testing.assert_close(out.cpu(), on_cpu(c, intervention=intervention))
    steerer.uninstall()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_half_precision_model_stays_one(dtype):
    model, x = on_gpu()
    model, x = model.to(dtype), x.to(dtype)
    with Steerer(model, V, c=2):
        steered = model(x)
    assert steered.dtype is dtype
    torch.testing.assert_close(steered.double().cpu(), on_cpu(2.0), rtol=2e-2, atol=0.5)
