"""collect and merge: shards without a scheduler; fit on what they wrote; nothing of others is written over."""

import json

import pytest
import torch
from safetensors.torch import save_file

from actsteer import Statistics, SteeringVector, collect, fit
from actsteer.collecting.texts import text_batches
from tests.cli.test_commands import causal, tokenizer

SITES = ["--sites", "model.layers.0", "--sites", "model.layers.2"]
NAMES = ["model.layers.0", "model.layers.2"]
WORDS = ["I love this day", "this is bad", "the weather", "I hate this very good day", "calm", "good bad good", "day"]


@pytest.fixture
def texts(folder):
    (folder / "texts.txt").write_text("\n".join(WORDS))
    return "texts.txt"


def expected(folder, **options):
    batches = text_batches(tokenizer(folder), WORDS, batch_size=2)
    return collect(causal(folder), batches, sites=NAMES, positions="last", progress=False, **options)


def same(one, other, *, rtol=1e-13):
    assert one.sites == other.sites and one.metadata == other.metadata
    for site in one:
        assert (one[site].count, one[site].kept, one[site].dtype) == (
            other[site].count,
            other[site].kept,
            other[site].dtype,
        )
        torch.testing.assert_close(one[site].mean, other[site].mean, rtol=rtol, atol=rtol)
        if one[site].kept:
            torch.testing.assert_close(one[site].variance, other[site].variance, rtol=10 * rtol, atol=10 * rtol)
        if one[site].kept is True:
            torch.testing.assert_close(one[site].covariance, other[site].covariance, rtol=10 * rtol, atol=10 * rtol)


def test_collect_is_collect(run, folder, texts):
    done = run("collect", "-m", "llama", "--texts", texts, *SITES, "-o", "s.safetensors", "--batch-size", 2)
    assert done.code == 0, done.err
    assert done.lines[:2] == [["site", "features", "rows"], ["model.layers.0", "16", "7"]]
    same(Statistics.load("s.safetensors"), expected(folder), rtol=0)
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(("kept", "covariance"), [("full", True), ("diagonal", "diagonal")])
def test_any_number_of_shards_is_one_pass_even_where_some_are_empty(run, folder, texts, kept, covariance):
    for number in range(6):  # of four batches
        command = ["collect", "-m", "llama", "--texts", texts, *SITES, "--batch-size", 2, "--covariance", kept]
        done = run(*command, "--shard", f"{number}/6", "-o", f"part{number}.safetensors")
        assert done.code == 0, done.err
    done = run("merge", *sorted(folder.glob("part*.safetensors")), "-o", "all.safetensors")
    assert done.code == 0, done.err
    assert done.lines[1] == ["model.layers.0", "16", "7"]
    same(Statistics.load("all.safetensors"), expected(folder, covariance=covariance))


FALLIBLE = """
    import os, torch
    from torch import nn

    class Net(nn.Sequential):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if self.calls == int(os.environ.get("FAILS", 0)):
                raise RuntimeError("killed")
            return super().forward(x)

    def build():
        torch.manual_seed(0)
        return Net(nn.Linear(4, 3), nn.ReLU())
"""


@pytest.mark.parametrize("shard", [[], ["--shard", "1/2"]])
def test_what_was_stopped_goes_on_bit_for_bit(run, folder, monkeypatch, shard):
    (folder / "fallible.py").write_text("\n".join(line[4:] for line in FALLIBLE.splitlines()))
    torch.save(torch.randn(13, 4), folder / "x.pt")
    command = ["collect", "-m", "fallible:build", "--texts", "x.pt", "--sites", "1", "--covariance", "full", *shard]
    command += ["--batch-size", 2, "--every", 1]
    assert run(*command, "-o", "whole.safetensors").code == 0
    monkeypatch.setenv("FAILS", "3")
    assert run(*command, "-o", "stopped.safetensors").code == 1
    assert (folder / ".stopped.resume.safetensors").exists() and not (folder / "stopped.safetensors").exists()
    monkeypatch.delenv("FAILS")
    done = run(*command, "-o", "stopped.safetensors")
    assert done.code == 0 and "going on from" in done.out
    same(Statistics.load("stopped.safetensors"), Statistics.load("whole.safetensors"), rtol=0)
    assert not (folder / ".stopped.resume.safetensors").exists()


