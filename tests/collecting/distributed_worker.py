"""What each of several processes checks of statistics; started by torchrun, as `distributed_worker.py RESULTS`.

Every check compares with the statistics of all rows, which each process collects by itself too.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import json
import re
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

from actsteer import (
    Centroids,
    ConceptErasure,
    DistributedError,
    LowRank,
    MeanDifference,
    PairedMap,
    SiteNotFoundError,
    Statistics,
    Steerer,
    WhitenedMeanDifference,
    collect,
    collect_differences,
    collect_joint,
    fit,
    one_by_one,
    record,
)

CHECKS: dict[str, Callable[[], None]] = {}
SITES = ["0", "2"]
rank, world = 0, 1


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 4), nn.LayerNorm(4)).double()


def data() -> Tensor:
    return torch.randn(24, 4, generator=torch.Generator().manual_seed(1)).double() * 3 + 5


def gather(network: nn.Module, rows: object, **options: object) -> Statistics:
    return collect(network, rows, **{"sites": SITES, "covariance": True, "progress": False} | options)


def truth(rows: Tensor | None = None) -> Statistics:
    return gather(model(), data() if rows is None else rows)


def same(seen: Statistics, expected: Statistics) -> None:
    assert seen.sites == expected.sites
    for site in expected.sites:
        assert seen[site].count == expected[site].count, (seen[site].count, expected[site].count)
        for name in ("mean", "scatter", "fourth"):
            wanted = getattr(expected[site], name)
            torch.testing.assert_close(getattr(seen[site], name), wanted, rtol=1e-12, atol=1e-12 * float(wanted.max()))


def failing(good: int, error: Exception) -> Iterator[Tensor]:
    yield from data()[: 3 * good].split(3)
    raise error


def fails(action: Callable[[], object], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=re.escape(message)):
        action()


# --- what comes together ---------------------------------------------------------------------------------------------
@check
def every_rank_has_the_statistics_of_all() -> None:
    same(gather(model(), data()[rank::world]).all_reduce(), truth())


@check
def all_ranks_have_them_bit_for_bit_alike() -> None:
    own = gather(model(), data()[rank::world]).all_reduce()["2"]
    for tensor in (own.mean, own.scatter):
        first = tensor.clone()
        dist.broadcast(first, src=0)
        assert torch.equal(first, tensor)


@check
def twice_reduced_is_once_reduced() -> None:
    same(gather(model(), data()[rank::world]).all_reduce().all_reduce(), truth())


@check
def reduced_and_saved_they_are_still_those_of_all() -> None:
    path = Path(tempfile.mkdtemp()) / "stats.safetensors"
    gather(model(), data()[rank::world]).all_reduce().save(path)
    same(Statistics.load(path), truth())


@check
def merged_after_a_reduction_they_count_as_rows_of_their_own() -> None:
    more = data() + 1
    seen = gather(model(), data()[rank::world]).all_reduce().merge(gather(model(), more))
    same(seen, truth(torch.cat([data(), more])))


@check
def means_alone_come_together_too() -> None:
    seen = gather(model(), data()[rank::world], covariance=False).all_reduce()
    assert seen["2"].count == 24
    torch.testing.assert_close(seen["2"].mean, truth()["2"].mean, rtol=1e-13, atol=1e-13)


@check
def variances_alone_come_together_too() -> None:
    seen = gather(model(), data()[rank::world], covariance="diagonal").all_reduce()
    torch.testing.assert_close(seen["2"].variance, truth()["2"].variance, rtol=1e-12, atol=1e-12)


@check
def shares_of_any_size() -> None:
    cuts = [0, 1, *[20 + i for i in range(world - 2)], 24]
    same(gather(model(), data()[cuts[rank] : cuts[rank + 1]]).all_reduce(), truth())


@check
def far_from_the_origin_nothing_is_lost() -> None:
    rows = 1e6 + 1e-3 * torch.randn(64, 4, generator=torch.Generator().manual_seed(rank)).double()
    every = [torch.empty_like(rows) for _ in range(world)]
    dist.all_gather(every, rows)
    exact = torch.cat(every)
    seen = collect(nn.Sequential(nn.Identity()), rows, sites="0", covariance=True, progress=False).all_reduce()["0"]
    torch.testing.assert_close(seen.covariance, torch.cov((exact - 1e6).T), rtol=1e-6, atol=0)


@check
def classes_that_one_rank_alone_has() -> None:
    labels = ["first" if index == 0 else f"of {index % world}" for index in range(24)]
    seen = gather(model(), data()[rank::world], by=labels[rank::world]).all_reduce()
    expected = gather(model(), data(), by=labels)
    assert set(seen) == set(expected)
    for label in expected:
        same(seen[label], expected[label])
    alone = Centroids()(expected)
    together = Centroids()(seen)
    assert all(together[concept].allclose(alone[concept]) for concept in alone)


@check
def pairs_come_together_whatever_share_each_has() -> None:
    cuts = [0, 0, *[20 + i for i in range(world - 2)], 24]  # rank 0 has nothing
    own, options = slice(cuts[rank], cuts[rank + 1]), {"sites": SITES, "progress": False}
    high, low = data(), data().flip(0) - 2
    for gathered in (collect_joint, collect_differences):
        same(gathered(model(), high[own], low[own], **options).all_reduce(), gathered(model(), high, low, **options))
    joint, whole = (
        collect_joint(model(), high[at], low[at], **options).all_reduce() for at in (own, slice(0, 24 * (rank == 0)))
    )
    for rank_of_edit in (None, 2):
        edits = [PairedMap(rank=rank_of_edit)(positive=stats, negative=stats) for stats in (joint, whole)]
        one, other = (edit.at("2")(high, high[0], torch.ones(()).double()) for edit in edits)
        torch.testing.assert_close(one, other)


@check
def estimators_on_all() -> None:
    high, low = data()[:12], data()[12:] - 2
    shares = [gather(model(), rows[rank::world]).all_reduce() for rows in (high, low)]
    whole = [truth(high), truth(low)]
    for estimator in (MeanDifference(), WhitenedMeanDifference()):
        mine = estimator(positive=shares[0], negative=shares[1])
        assert mine.allclose(estimator(positive=whole[0], negative=whole[1]), rtol=1e-9, atol=1e-9)
    mine, wanted = (ConceptErasure()(positive=a, negative=b) for a, b in (shares, whole))
    for ours, theirs in zip(mine["2"], wanted["2"], strict=True):
        torch.testing.assert_close(ours.abs(), theirs.abs(), rtol=1e-8, atol=1e-8)


@check
def a_group_of_some_ranks() -> None:
    alone, everyone = dist.new_group([0]), dist.new_group(list(range(world)))
    share = gather(model(), data()[rank::world])
    if rank == 0:
        same(share.all_reduce(group=alone), truth(data()[::world]))
    same(share.all_reduce(group=everyone), truth())


# --- models over several processes -----------------------------------------------------------------------------------
@check
def ddp_with_uneven_shares() -> None:
    network = DistributedDataParallel(model())
    rows = data()[:15] if rank == 0 else data()[15:] if rank == 1 else data()[:0]
    if len(rows):
        same(gather(network, rows, batch_size=4), truth(rows))
    seen = gather(network, rows, batch_size=4) if len(rows) else truth(data()[:1])
    if world == 2:
        same(seen.all_reduce(), truth())


@check
def fully_sharded() -> None:
    network = model()
    for layer in (network[0], network[2]):
        fully_shard(layer)
    fully_shard(network)
    same(gather(network, data()[rank::world]).all_reduce(), truth())


@check
def tensor_parallel_ranks_count_once() -> None:
    mesh = init_device_mesh("cpu", (world,))
    network = parallelize_module(model(), mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    seen = gather(network, data())
    same(seen.all_reduce(), truth())
    same(seen.all_reduce().all_reduce(), truth())
    v = fit(network, positive=data(), negative=-data(), sites="2", progress=False)
    assert v.allclose(fit(model(), positive=data(), negative=-data(), sites="2", progress=False))


@check
def sites_are_fitted_one_by_one_from_shares() -> None:
    network, rows, labels = model(), data(), (data()[:, 0] > 5).long()

    def erased(site: str, which: slice) -> LowRank:
        seen = collect(network, rows[which], by=labels[which], sites=site, covariance=True, progress=False)
        return ConceptErasure().classes(seen if which == slice(None) else seen.all_reduce())

    shared, alone = (
        one_by_one(network, rows[:2], sites=["0", "1", "2"], fitted=functools.partial(erased, which=which))
        for which in (slice(rank, None, world), slice(None))
    )
    with Steerer(network, shared):
        seen = gather(network, rows)
    with Steerer(network, alone):
        same(seen, gather(network, rows))


@check
def data_parallel_times_tensor_parallel() -> None:
    if world != 4:
        return
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    network = parallelize_module(model(), mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
    for layer in (network[0], network[2]):
        fully_shard(layer, mesh=mesh["dp"])
    fully_shard(network, mesh=mesh["dp"])
    same(gather(network, data()[mesh["dp"].get_local_rank() :: 2]).all_reduce(), truth())


# --- shares of nothing -----------------------------------------------------------------------------------------------
@check
def an_empty_share_is_a_share_of_nothing() -> None:
    for kept in (True, "diagonal", False):
        rows = data()[:0] if rank == 1 else data()[rank - (rank > 1) :: world - 1]
        seen = gather(model(), rows, covariance=kept)
        assert seen.sites == tuple(SITES)
        whole, reduced = gather(model(), data(), covariance=kept), seen.all_reduce()
        assert reduced.metadata == whole.metadata
        for site in SITES:
            assert reduced[site].count == 24
            torch.testing.assert_close(reduced[site].mean, whole[site].mean, rtol=1e-12, atol=1e-12)
        if kept is True:
            same(reduced.all_reduce(), whole)


@check
def an_empty_share_of_classes_is_one_too() -> None:
    labels = [index % 3 for index in range(24)]
    rows, own = (data()[:0], []) if rank == 1 else (data(), labels)
    seen = gather(model(), rows, by=own, sites="1").all_reduce()
    expected = gather(model(), data(), by=labels, sites="1")
    assert list(seen) == [0, 1, 2]
    for label in expected:
        assert seen[label]["1"].count == (world - 1) * expected[label]["1"].count


@check
def nothing_on_any_rank_is_nothing() -> None:
    seen = gather(model(), []).all_reduce()
    assert seen.sites == tuple(SITES) and not any(seen[site].count for site in SITES)


@check
def an_axis_that_only_rows_tell_is_no_disagreement() -> None:
    network = nn.Sequential(nn.MaxPool2d(1))
    images = torch.zeros(4, 2, 5, 5)
    seen = collect(network, images[:0] if rank == 0 else images, sites="0", progress=False).all_reduce()
    assert seen.metadata["axis 0"] == "-3" and seen["0"].count == 100 * (world - 1)


@check
def groups_side_by_side() -> None:
    groups, rows = [dist.new_group(list(range(half, world, 2))) for half in range(2)], data()[rank % 2 :: 2]
    same(gather(model(), rows[rank // 2 :: world // 2]).all_reduce(group=groups[rank % 2]), truth(rows))
    every_rank_has_the_statistics_of_all()


# --- failures, each in a world of its own: they are final ------------------------------------------------------------
def apart(function: Callable[[], None]) -> Callable[[], None]:
    """A check in a new process group, whose ranks wait a minute for each other; a check may shorten that."""

    @functools.wraps(function)
    def run() -> None:
        if dist.is_initialized():
            dist.destroy_process_group()
        file = Path(f"{sys.argv[1]}.{function.__name__}").absolute().as_uri()
        patience = datetime.timedelta(seconds=60)
        dist.init_process_group("gloo", init_method=file, rank=rank, world_size=world, timeout=patience)
        function()

    return check(run)


def is_final(reason: str) -> None:
    """Whatever comes next fails on every rank, for the same reason."""
    for _ in range(2):
        fails(lambda: gather(model(), data()), DistributedError, reason)
        fails(lambda: Statistics({}).all_reduce(), DistributedError, reason)


@apart
def a_rank_that_fails_tells_the_others() -> None:
    def share() -> object:
        return gather(model(), failing(2, OSError("disk gone")) if rank == 1 else data()).all_reduce()

    kind, said = (OSError, "disk gone") if rank == 1 else (DistributedError, "rank 1 failed: OSError: disk gone")
    fails(share, kind, said)
    is_final("rank 1 failed: OSError: disk gone")


@apart
def nothing_is_set_on_the_error_of_the_user() -> None:
    error = OSError("disk gone")
    with pytest.raises((OSError, DistributedError)):
        gather(model(), failing(1, error) if rank == 1 else data()).all_reduce()
    assert vars(error) == {}


@apart
def a_rank_whose_model_fails_tells_the_others() -> None:
    rows = data()[:, :3] if rank == 0 else data()

    def share() -> object:
        return gather(model(), rows).all_reduce()

    fails(share, RuntimeError if rank == 0 else DistributedError, "mat1" if rank == 0 else "rank 0 failed: InputError")
    is_final("rank 0 failed: InputError: ")
    is_final("mat1 and mat2 shapes")  # torch's words, before which 2.15 says more


@apart
def ranks_that_all_fail_by_themselves_hear_of_the_first() -> None:
    fails(lambda: record(model(), failing(1, OSError("gone")), sites="0", progress=False), Exception, "gone")
    dist.barrier()
    is_final("failed: OSError: gone")


@apart
def a_rank_that_fails_in_a_sharded_model_does_not_keep_the_others_waiting() -> None:
    network = fully_shard(model())
    batches = failing(2, OSError("disk gone")) if rank == 1 else data().split(3)
    fails(lambda: gather(network, batches), OSError if rank == 1 else DistributedError, "disk gone")
    is_final("disk gone")


@apart
def a_sharded_model_wants_as_many_batches_on_every_rank() -> None:
    network = fully_shard(model())
    rows = data()[:6] if rank else data()[:9]
    fails(lambda: gather(network, rows, batch_size=3), DistributedError, "ranks [0] have a batch number 3, ranks [1")


@apart
def other_sites_are_refused_by_all() -> None:
    own = gather(model(), data(), sites="0" if rank == 1 else "2")
    fails(own.all_reduce, DistributedError, "rank 1 has the sites of sizes {'0': 8}, rank 0 {'2': 4}")
    is_final("rank 1 has the sites of sizes")


@apart
def other_sites_of_a_share_of_nothing_are_refused_by_all() -> None:
    own = gather(model(), data()[:0] if rank == 1 else data(), sites="0" if rank == 1 else "2")
    fails(own.all_reduce, DistributedError, "rank 1 has the sites of sizes {'0': 0}, rank 0 {'2': 4}")


@apart
def another_covariance_is_refused_by_all() -> None:
    own = gather(model(), data(), covariance=True if rank == 1 else "diagonal")
    fails(own.all_reduce, DistributedError, "rank 1 has the covariance True, rank 0 diagonal")


@apart
def a_covariance_on_some_ranks_alone_is_refused_by_all() -> None:
    own = gather(model(), data(), covariance=rank == 1)
    fails(own.all_reduce, DistributedError, "rank 1 has the covariance True, rank 0 False")


@apart
def another_dtype_is_refused_by_all() -> None:
    own = gather(model().float() if rank == 1 else model(), data().float() if rank == 1 else data())
    fails(own.all_reduce, DistributedError, "rank 1 has the metadata")


@apart
def other_positions_are_refused_by_all() -> None:
    words = nn.Sequential(nn.Embedding(9, 4))
    tokens = torch.arange(8).reshape(2, 4)
    own = collect(words, tokens, sites="0", positions="last" if rank == 1 else "all", progress=False)
    fails(own.all_reduce, DistributedError, "positions")


@apart
def classes_on_one_rank_alone_are_refused_by_all() -> None:
    own = gather(model(), data(), by=[0] * 24 if rank == 1 else None)
    fails(own.all_reduce, DistributedError, "rank 1 has the classes True, rank 0 False")


@apart
def another_call_on_one_rank_is_refused_by_all() -> None:
    network = fully_shard(model())
    own = gather(nn.Sequential(nn.Identity()), data(), sites="0")
    fails(
        own.all_reduce if rank == 1 else lambda: gather(network, data()),
        DistributedError,
        "rank 0 at batch 1, rank 1 at all_reduce",
    )


@apart
def a_failure_that_nobody_waited_for_mixes_no_statistics() -> None:
    with contextlib.suppress(OSError, DistributedError):
        record(model(), failing(1, OSError("gone")) if rank == 1 else data(), sites="0", progress=False)
    fails(lambda: gather(model(), data()[rank::world]).all_reduce(), DistributedError, "rank 1 failed: OSError: gone")


@apart
def a_wrong_argument_on_one_rank_mixes_no_statistics() -> None:
    sites = "no such site" if rank == 1 else SITES
    kind = SiteNotFoundError if rank == 1 else DistributedError
    fails(lambda: gather(model(), data()[rank::world], sites=sites).all_reduce(), kind, "no such site")
    is_final("rank 1 failed: SiteNotFoundError")


@apart
def a_rank_that_comes_too_late_is_named_and_mixes_no_statistics() -> None:
    dist.distributed_c10d._get_default_store().set_timeout(datetime.timedelta(seconds=5))
    time.sleep(7 if rank == 1 else 0)
    fails(lambda: gather(model(), data()).all_reduce(), DistributedError, "all_reduce: ranks [1] did not come")


@apart
def a_failure_inside_of_another_collection_is_heard_once() -> None:
    def batches() -> Iterator[Tensor]:
        rows = failing(1, OSError("gone")) if rank == 1 else data()
        yield record(nn.Sequential(nn.Identity()), rows, sites="0", progress=False)["0"]

    fails(lambda: gather(model(), batches()).all_reduce(), OSError if rank == 1 else DistributedError, "gone")


@apart
def a_group_without_this_rank_is_refused_by_it() -> None:
    alone, own = dist.new_group([0]), gather(model(), data())
    if rank:
        with pytest.raises(DistributedError, match=r"(?s)^((?!did not come).)*$"):
            own.all_reduce(group=alone)


def main(results: str) -> None:
    global rank, world
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    said = {}
    for name, function in CHECKS.items():
        said[name] = ""
        try:
            function()
        except (Exception, pytest.fail.Exception):  # the latter is what `pytest.raises` raises
            said[name] = traceback.format_exc()
        Path(f"{results}.{rank}").write_text(json.dumps(said))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
