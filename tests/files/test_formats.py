"""A format of a user's own is as good as those of FORMATS: read, written, by names and by numbers, in a pattern."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch

from actsteer import FORMATS, FileFormatError, ModelMismatchError, Steerer, SteeringVector, VectorBank, fit
from actsteer.files.lazy import Named, Numbered, Stored
from tests.zoo import llama

A, B = torch.arange(16.0) / 8, -torch.ones(16)
BANK = VectorBank(
    {
        "calm": SteeringVector({"model.layers.1": A, "model.layers.2": B}, concept="calm", metadata={"a": "1"}),
        "loud": SteeringVector({"model.layers.0:in": B}, concept="loud"),
    }
)


def _read(path: Path) -> dict[str, Named]:
    content = json.loads(path.read_text())
    return {
        c: Named({s: torch.tensor(row) for s, row in rows.items()}, metadata) for c, (rows, metadata) in content.items()
    }


def _write(path, vectors):
    rows = {c: ({s: row.tolist() for s, row in v.directions.items()}, dict(v.metadata)) for c, v in vectors.items()}
    path.write_text(json.dumps(rows))


def _read_numbers(path):
    content = json.loads(path.read_text())
    return {
        concept: Numbered({int(n): torch.tensor(row) for n, row in rows.items()}, model_hint=hint, metadata={"b": "2"})
        for concept, (hint, rows) in content.items()
    }


def _write_numbers(path, vectors):
    numbered = {concept: vector.numbered() for concept, vector in vectors.items()}
    content = {c: (v.model_hint, {n: row.tolist() for n, row in v.directions.items()}) for c, v in numbered.items()}
    path.write_text(json.dumps(content))


NAMES = types.SimpleNamespace(SUFFIX=".mine", read=_read, write=_write)
NUMBERS = types.SimpleNamespace(SUFFIX=(".n", ".numbers.json"), read=_read_numbers, write=_write_numbers)


def test_every_format_has_a_suffix_and_two_functions():
    suffixes = [s for own in FORMATS for s in ([own.SUFFIX] if isinstance(own.SUFFIX, str) else own.SUFFIX)]
    assert len(set(suffixes)) == len(suffixes)
    assert {".safetensors", ".gguf", ".svec", ".pt"} <= set(suffixes)
    assert all(suffix.startswith(".") and suffix == suffix.lower() for suffix in suffixes)
    assert all(callable(own.read) and callable(own.write) for own in FORMATS)


@pytest.mark.parametrize("own", FORMATS, ids=lambda own: str(own.SUFFIX))
def test_each_of_them_is_taken_by_name_as_by_its_suffix(tmp_path, own):
    one = BANK.select("calm")
    suffix = own.SUFFIX if isinstance(own.SUFFIX, str) else own.SUFFIX[0]
    if suffix not in (".safetensors", ".gguf"):
        with pytest.raises(FileFormatError, match=f"{suffix} is only read"):
            one.save(tmp_path / f"v{suffix}", format=own)
        return
    one.save(tmp_path / "any.name", format=own)
    assert VectorBank.load(tmp_path / "any.name", format=own)["calm"].equal(one["calm"])
    with pytest.raises(FileFormatError, match=r"unknown format '\.name'"):
        VectorBank.load(tmp_path / "any.name")


def test_a_format_of_names(tmp_path):
    BANK.save(tmp_path / "v.mine", format=NAMES)
    loaded = VectorBank.load(tmp_path / "v.mine", format=NAMES)
    assert loaded.concepts == BANK.concepts
    assert all(loaded[c].equal(v) and loaded[c].metadata == v.metadata for c, v in BANK.items())
    BANK["calm"].save(tmp_path / "one.mine", format=NAMES)
    assert SteeringVector.load(tmp_path / "one.mine", format=NAMES).equal(BANK["calm"])
    for act in (BANK.save, VectorBank.load):
        with pytest.raises(ValueError, match="files that number the blocks"):
            act(tmp_path / "v.mine", layer_offset=1, format=NAMES)
        with pytest.raises(FileFormatError, match=r"unknown format '\.mine'"):
            act(tmp_path / "v.mine")


def test_a_format_of_numbers(tmp_path):
    path, model = tmp_path / "v.n", llama()
    BANK.save(path, model=model, format=NUMBERS, layer_offset=1)
    assert json.loads(path.read_text())["calm"] == ["llama", {"2": A.tolist(), "3": B.tolist()}]
    assert list(json.loads(path.read_text())["loud"][1]) == ["0"]  # the input of the first block
    for where in (None, model):
        loaded = VectorBank.load(path, where, format=NUMBERS, layer_offset=1)
        assert all(loaded[c].equal(v) for c, v in BANK.items())
        assert loaded["calm"].metadata == {"concept": "calm", "model_type": "llama", "b": "2"}
    with pytest.raises(FileFormatError, match="is not the output of a block"):
        SteeringVector({"lm_head": A}).save(path, format=NUMBERS)


def test_a_pattern_of_files_of_one_s_own(tmp_path):
    for concept, v in BANK.items():
        v.save(tmp_path / f"{concept}.mine", format=NAMES)
    loaded = VectorBank.load(tmp_path / "*.mine", format=NAMES)
    assert loaded.concepts == ("calm", "loud")


def test_a_format_may_read_when_asked(tmp_path):
    read = []

    def rows():
        read.append(1)
        return {"2": A}

    lazy = types.SimpleNamespace(SUFFIX=".x", read=lambda path: {"c": Stored({"2": 16}, {}, rows)}, write=_write)
    loaded = VectorBank.load(tmp_path / "v.x", format=lazy)
    assert (loaded.concepts, loaded.sites, read) == (("c",), ("2",), [])
    assert loaded["c"].equal(SteeringVector({"2": A}))
    assert read == [1]


def test_a_vector_from_it_is_checked_like_any_other(tmp_path):
    model = llama()
    x = torch.tensor([[1, 2]])
    v = fit(model, positive=x, negative=x + 1, sites="model.layers.1", progress=False)
    v.save(tmp_path / "v.mine", format=NAMES)
    for act in (
        lambda other: SteeringVector.load(tmp_path / "v.mine", other, format=NAMES),
        lambda other: Steerer(other, SteeringVector.load(tmp_path / "v.mine", format=NAMES)),
    ):
        act(model)
        with pytest.raises(ModelMismatchError):
            act(llama(num_hidden_layers=2))


def test_a_module_is_a_format(tmp_path, monkeypatch):
    (tmp_path / "csvs.py").write_text(
        "import torch\n"
        "from actsteer.files.lazy import Named\n"
        "SUFFIX = '.csv'\n"
        "def read(path):\n"
        "    lines = [line.split(',') for line in path.read_text().split()]\n"
        "    return {path.stem: Named({s: torch.tensor([float(x) for x in row]) for s, *row in lines}, {})}\n"
        "def write(path, vectors):\n"
        "    (vector,) = vectors.values()\n"
        "    lines = (','.join([s, *map(str, row.tolist())]) for s, row in vector.directions.items())\n"
        "    path.write_text('\\n'.join(lines))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import csvs

    BANK["calm"].save(tmp_path / "calm.csv", format=csvs)
    assert SteeringVector.load(tmp_path / "calm.csv", format=csvs).equal(BANK["calm"])
    del sys.modules["csvs"]
