"""A reader opens a file once: a file that is replaced meanwhile is read whole, as it was or as it is."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from actsteer import FileFormatError, Moments, Statistics, SteeringVector, VectorBank
from tests.zoo import llama


def vector(kind, value):
    """A vector whose numbers, metadata and size all tell which one it is."""
    d = int(value)
    return SteeringVector({f"model.layers.{n}": torch.full((d,), value) for n in (1, 2)}, concept=kind)


def bank(value, concepts):
    return VectorBank({f"c{i}": SteeringVector({"2": torch.full((int(value),), value)}) for i in range(concepts)})


def statistics(value):
    return Statistics({"2": Moments.of(torch.full((4, int(value)), value), covariance=True)})


def numbers(loaded):
    """Every number of what was loaded."""
    if isinstance(loaded, Statistics):
        return torch.cat([loaded["2"].mean, torch.full((loaded["2"].d,), loaded["2"].mean[0])])
    vectors = [loaded] if isinstance(loaded, SteeringVector) else [v for _, v in loaded.items()]
    return torch.cat([own[site].double() for own in vectors for site in own])


def write_pt(path, value):
    torch.save({n: torch.full((int(value),), value) for n in (1, 2)}, path)


def write_layers(path, value):
    save_file({f"layer{n}.v": torch.full((int(value),), value) for n in (1, 2)}, path)


def write_svec(path, value):
    path.write_text(json.dumps({"model_type": "llama", "directions": {"1": [value] * int(value)}}))


KINDS = {
    "a vector": ("v.safetensors", lambda path, x: vector("v", x).save(path), SteeringVector.load),
    "a bank": ("v.safetensors", lambda path, x: bank(x, 9).save(path), VectorBank.load),
    "a large bank": ("v.safetensors", lambda path, x: bank(x, 1200).save(path), VectorBank.load),
    "statistics": ("v.safetensors", lambda path, x: statistics(x).save(path), Statistics.load),
    "a control vector": ("v.gguf", lambda path, x: vector("v", x).save(path), SteeringVector.load),
    "tensors": ("v.pt", write_pt, lambda path: SteeringVector.load(path, llama())),
    "a svec": ("v.svec", write_svec, SteeringVector.load),
    "steering-lite": ("v.safetensors", write_layers, lambda path: SteeringVector.load(path, llama())),
}


@pytest.mark.parametrize(("name", "write", "load"), KINDS.values(), ids=KINDS.keys())
def test_a_file_that_is_replaced_once_it_is_open_is_read_as_it_was(tmp_path, monkeypatch, name, write, load):
    path, other = tmp_path / name, tmp_path / f"other{name[1:]}"
    write(path, 3.0)
    write(other, 4.0)
    really, replaced = Path.open, []

    def opened(self, *mode, **options):
        file = really(self, *mode, **options)
        if self == path and not replaced:
            replaced.append(other.replace(path))
        return file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        found = load(path)
    assert replaced
    assert numbers(found).unique().tolist() == [3.0]
    assert numbers(load(path)).unique().tolist() == [4.0]


@pytest.mark.parametrize("gone", ["replaced", "renamed", "deleted"])
def test_a_large_bank_is_read_on_whatever_happens_to_its_name(tmp_path, gone):
    path = tmp_path / "large.safetensors"
    bank(3.0, 1200).save(path)
    loaded = VectorBank.load(path)
    assert loaded["c0"]["2"].tolist() == [3.0] * 3
    match gone:
        case "replaced":
            bank(4.0, 1200).save(path)
        case "renamed":
            path.rename(tmp_path / "other.safetensors")
        case _:
            path.unlink()
    assert numbers(loaded).unique().tolist() == [3.0]
    if gone == "replaced":
        assert numbers(VectorBank.load(path)).unique().tolist() == [4.0]


def test_a_large_bank_that_is_written_to_where_it_lies_is_refused(tmp_path):
    path = tmp_path / "large.safetensors"
    bank(3.0, 1200).save(path)
    loaded = VectorBank.load(path)
    with path.open("r+b") as file:
        file.seek(-4, 2)
        file.write(b"\0\0\0\0")
    with pytest.raises(FileFormatError, match="the file has changed since it was opened"):
        loaded["c0"]


def test_a_bank_may_be_saved_over_itself_while_it_is_read(tmp_path):
    path = tmp_path / "large.safetensors"
    bank(3.0, 1200).save(path)
    loaded = VectorBank.load(path)
    VectorBank({"c0": loaded["c0"]}).save(path)
    assert loaded["c1199"]["2"].tolist() == [3.0] * 3
    assert VectorBank.load(path).concepts == ("c0",)
