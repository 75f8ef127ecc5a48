"""checkpoint=: a pass that was stopped anywhere resumes, and ends bit for bit as if it never had been."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from actsteer import ActsteerError, BatchError, ClassStatistics, FileFormatError, Statistics, collect
from tests.zoo import bits, normal

MODEL = nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 3)).double()
PARTS = [normal(rows, 4, 2, seed=rows) for rows in (3, 1, 2, 5, 4)]
LABELS = [[(seed * row) % 3 for row in range(len(part))] for seed, part in enumerate(PARTS)]
FLAT = [label for part in LABELS for label in part]


class StopError(Exception):
    """What stops the pass."""


def stopped(batches, after):
    """The batches, and then an error."""
    for index, batch in enumerate(batches):
        if index == after:
            raise StopError
        yield batch
    raise StopError


def raw(stats):
    """Everything in the statistics, as bit patterns."""
    classes = {None: stats} if isinstance(stats, Statistics) else stats
    return {
        (label, site): (
            own[site].count,
            bits(own[site].mean).tolist(),
            [bits(own[site].scatter).tolist(), bits(own[site].fourth).item()] if own[site].kept is True else [],
            bits(own[site].variance).tolist() if own[site].kept and own[site].count > 1 else [],
        )
        for label, own in classes.items()
        for site in own
    } | {"metadata": stats.metadata}


JOBS = {
    "plain": {},
    "covariance": {"covariance": True},
    "variance": {"covariance": "diagonal"},
    "last": {"positions": "last"},
    "mean": {"positions": "mean", "covariance": True},
    "a mask": {"positions": torch.tensor([True, False, True, True]), "covariance": True},
    "a callable": {"positions": lambda inputs: inputs["input"][..., 0] > 0},
    "one label each": {"by": FLAT, "covariance": True},
    "a tensor of labels": {"by": torch.tensor(FLAT), "covariance": True},
    "labels by batch": {"by": LABELS, "covariance": True},
    "arrays by batch": {"by": [np.array(part) for part in LABELS], "positions": slice(1, 3)},
    "a function": {"by": lambda batch: ["high" if row.sum() > 0 else "low" for row in batch], "covariance": True},
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "sums.safetensors"


@pytest.mark.parametrize("every", [1, 2, 9])
@pytest.mark.parametrize("job", JOBS.values(), ids=JOBS.keys())
def test_a_pass_that_stops_at_any_batch_resumes_bit_for_bit(job, every, path):
    expected = raw(collect(MODEL, PARTS, sites=["0", "2"], **job))
    for after in range(len(PARTS) + 1):
        path.unlink(missing_ok=True)
        with pytest.raises(StopError):
            collect(MODEL, stopped(PARTS, after), sites=["0", "2"], checkpoint=path, every=every, **job)
        assert path.exists() == (after >= every)
        for batches in (PARTS, iter(PARTS)):  # resumed, and once more when all of it has been seen
            assert raw(collect(MODEL, batches, sites=["0", "2"], checkpoint=path, every=every, **job)) == expected


@pytest.mark.parametrize("every", [1, 3])
def test_a_pass_that_stops_at_every_batch_resumes_bit_for_bit(every, path):
    options = {"sites": "2", "covariance": True, "checkpoint": path, "every": every, "by": FLAT}
    for after in range(len(PARTS)):
        with pytest.raises(StopError):
            collect(MODEL, stopped(PARTS, after), **options)
    assert raw(collect(MODEL, PARTS, **options)) == raw(collect(MODEL, PARTS, sites="2", covariance=True, by=FLAT))


def test_labels_inside_the_batches_resume_bit_for_bit(path):
    pairs = [(x, torch.tensor(y)) for x, y in zip(PARTS, LABELS, strict=True)]
    named = [{"input": x, "y": y} for x, y in pairs]
    for number, (by, batches) in enumerate([(1, pairs), ("y", named)]):
        own = path.with_stem(f"sums{number}")
        options = {"sites": "2", "covariance": True, "by": by, "every": 2}
        with pytest.raises(StopError):
            collect(MODEL, stopped(batches, 3), checkpoint=own, **options)
        assert raw(collect(MODEL, batches, checkpoint=own, **options)) == raw(collect(MODEL, batches, **options))


def test_an_error_inside_the_model_leaves_no_half_a_batch_in_the_file(path):
    calls = []

    def fail(*_):
        calls.append(1)
        if len(calls) == 3:
            raise StopError

    handle = MODEL[1].register_forward_hook(fail)
    with pytest.raises(StopError):
        collect(MODEL, PARTS, sites=["0", "2"], checkpoint=path, every=1)  # "0" has seen the third batch, "2" has not
    handle.remove()
    found = collect(MODEL, PARTS, sites=["0", "2"], checkpoint=path, every=1)
    assert raw(found) == raw(collect(MODEL, PARTS, sites=["0", "2"]))


def test_what_was_seen_does_not_run_again(path):
    with pytest.raises(StopError):
        collect(MODEL, stopped(PARTS, 3), sites="2", checkpoint=path, every=2)
    rows = []
    handle = MODEL.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    collect(MODEL, PARTS, sites="2", checkpoint=path, every=2)
    handle.remove()
    assert rows == [2, 5, 4]


def test_more_batches_than_then_are_added(path):
    collect(MODEL, PARTS[:3], sites="2", checkpoint=path, covariance=True)
    found = collect(MODEL, PARTS, sites="2", checkpoint=path, covariance=True)
    assert raw(found) == raw(collect(MODEL, PARTS, sites="2", covariance=True))


def test_what_is_returned_is_not_the_file_s(path):
    first = collect(MODEL, PARTS, sites="2", checkpoint=path)
    first["2"].update(torch.zeros(9, 3))
    first["2"].mean.zero_()
    assert raw(collect(MODEL, PARTS, sites="2", checkpoint=path)) == raw(collect(MODEL, PARTS, sites="2"))


@pytest.mark.parametrize("layout", [torch.jagged, torch.strided])
@pytest.mark.filterwarnings("ignore")
def test_nested_batches_resume_too(layout, path):
    batches = [torch.nested.nested_tensor([part[0, :2], part[-1, :3]], layout=layout) for part in PARTS]
    model = nn.Sequential(nn.Identity())
    with pytest.raises(StopError):
        collect(model, stopped(batches, 3), sites="0", checkpoint=path, every=1)
    found = collect(model, batches, sites="0", checkpoint=path, every=1)
    assert raw(found) == raw(collect(model, batches, sites="0"))
    assert found["0"].count == 25


# --- killed ----------------------------------------------------------------------------------------------------------
SCRIPT = """
    import os, signal, sys, torch
    from torch import nn
    from actsteer import collect

    def batches():
        generator = torch.Generator().manual_seed(0)
        for index in range(6):
            if index == int(sys.argv[2]):
                os.kill(os.getpid(), signal.SIGKILL)
            yield torch.randn(7, 4, generator=generator)

    torch.set_num_threads(1)
    labels = [[row % 2 for row in range(7)]] * 6
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    options = {"checkpoint": sys.argv[1], "every": 2} if sys.argv[1] else {}
    collect(model, batches(), sites="1", covariance=True, by=labels, **options).save(sys.argv[3])
