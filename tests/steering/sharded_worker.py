"""What each of two processes checks on a sharded model; `python sharded_worker.py RANK STORE RESULTS`.

Every check builds a model of its own, shards it, and compares with the whole model, which each process has too. The
numbers are small integers and eighths, so that sums over processes are exact in any order.
"""

from __future__ import annotations

import itertools
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel

from actsteer import (
    ActsteerError,
    ProjectionAbove,
    Steerer,
    SteeringVector,
    collect,
    find_sites,
    fit,
    fold,
    optimize,
    record,
)

CHECKS: dict[str, Callable[[], None]] = {}
WIDE = torch.tensor([1.0, -2.0, 0.5, 4.0, 0.0, -1.0, 2.0, 0.25], dtype=torch.float64)
NARROW = torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float64)


class Block(nn.Module):
    """(B, S, 4) -> (B, S, 4) by way of 8 hidden features: up, act, down, and a norm after the residual sum."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4)
        self.norm = nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.down(self.act(self.up(x))))


@dataclass(frozen=True)
class Ablate:
    """h - c (h · u) u, which needs all the features of a row."""

    def __call__(self, activation: Tensor, direction: Tensor, c: Tensor) -> Tensor:
        unit = direction / direction.norm()
        return activation - c * (activation @ unit)[..., None] * unit


class Chain(Block):
    """Without the residual sum, whose two terms would have to be sharded alike."""

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.down(self.act(self.up(x))))


def chain() -> Block:
    return block(Chain)


def block(kind: type[Block] = Block) -> Block:
    model = kind().double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith("norm"):
                parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=generator))
    return model


def inputs(rows: int = 3, positions: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(-8, 9, (rows, positions, 4), generator=generator).double() / 8


def mesh() -> DeviceMesh:
    return init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))


def ddp() -> nn.Module:
    return DistributedDataParallel(block())


def fsdp() -> nn.Module:
    model = block()
    for layer in (model.up, model.down):
        fully_shard(layer, mesh=mesh())
    return fully_shard(model, mesh=mesh())


def fsdp_first_version() -> nn.Module:
    """Its class wraps modules, and adds a prefix to their names."""
    model = block()
    wrapped = {"device_id": torch.device("cpu"), "use_orig_params": True}
    model.up, model.down = (FullyShardedDataParallel(layer, **wrapped) for layer in (model.up, model.down))
    return FullyShardedDataParallel(model, **wrapped)


def fsdp_at_the_root() -> nn.Module:
    return fully_shard(block(), mesh=mesh())


def parallel(build: Callable[[], nn.Module] = block, **plan: object) -> Callable[[], nn.Module]:
    return lambda: parallelize_module(build(), mesh(), plan)


local = parallel(up=ColwiseParallel(), down=RowwiseParallel())
dtensor = parallel(up=ColwiseParallel(use_local_output=False), down=RowwiseParallel())
gathered = parallel(up=ColwiseParallel(output_layouts=Replicate()), down=RowwiseParallel(input_layouts=Replicate()))
row_to_dtensor = parallel(
    chain, up=ColwiseParallel(), down=RowwiseParallel(use_local_output=False), norm=SequenceParallel()
)
_scatter = {"up": ColwiseParallel(), "down": RowwiseParallel(output_layouts=Shard(1))}
row_scattered = parallel(chain, **_scatter)
sequence = parallel(chain, **_scatter, norm=SequenceParallel())
sequence_local = parallel(chain, **_scatter, norm=SequenceParallel(use_local_output=True))


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def same(build: Callable[[], nn.Module], whole_model: Callable[[], nn.Module], site: str, kind: str) -> None:
    """The sharded model steered is the whole one steered, or this process's part of it, and nothing is left behind."""
    direction = SITES[site]
    v, x, options = SteeringVector({site: direction}), inputs(), KINDS[kind](whole_model, site)
    model, reference = build(), whole_model()
    with Steerer(reference, v, **options), torch.no_grad():
        wanted = reference(x)
    with torch.no_grad():
        plain = whole(model(x))
        with Steerer(model, v, **options):
            steered = whole(model(x))
        after = whole(model(x))
        assert not torch.allclose(wanted, reference(x))
    torch.testing.assert_close(steered, own_part(wanted, steered.shape), rtol=1e-12, atol=1e-12)
    assert torch.equal(after, plain)


def own_part(value: Tensor, shape: torch.Size) -> Tensor:
    """What this process has of a value of which the other has the rest."""
    for axis in range(value.ndim):
        if value.shape[axis] == 2 * shape[axis]:
            return value.chunk(2, dim=axis)[dist.get_rank()]
    return value