@pytest.mark.parametrize("streamed", [True, False])
def test_a_dataset_is_read_like_a_file_and_in_shards(run, folder, streamed):
    datasets = pytest.importorskip("datasets")
    if streamed:
        (folder / "corpus").mkdir()
        for number in range(3):
            rows = "\n".join(json.dumps({"said": text}) for text in WORDS[number::3])
            (folder / "corpus" / f"{number}.jsonl").write_text(rows)
    else:
        datasets.Dataset.from_dict({"said": WORDS}).save_to_disk(folder / "corpus")
    command = ["collect", "-m", "llama", "--texts", "corpus", "--column", "said", *SITES, "--batch-size", 2]
    assert run(*command, "-o", "whole.safetensors").code == 0
    same(Statistics.load("whole.safetensors"), expected(folder), rtol=1e-5)
    for number in range(2):
        done = run(*command, "--shard", f"{number}/2", "-o", f"part{number}.safetensors")
        assert done.code == 0, done.err
    assert run("merge", "part0.safetensors", "part1.safetensors", "-o", "all.safetensors").code == 0
    same(Statistics.load("all.safetensors"), Statistics.load("whole.safetensors"), rtol=1e-5 if streamed else 1e-13)
    done = run(*command[:-4], "--column", "text", "-o", "x.safetensors")
    assert done.code == 1 and "no column 'text'" in done.err


@pytest.mark.parametrize("command", ["collect", "merge"])
def test_nothing_is_written_over_but_statistics(run, folder, texts, command):
    made = ["collect", "-m", "llama", "--texts", texts, *SITES]
    assert run(*made, "-o", "a.safetensors").code == 0
    assert run(*made, "--positions", "all", "-o", "b.safetensors").code == 0
    made = made if command == "collect" else ["merge", "a.safetensors"]
    save_file({"weights": torch.zeros(3)}, folder / "model.safetensors")
    SteeringVector({"0": torch.zeros(3)}).save(folder / "bank.safetensors")
    for name in ("model.safetensors", "bank.safetensors"):
        before = (folder / name).read_bytes()
        done = run(*made, "-o", name)
        assert done.code == 2 and "it is there already" in done.err
        assert (folder / name).read_bytes() == before
    assert run(*made, "-o", "b.safetensors").code == 0
    assert Statistics.load("b.safetensors")["model.layers.0"].count == 7


def test_collect_leaves_a_file_alone_that_has_the_name_of_what_it_would_keep(run, folder, texts):
    save_file({"weights": torch.zeros(3)}, folder / ".s.resume.safetensors")
    before = (folder / ".s.resume.safetensors").read_bytes()
    assert run("collect", "-m", "llama", "--texts", texts, *SITES, "-o", "s.safetensors").code == 1
    assert (folder / ".s.resume.safetensors").read_bytes() == before


def test_parts_that_do_not_go_together_are_refused(run, folder, texts):
    made = ["collect", "-m", "llama", "--texts", texts, *SITES]
    run(*made, "-o", "a.safetensors")
    run(*made, "-o", "same.safetensors")
    run(*made, "--positions", "all", "-o", "all.safetensors")
    run(*made[:-2], "-o", "fewer.safetensors")
    for other, why in (
        ("same.safetensors", "a part counts once"),
        ("a.safetensors", "a part counts once"),
        ("all.safetensors", "in one way"),
        ("fewer.safetensors", "at the same sites"),
    ):
        done = run("merge", "a.safetensors", other, "-o", "merged.safetensors")
        assert done.code in (1, 2) and why in done.err
    assert not (folder / "merged.safetensors").exists()


@pytest.mark.parametrize("shard", ["2/2", "1", "-1/2", "a/b"])
def test_a_shard_that_there_is_not_is_refused(run, texts, shard):
    done = run("collect", "-m", "llama", "--texts", texts, *SITES, "-o", "s.safetensors", "--shard", shard)
    assert done.code == 2 and "expected i/n, from 0/n to n-1/n" in done.err