"""


@pytest.mark.slow
def test_a_killed_process_resumes_bit_for_bit(path, tmp_path):
    def run(checkpoint, dies, out):
        command = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(checkpoint), str(dies), str(tmp_path / out)]
        root = Path(__file__).parent.parent.parent
        done = subprocess.run(command, check=False, capture_output=True, cwd=root, env=os.environ, timeout=60)
        return done.returncode

    assert run(path, 3, "never.safetensors") == -signal.SIGKILL
    assert path.exists() and list(tmp_path.iterdir()) == [path]
    assert run(path, 99, "resumed.safetensors") == run("", 99, "whole.safetensors") == 0
    resumed, whole = (ClassStatistics.load(tmp_path / name) for name in ("resumed.safetensors", "whole.safetensors"))
    assert raw(resumed) == raw(whole)
    assert resumed.total()["1"].count == 42


# --- refused ---------------------------------------------------------------------------------------------------------
def begun(path, **job):
    with pytest.raises(StopError):
        collect(MODEL, stopped(PARTS, 3), checkpoint=path, every=1, **({"sites": "2"} | job))
    return path.read_bytes()


OTHER_DATA = {
    "the first": [PARTS[0] + 1, *PARTS[1:]],
    "the last seen": [*PARTS[:2], -PARTS[2], *PARTS[3:]],
    "another order": [PARTS[1], PARTS[0], *PARTS[2:]],
    "single precision": [part.float().double() for part in PARTS],
    "fewer": PARTS[:2],
    "other sizes": [torch.cat(PARTS[:2]), *PARTS[2:]],
}


@pytest.mark.parametrize("batches", OTHER_DATA.values(), ids=OTHER_DATA.keys())
def test_other_data_are_refused_and_the_file_stays(batches, path):
    before = begun(path)
    with pytest.raises(BatchError, match=r"were seen then"):
        collect(MODEL, batches, sites="2", checkpoint=path, every=1)
    assert path.read_bytes() == before


@pytest.mark.parametrize("by", [[1 - min(label, 1) for label in FLAT], [[0] * len(part) for part in PARTS], None])
def test_other_labels_are_refused_and_the_file_stays(by, path):
    before = begun(path, by=FLAT)
    with pytest.raises(ActsteerError):
        collect(MODEL, PARTS, sites="2", checkpoint=path, every=1, by=by)
    assert path.read_bytes() == before


JOB = {"sites": "2", "covariance": True, "positions": "last"}
OTHER_JOBS = {
    "sites": {"sites": ["0", "2"]},
    "covariance": {"covariance": False},
    "variance": {"covariance": "diagonal"},
    "word": {"positions": "mean"},
    "index": {"positions": 0},
    "all": {"positions": "all"},
    "classes": {"by": FLAT},
    "axis": {"axis": -1},
}


@pytest.mark.parametrize("other", OTHER_JOBS.values(), ids=OTHER_JOBS.keys())
def test_another_job_is_refused_and_the_file_stays(other, path):
    before = begun(path, **JOB)
    with pytest.raises(ActsteerError, match="checkpoint of another pass"):
        collect(MODEL, PARTS, checkpoint=path, every=1, **(JOB | other))
    assert path.read_bytes() == before


TWO = {
    "masks": (torch.tensor([True, False, False, True]), torch.tensor([False, True, False, True])),
    "functions": (lambda own: own["input"][..., 0] > 0, lambda own: own["input"][..., 0] < 0),
    "constants": (lambda own: own["input"][..., 0] > 0, lambda own: own["input"][..., 0] > 0.5),
    "names": (lambda own: own["input"][..., 0].isnan(), lambda own: own["input"][..., 0].isfinite()),
}


@pytest.mark.parametrize(("one", "other"), TWO.values(), ids=TWO.keys())
def test_other_masks_and_functions_are_other_positions(one, other, path):
    begun(path, positions=one)
    with pytest.raises(ActsteerError, match="checkpoint of another pass"):
        collect(MODEL, PARTS, sites="2", checkpoint=path, every=1, positions=other)


def changed(model, how):
    with torch.no_grad():
        how(model)
    return model


OTHER_MODELS = {
    "the first number": lambda m: m[0].weight[0, 0].add_(1),
    "a number in the middle": lambda m: m[0].weight[100, 1].add_(1),
    "a buffer": lambda m: m[1].running_mean.add_(1),
    "the precision": lambda m: m.double(),
}


@pytest.mark.parametrize("how", OTHER_MODELS.values(), ids=OTHER_MODELS.keys())
def test_other_weights_are_refused(how, path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 200), nn.BatchNorm1d(200))
    batches = [torch.zeros(2, 2), torch.ones(2, 2)]
    collect(model, batches, sites="1", checkpoint=path)
    with pytest.raises(ActsteerError, match="checkpoint of another pass"):
        collect(changed(model, how), batches, sites="1", checkpoint=path)


def test_another_batch_size_is_refused(path):
    collect(MODEL, torch.cat(PARTS), sites="2", checkpoint=path, batch_size=4)
    with pytest.raises(ActsteerError):
        collect(MODEL, torch.cat(PARTS), sites="2", checkpoint=path, batch_size=5)


def test_a_file_that_is_no_checkpoint_is_refused_and_stays(path):
    collect(MODEL, PARTS, sites="2").save(path)
    before = path.read_bytes()
    with pytest.raises(FileFormatError, match="kind 'checkpoint'"):
        collect(MODEL, PARTS, sites="2", checkpoint=path)
    assert path.read_bytes() == before


def test_a_damaged_checkpoint_is_refused(path):
    damaged = bytearray(begun(path, covariance=True))
    for where in (0, 9, len(damaged) // 2, len(damaged) - 1):
        path.write_bytes(damaged[:where] + bytes([damaged[where] ^ 4]) + damaged[where + 1 :])
        with pytest.raises(FileFormatError):
            collect(MODEL, PARTS, sites="2", checkpoint=path, every=1, covariance=True)


@pytest.mark.parametrize("name", ["sums.pt", "sums", "missing/sums.safetensors"])
def test_a_path_that_cannot_be_written_is_refused_before_the_model_runs(name, tmp_path):
    handle = MODEL.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    try:
        with pytest.raises((ActsteerError, OSError)):
            collect(MODEL, PARTS, sites="2", checkpoint=tmp_path / name)
    finally:
        handle.remove()


@pytest.mark.parametrize("every", [0, -1])
def test_every_is_one_or_more(every, path):
    with pytest.raises(ValueError, match="every: expected 1 batch or more"):
        collect(MODEL, PARTS, sites="2", checkpoint=path, every=every)