def each(sites: Iterable[str], attempt: Callable[[str], None]) -> None:
    """All sites are tried, and all failures told; a process that stopped early would keep the other one waiting."""
    failed = {}
    for site in sites:
        try:
            attempt(site)
        except Exception as error:
            failed[site] = f"{type(error).__name__}: {str(error)[:300]}"
    assert not failed, failed


def or_refused(attempt: Callable[[], object]) -> None:
    """What cannot be right is refused by the library, and by both processes."""
    said = ""
    try:
        attempt()
    except ActsteerError as error:
        said = str(error)
    except AssertionError as error:
        said = f"wrong: {str(error)[:200]}"
    everywhere: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everywhere, said)
    assert len({bool(other) for other in everywhere}) == 1, everywhere
    assert not any(other.startswith("wrong") for other in everywhere), everywhere
    if said:  # of collecting, a failure is final for the group
        rank = dist.get_rank()
        dist.destroy_process_group()
        join(rank)


def join(rank: int) -> None:
    """A new group of both processes."""
    dist.init_process_group(
        "gloo", init_method=f"file://{STORE}.{next(GROUPS)}", rank=rank, world_size=2, timeout=timedelta(seconds=20)
    )


def refused(action: Callable[[], object], message: str) -> None:
    """An error of the library's own with this in its message; the other process is not left waiting."""
    said = None
    try:
        action()
    except ActsteerError as error:
        said = str(error)
    assert said is not None, "nothing was raised"
    assert message in said, f"expected {message!r} in {said}"


STORE = ""
GROUPS = itertools.count()
SITES = {"up": WIDE, "act": WIDE, "down": NARROW, "norm": NARROW, "down:in": WIDE, "up:in": NARROW}
PLAIN = ["up", "down", "norm", "down:in", "up:in"]
WAYS = {
    "ddp": (ddp, block, SITES),
    "fsdp": (fsdp, block, SITES),
    "fsdp_at_the_root": (fsdp_at_the_root, block, SITES),
    "fsdp_first_version": (fsdp_first_version, block, SITES),
    "column_and_row": (local, block, PLAIN),
    "column_to_dtensor": (dtensor, block, SITES),
    "column_gathered": (gathered, block, SITES),
    "row_to_dtensor": (row_to_dtensor, chain, ["up", "down", "norm"]),
    "row_scattered_by_positions": (row_scattered, chain, ["up", "down", "norm"]),
    "sequence_parallel": (sequence, chain, ["down", "norm"]),
    "sequence_parallel_local": (sequence_local, chain, ["down", "norm"]),
}
WHOLE_ROWS = {"row_scattered_by_positions": ["up", "down"]}  # its norm is an ordinary module, which cannot know
SCATTERED = {  # plain tensors that are a part of the positions, and do not say so
    "row_scattered_by_positions": ["down"],
    "sequence_parallel": ["down"],
    "sequence_parallel_local": ["down", "norm"],
}


def gated(reference: Callable[[], nn.Module], site: str) -> dict[str, object]:
    """A gate that some of the rows pass, and some do not."""
    direction = SITES[site]
    rows = record(reference(), [inputs()], sites=site, progress=False)[site].reshape(3, 4, -1).mean(dim=1)
    low, high = (rows @ (direction / direction.norm())).sort().values[:2]
    assert high > low
    return {"gate": ProjectionAbove(SteeringVector({site: direction}), float(low + high) / 2)}


KINDS: dict[str, Callable[[Callable[[], nn.Module], str], dict[str, object]]] = {
    "one_number": lambda reference, site: {"c": 1.5},
    "rows": lambda reference, site: {"c": torch.tensor([1.0, 0.0, -2.0])},
    "gate": gated,
    "ablation": lambda reference, site: {"intervention": Ablate()},
}


def _add(way: str, kind: str) -> None:
    build, reference, sites = WAYS[way]

    def attempt(site: str) -> None:
        if kind == "gate" and site in SCATTERED.get(way, ()):
            or_refused(lambda: same(build, reference, site, kind))
        else:
            same(build, reference, site, kind)

    tried = WHOLE_ROWS.get(way, sites) if kind == "gate" else sites
    CHECKS[f"{way}_{kind}"] = lambda: each(tried, attempt)


