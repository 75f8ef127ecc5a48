"""The benchmark of files runs, and each way gives what it says."""

import json

import typer
from typer.testing import CliRunner

from benchmarks.files import main, ways, write


def test_the_file_has_a_time_for_every_way(tmp_path):
    app, out = typer.Typer(), tmp_path / "files.json"
    app.command()(main)
    options = ["--concepts", "20", "--d", "8", "--repeats", "2", "--out", str(out)]
    result = CliRunner().invoke(app, options, catch_exceptions=False)
    assert result.exit_code == 0
    found = json.loads(out.read_text())
    assert list(found["seconds"])[1:] == list(ways(tmp_path / "b.safetensors"))
    assert all(0 < time["lower"] <= time["median"] <= time["upper"] for time in found["seconds"].values())
    assert "a bank of 20 concepts, d = 8: 0 MB" in result.output


def test_each_way_reads_what_it_says(tmp_path):
    path = tmp_path / "b.safetensors"
    write(path, 20, 8)
    opened, one, every = (way() for way in ways(path).values())
    assert len(opened) == len(every) == 20
    assert one.equal(opened["concept 19"]) and not one.equal(opened["concept 18"])