# --- fit -------------------------------------------------------------------------------------------------------------
def test_fit_on_statistics_is_fit_on_texts(run, folder):
    for side in ("love", "hate"):
        command = ["collect", "-m", "llama", "--texts", f"{side}.txt", "--covariance", "full", *SITES]
        assert run(*command, "-o", f"{side}.safetensors").code == 0
    sides = ["--positive", "love.safetensors", "--negative", "hate.safetensors"]
    texts = ["-m", "llama", "--positive", "love.txt", "--negative", "hate.txt", *SITES]
    for estimator in ("MeanDifference", "WhitenedMeanDifference"):
        assert run("fit", *sides, "--estimator", estimator, "-o", "one.safetensors").code == 0
        assert run("fit", *sides, "-m", "llama", "--estimator", estimator, "-o", "two.safetensors").code == 0
        assert run("fit", *texts, "--estimator", estimator, "-o", "three.safetensors").code == 0
        one, two, three = (SteeringVector.load(f"{name}.safetensors") for name in ("one", "two", "three"))
        assert one.equal(two) and one.allclose(three, rtol=1e-5, atol=1e-6) and one.sites == three.sites
        assert one.concept == three.concept == "love"
    assert run("fit", *sides, "--sites", "model.layers.2", "-o", "one.safetensors").code == 0
    assert SteeringVector.load("one.safetensors").sites == ("model.layers.2",)


def test_fit_says_what_statistics_cannot_give(run, folder):
    for side in ("love", "hate"):
        assert run("collect", "-m", "llama", "--texts", f"{side}.txt", *SITES, "-o", f"{side}.safetensors").code == 0
    sides = ["fit", "--positive", "love.safetensors", "--negative", "hate.safetensors", "-o", "v.safetensors"]
    for more, why in (
        (["--estimator", "LogisticDirection"], "reads rows"),
        (["--estimator", "WhitenedMeanDifference"], "no covariance was collected"),
        (["--positions", "last"], "have their positions already"),
        (["--sites", "model.layers.1"], "no statistics for site"),
    ):
        done = run(*sides, *more)
        assert done.code in (1, 2) and why in done.err
    done = run("fit", "--positive", "love.safetensors", "--negative", "hate.txt", "-o", "v.safetensors")
    assert done.code == 2 and "give both alike" in done.err
    done = run("fit", "--positive", "love.txt", "--negative", "hate.txt", "-o", "v.safetensors")
    assert done.code == 2 and "need --model and --sites" in done.err
    assert not (folder / "v.safetensors").exists()


# --- in Python -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("of", [1, 3, 9])
def test_parts_in_python_are_one_pass_whatever_the_batches_are(folder, of):
    model, tokens = causal(folder), tokenizer(folder)
    x = torch.randint(0, 16, (11, 3))
    for batches in (
        text_batches(tokens, WORDS, batch_size=2),
        x,
        list(x.split(2)),
        [{"input_ids": part} for part in x.split(3)],
    ):
        options = {"sites": NAMES, "covariance": True, "progress": False, "batch_size": 2}
        parts = [collect(model, batches, shard=(number, of), **options) for number in range(of)]
        merged = parts[0]
        for part in parts[1:]:
            merged = merged.merge(part)
        same(merged, collect(model, batches, **options))


def test_fit_takes_a_streamed_dataset(folder):
    datasets = pytest.importorskip("datasets")
    sides = [
        text_batches(tokenizer(folder), side, column="text", batch_size=2)
        for rows in (WORDS[:3], WORDS[3:])
        for side in (datasets.Dataset.from_dict({"text": rows}).to_iterable_dataset(),)
    ]
    v = fit(causal(folder), positive=sides[0], negative=sides[1], sites=NAMES, positions="last", progress=False)
    plain = [text_batches(tokenizer(folder), rows, batch_size=2) for rows in (WORDS[:3], WORDS[3:])]
    w = fit(causal(folder), positive=plain[0], negative=plain[1], sites=NAMES, positions="last", progress=False)
    assert v.equal(w)