def _add_collecting(way: str) -> None:
    build, reference, sites = WAYS[way]

    def compare(site: str) -> None:
        expected = collect(reference(), [inputs()], sites=site, covariance=True, progress=False)[site]
        seen = collect(build(), [inputs()], sites=site, covariance=True, progress=False)[site]
        assert seen.count == expected.count
        torch.testing.assert_close(seen.mean, expected.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(seen.covariance, expected.covariance, rtol=1e-9, atol=1e-9)
        rows = record(build(), [inputs()], sites=site, progress=False)[site]
        truth = record(reference(), [inputs()], sites=site, progress=False)[site]
        torch.testing.assert_close(rows, truth, rtol=1e-12, atol=1e-12)

    def attempt(site: str) -> None:
        if site in SCATTERED.get(way, ()):
            or_refused(lambda: compare(site))
        else:
            compare(site)

    CHECKS[f"{way}_collect"] = lambda: each(WHOLE_ROWS.get(way, sites), attempt)


def _add_gradients(way: str) -> None:
    build, reference, sites = WAYS[way]

    def compare(site: str) -> None:
        expected = _gradients(reference, site)
        for name, gradient in _gradients(build, site).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-9, atol=1e-9, msg=lambda m, n=name: n + m)

    CHECKS[f"{way}_gradients"] = lambda: each(sites, compare)


def _gradients(build: Callable[[], nn.Module], site: str) -> dict[str, Tensor]:
    model, x = build(), inputs().requires_grad_()
    with Steerer(model, SteeringVector({site: SITES[site]}), c=0.5):
        whole(model(x)).square().sum().backward()
    found = {name: whole(parameter.grad) for name, parameter in model.named_parameters()}
    return found | {"x": x.grad}


for _way in WAYS:
    for _kind in KINDS:
        _add(_way, _kind)
    _add_collecting(_way)
for _way in ("fsdp", "column_and_row", "column_to_dtensor", "column_gathered"):
    _add_gradients(_way)


# --- data parallel ---------------------------------------------------------------------------------------------------
@check
def ddp_names() -> None:
    model = ddp()
    assert find_sites(model, lambda *_: True) == find_sites(block(), lambda *_: True)
    v = SteeringVector({"module.up": WIDE})
    with Steerer(model, v), torch.no_grad():
        steered = model(inputs())
    with Steerer(reference := block(), SteeringVector({"up": WIDE})), torch.no_grad():
        assert torch.equal(steered, reference(inputs()))


@check
def names_of_the_fully_sharded() -> None:
    for build in (fsdp, fsdp_at_the_root, fsdp_first_version):
        assert find_sites(build(), lambda *_: True) == find_sites(block(), lambda *_: True)
    v = SteeringVector({"_fsdp_wrapped_module.up._fsdp_wrapped_module": WIDE})
    with Steerer(fsdp_first_version(), v) as steerer, torch.no_grad():
        steered = steerer.model(inputs())
    with Steerer(reference := block(), SteeringVector({"up": WIDE})), torch.no_grad():
        assert torch.equal(steered, reference(inputs()))


@check
def ddp_gradients() -> None:
    """Each process has half of the rows; the gradients are those of all rows in one process."""
    x = inputs(rows=4)
    rank = dist.get_rank()
    v, model, reference = SteeringVector({"up": WIDE, "down": NARROW}), ddp(), block()
    with Steerer(reference, v, c=0.5):
        (reference(x).square().sum() / 2).backward()
    with Steerer(model, v, c=0.5):
        model(x[2 * rank : 2 * rank + 2]).square().sum().backward()
    for own, other in zip(model.module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-9, atol=1e-9)


@check
def ddp_direction_gradients() -> None:
    gradients = []
    for model in (ddp(), block()):
        with Steerer(model, SteeringVector({"up": WIDE}), c=0.5) as steerer:
            direction = steerer.requires_grad_()["up"]
            model(inputs()).square().sum().backward()
        gradients.append(direction.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-12, atol=1e-12)
    assert gradients[0].abs().sum() > 0


# --- the rest of the library -----------------------------------------------------------------------------------------
@check
def fsdp_optimize() -> None:
    def loss(output: Tensor) -> Tensor:
        return (whole(output) - 1).square().mean()

    options = {"sites": "down", "loss": loss, "lr": 0.25, "steps": 3, "progress": False}
    expected = optimize(block(), [inputs()], **options)["down"]
    torch.testing.assert_close(optimize(fsdp(), [inputs()], **options)["down"], expected, rtol=1e-9, atol=1e-9)
    assert expected.abs().sum() > 0


@check
def tensor_parallel_fit() -> None:
    options = {"positive": [inputs()], "negative": [inputs().flip(0) / 2 - 1], "sites": ["up", "down"]}
    expected = fit(block(), **options, progress=False)
    for build in (local, dtensor, fsdp):
        assert fit(build(), **options, progress=False).allclose(expected)


