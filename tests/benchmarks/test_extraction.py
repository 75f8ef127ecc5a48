"""The benchmark of extraction runs, compares ways that see the same, and writes down what it printed."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from benchmarks.extraction import (
    PLAIN,
    SHARED,
    blocks_of,
    by_hand,
    language_model,
    main,
    over,
    prefix_ways,
    sizes,
    table,
    token_lists,
    ways,
)


@pytest.mark.slow
def test_the_file_has_every_way_with_its_times_and_memory(tmp_path):
    app, out = typer.Typer(), tmp_path / "extraction.json"
    app.command()(main)
    options = ["--quick", "--pairs", "2", "--repeats", "2", "--rows", "1024", "--out", str(out)]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(out.read_text())
    assert list(found["ways"]) == list(ways(language_model(quick=True), token_lists(2)))
    assert all(len(way["seconds"]) == 2 and way["megabytes"] > 0 for way in found["ways"].values())
    assert list(found["megabytes by rows"]) == ["1024"]
    assert all(len(found["milliseconds beyond bare hooks"][name]) == 2 for name in ("per batch", "per call"))
    assert f"{found['no_grad over inference mode']['median']:.3f}" in result.output
    assert f"{found['shared prefix']['median']:.3f}" in result.output


def test_what_is_written_by_hand_is_what_collect_finds():
    model, texts = language_model(quick=True), token_lists(8)
    made = ways(model, texts)
    for hand, ours in zip(
        (made[name] for name in made if name.startswith("by hand")),
        (made[name] for name in made if name.startswith("collect")),
        strict=True,
    ):
        means, stats = hand(), ours()
        assert list(means) == list(stats.sites) and len(means) in (1, blocks_of(model))
        for site, mean in means.items():
            assert stats[site].count == len(texts)
            torch.testing.assert_close(stats[site].mean, mean, rtol=1e-6, atol=1e-8)


def test_the_limit_goes_no_further_than_its_site():
    model, ran = language_model(quick=True), []
    model.model.layers[2].register_forward_hook(lambda *_: ran.append(2))
    batch = {"input_ids": torch.tensor([[97, 98]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    by_hand(model, [batch], ["model.layers.1"])
    assert not ran


def test_sharing_the_prefix_gives_the_same_vector():
    made = prefix_ways(language_model(quick=True), 2)
    plain, shared = made[PLAIN](), made[SHARED]()
    assert plain.sites == shared.sites and shared.allclose(plain, rtol=1e-5, atol=1e-5)


def test_ratios_are_taken_within_a_round():
    assert over([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_what_collect_takes_above_the_limit_is_in_the_table():
    timed = {"the body alone": [2.0, 4.0], "by hand, one": [1.0, 2.0], "collect, one": [1.5, 3.0]}
    columns = table(timed, dict.fromkeys(timed, 1.0), texts=3, tokens=5).columns
    assert list(columns[2].cells) == ["", "", "0.250 (0.250-0.250)"]
    assert list(columns[3].cells)[2] == f"{3 / 2.25:.0f}"


@pytest.mark.parametrize(("rows", "wanted"), [(1, [1024]), (10_000, [1024, 10_240])])
def test_rows_grow_tenfold(rows, wanted):
    assert sizes(rows) == wanted
