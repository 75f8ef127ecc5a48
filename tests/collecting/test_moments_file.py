"""Files of statistics and of passes to go on with: a seal is no signature, so every shape and type is checked."""

import copy
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from actsteer import ActsteerError, ClassStatistics, FileFormatError, Moments, Statistics, collect
from actsteer.files import sealed

ROWS = torch.arange(12.0, dtype=torch.float64).reshape(4, 3)
PLAIN = Statistics({"0": Moments.of(ROWS, covariance=True), "1": Moments.of(ROWS[:, :2])}, metadata={"model": "m"})
CLASSES = ClassStatistics({label: Statistics({"0": Moments.of(ROWS + label)}) for label in (1, 2)})
MODEL = nn.Sequential(nn.Linear(2, 3), nn.ReLU()).double()
BATCHES = [torch.full((2, 2), float(i), dtype=torch.float64) for i in range(3)]


def contents(path):
    with safe_open(path, framework="pt") as file:
        return load_file(path), json.loads(file.metadata()["actsteer"])


def reseal(path, tensors, document):
    """The file with other contents, and the seal that belongs to them."""
    text = json.dumps(document)
    path.write_bytes(save(tensors, metadata={"actsteer": text, "sha256": sealed.digest(tensors, text)}))


def changed(path, change):
    tensors, document = contents(path)
    document = copy.deepcopy(document)
    change(tensors, document)
    reseal(path, tensors, document)


TENSORS = {
    "origin of another shape": lambda t: t.update({"0/0/origin": torch.zeros(4, dtype=torch.float64)}),
    "origin of no shape": lambda t: t.update({"0/0/origin": torch.zeros((), dtype=torch.float64)}),
    "origin of two axes": lambda t: t.update({"0/0/origin": torch.zeros(3, 1, dtype=torch.float64)}),
    "origin in float32": lambda t: t.update({"0/0/origin": torch.zeros(3)}),
    "total of one": lambda t: t.update({"0/0/total": torch.zeros(1, dtype=torch.float64)}),
    "total of none": lambda t: t.update({"0/0/total": torch.zeros(0, dtype=torch.float64)}),
    "total of whole numbers": lambda t: t.update({"0/0/total": torch.zeros(3, dtype=torch.int64)}),
    "second of a vector": lambda t: t.update({"0/0/second": torch.zeros(3, dtype=torch.float64)}),
    "second not square": lambda t: t.update({"0/0/second": torch.zeros(3, 4, dtype=torch.float64)}),
    "third of another size": lambda t: t.update({"0/0/third": torch.zeros(2, dtype=torch.float64)}),
    "fourth with an axis": lambda t: t.update({"0/0/fourth": torch.zeros(1, dtype=torch.float64)}),
    "no origin": lambda t: t.pop("0/0/origin"),
    "no total": lambda t: t.pop("0/1/total"),
    "no third": lambda t: t.pop("0/0/third"),
    "second alone": lambda t: [t.pop("0/0/third"), t.pop("0/0/fourth")],
    "one too many": lambda t: t.update({"0/9/origin": torch.zeros(3, dtype=torch.float64)}),
    "another name": lambda t: t.update({"weight": torch.zeros(3)}),
}


@pytest.mark.parametrize("change", TENSORS.values(), ids=TENSORS.keys())
def test_a_sealed_tensor_that_does_not_fit_is_refused(tmp_path, change):
    path = tmp_path / "s.safetensors"
    PLAIN.save(path)
    changed(path, lambda tensors, _: None)
    assert Statistics.load(path).sites == PLAIN.sites
    changed(path, lambda tensors, _: change(tensors))
    with pytest.raises(FileFormatError, match="the document does not describe the tensors"):
        Statistics.load(path)


def put(*keys, value):
    """A change of one entry of a document."""

    def change(document):
        for key in keys[:-1]:
            document = document[key]
        document[keys[-1]] = value

    return change