# --- refusals --------------------------------------------------------------------------------------------------------
@check
def between_column_and_row_parallel_no_process_has_all_features() -> None:
    """The activation function between them runs on half of the features in each process, and nothing says so."""
    model = local()

    def steer() -> None:
        with Steerer(model, SteeringVector({"act": WIDE})), torch.no_grad():
            model(inputs())

    refused(steer, "site 'act': the activation has 4 features")


@check
def parts_of_the_features_are_those_of_the_whole_or_refused() -> None:
    parts = {f"{site}[1:3]": direction[1:3] for site, direction in SITES.items()}
    for build in (ddp, fsdp, fsdp_at_the_root, fsdp_first_version):
        model, reference, x, v = build(), block(), inputs(), SteeringVector(parts)
        with Steerer(reference, v), Steerer(model, v), torch.no_grad():
            torch.testing.assert_close(model(x), reference(x), rtol=1e-12, atol=1e-12)
        kept, wanted = (record(own, [x], sites=list(parts), progress=False) for own in (model, reference))
        for site in parts:
            torch.testing.assert_close(kept[site], wanted[site], rtol=1e-12, atol=1e-12)
    for build in (local, dtensor, gathered):
        refused(lambda: Steerer(build(), SteeringVector({"act[1:3]": WIDE[1:3]})), "under tensor parallelism")  # noqa: B023


@check
def features_scattered_after_the_sum_are_refused() -> None:
    """A row-parallel layer may be told to leave each process a part of its features."""
    model = parallel(chain, up=ColwiseParallel(), down=RowwiseParallel(output_layouts=Shard(-1)))().down

    def steer() -> None:
        with Steerer(nn.Sequential(model), SteeringVector({"0": NARROW})), torch.no_grad():
            model(torch.ones(3, 4, 4, dtype=torch.float64))

    refused(steer, "2 features")


@check
def a_column_parallel_embedding_is_refused_or_whole() -> None:
    tokens, v = torch.tensor([[0, 1, 2]]), SteeringVector({"0": NARROW})

    def build() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Embedding(5, 4), nn.Identity()).double()

    def steer() -> None:
        with Steerer(reference := build(), v), torch.no_grad():
            wanted = reference(tokens)
        with Steerer(model := parallelize_module(build(), mesh(), {"0": ColwiseParallel()}), v), torch.no_grad():
            torch.testing.assert_close(steered := whole(model(tokens)), own_part(wanted, steered.shape))

    def gather() -> None:
        expected = collect(build(), [tokens], sites="0", progress=False)
        model = parallelize_module(build(), mesh(), {"0": ColwiseParallel()})
        torch.testing.assert_close(collect(model, [tokens], sites="0", progress=False)["0"].mean, expected["0"].mean)

    or_refused(steer)
    or_refused(gather)


@check
def tensor_parallel_after_something_was_compiled() -> None:
    """A patch would run before the sum over processes; a hook runs after it, or the edit is refused."""
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(1))
    for site in PLAIN:
        or_refused(lambda: same(local, block, site, "one_number"))  # noqa: B023
    torch._dynamo.reset()


@check
def captured_hidden_states_do_not_put_the_edit_before_the_sum() -> None:
    """transformers' own hook on a row-parallel layer: the edit comes after tensor parallelism's, all the same."""
    model = local()

    def output_capturing_hook(module: nn.Module, args: object, output: Tensor) -> None:
        assert output.shape == (3, 4, 4)

    model.down.register_forward_hook(output_capturing_hook)
    same(lambda: model, block, "down", "one_number")


@check
def fold_and_patch_are_refused() -> None:
    for build in (local, dtensor, fsdp, fsdp_at_the_root):
        v = SteeringVector({"up": WIDE})
        refused(lambda: Steerer(build(), v, backend="fold"), "its parameters are sharded")  # noqa: B023
        refused(lambda: Steerer(build(), v, backend="tap"), "its parameters are sharded")  # noqa: B023


@check
def a_fold_into_sharded_weights_is_refused() -> None:
    x = torch.ones(3, 4, 4, dtype=torch.float64)
    for build in (local, fsdp, fsdp_at_the_root, fsdp_first_version):
        model = build()
        model(x)  # after which FSDP may keep whole parameters for a while
        refused(lambda: fold(model, SteeringVector({"up": WIDE}), verify_on=x, inplace=True), "are sharded")  # noqa: B023


def main(rank: int, store: str, results: str) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", module="torch.*")
    global STORE
    STORE = store
    join(rank)
    said = {}
    for name, function in CHECKS.items():
        try:
            function()
            said[name] = ""
        except Exception:
            said[name] = traceback.format_exc(limit=-4)
    Path(f"{results}.{rank}").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