DOCUMENTS = {
    **{
        f"count {value!r}": put("classes", 0, "counts", "0", value=value) for value in (-1, 1.5, "4", True, None, 2**63)
    },
    **{f"label {value!r}": put("classes", 0, "label", value=value) for value in ("a", 1, [], 1.5, {}, True)},
    **{f"metadata {value!r}": put("metadata", value=value) for value in (None, [], "m", {"model": 1}, {"a": None})},
    **{f"classes {value!r}": put("classes", value=value) for value in (None, [], {}, "ab", [None], [{}], 3)},
    "a site too many": put("classes", 0, "counts", "2", value=1),
    "no counts": put("classes", 0, "counts", value=None),
    "no metadata": lambda document: document.pop("metadata"),
    "no label": lambda document: document["classes"][0].pop("label"),
    "two classes": lambda document: document["classes"].append({"label": 1, "counts": {}}),
    "one class twice": lambda document: document["classes"].append({"label": None, "counts": {}}),
}


@pytest.mark.parametrize("change", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_a_sealed_document_that_does_not_fit_is_refused(tmp_path, change):
    path = tmp_path / "s.safetensors"
    PLAIN.save(path)
    changed(path, lambda _, document: change(document))
    with pytest.raises(FileFormatError, match="the document does not describe the tensors"):
        Statistics.load(path)


CLASS_DOCUMENTS = {
    **{f"label {value!r}": put("classes", 0, "label", value=value) for value in (None, 2, [], 1.5, True)},
    "other sites": lambda document: document["classes"][0].update(counts={"7": 4}),
    "no classes": put("classes", value=[]),
}


@pytest.mark.parametrize("change", CLASS_DOCUMENTS.values(), ids=CLASS_DOCUMENTS.keys())
def test_sealed_classes_that_do_not_fit_are_refused(tmp_path, change):
    path = tmp_path / "s.safetensors"
    CLASSES.save(path)
    changed(path, lambda _, document: change(document))
    with pytest.raises(FileFormatError, match="the document does not describe the tensors"):
        ClassStatistics.load(path)


def test_classes_of_two_sizes_are_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    CLASSES.save(path)
    small = {f"1/0/{name}": torch.zeros(2, dtype=torch.float64) for name in ("origin", "total")}
    changed(path, lambda tensors, _: tensors.update(small))
    with pytest.raises(FileFormatError, match=r"expected float64 of shape \(3,\), got torch.float64 \(2,\)"):
        ClassStatistics.load(path)


RESUMED = {
    **{f"done {value!r}": put("done", value=value) for value in (-1, 1.0, "1", True, None)},
    **{f"axes {value!r}": put("axes", value=value) for value in (None, [], "0", {"0": "1"}, {"0": None}, {"0": 1.5})},
    **{f"batches {value!r}": put("batches", value=value) for value in (None, 1, [])},
    **{f"job {value!r}": put("job", value=value) for value in (None, [], "job", 3)},
    **{f"classes {value!r}": put("classes", value=value) for value in (None, 3, [3])},
    "another site": lambda document: document["classes"][0].update(counts={"1": 2}),
    "two kinds of rows": lambda document: document["classes"].append({"label": 1, "counts": {}}),
    "nothing": lambda document: [document.pop(key) for key in ("job", "axes", "done", "batches")],
}


@pytest.mark.parametrize("change", RESUMED.values(), ids=RESUMED.keys())
def test_a_sealed_pass_that_does_not_fit_is_refused_and_stays(tmp_path, change):
    path = tmp_path / "sums.safetensors"
    collect(MODEL, BATCHES, sites="0", checkpoint=path, progress=False)
    changed(path, lambda tensors, _: None)
    collect(MODEL, BATCHES, sites="0", checkpoint=path, progress=False)
    changed(path, lambda _, document: change(document))
    before = path.read_bytes()
    with pytest.raises(FileFormatError, match=r"sums\.safetensors"):
        collect(MODEL, BATCHES, sites="0", checkpoint=path, progress=False)
    assert path.read_bytes() == before


def test_another_pass_is_named_by_what_differs(tmp_path):
    path = tmp_path / "sums.safetensors"
    collect(MODEL, BATCHES, sites="0", checkpoint=path, progress=False)
    changed(path, lambda _, document: document["job"].update(more=1))
    with pytest.raises(ActsteerError, match=r"a checkpoint of another pass; \['more'\] differ"):
        collect(MODEL, BATCHES, sites="0", checkpoint=path, progress=False)
