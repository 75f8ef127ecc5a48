"""The native format: what is saved is loaded bit for bit, and nothing else is loaded at all."""

import copy
import json
import os
import pickle
import struct
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load, save, save_file
from torch import nn

from actsteer import (
    Add,
    Clamp,
    ConceptErasure,
    CosineAbove,
    FileFormatError,
    ModelMismatchError,
    Not,
    ProbeAbove,
    ProjectionAbove,
    SiteMap,
    Soft,
    Steerer,
    SteeringVector,
    UnsupportedModelError,
    VectorBank,
    fit,
    fold,
    unfold,
)
from actsteer.files import sealed
from actsteer.files.opened import Opened
from actsteer.sites import fingerprint
from tests.strategies import STORED, stored_banks

BANK = VectorBank({"nine": SteeringVector({"2": torch.tensor([1.0, -2.0])}, concept="nine")})
DATA = Path(__file__).parent / "data"
ENTRY = {"sites": {"2": {}}, "metadata": {}}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A path for the examples of one test after the other."""
    return tmp_path_factory.mktemp("native") / "bank.safetensors"


def refuse(file: Path, content: bytes, match: str = ".") -> None:
    file.write_bytes(content)
    with pytest.raises(FileFormatError, match=match):
        VectorBank.load(file)


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_seal(document: object, tensors: dict[str, torch.Tensor]) -> bytes:
    """A file with this document, whatever it says, and the digest that belongs to it."""
    text = document if isinstance(document, str) else json.dumps(document)
    return save(tensors, metadata={"actsteer": text, "sha256": sealed.digest(tensors, text)})


# --- identity ----------------------------------------------------------------------------------------------------
@given(bank=stored_banks())
def test_loading_a_saved_bank_is_the_identity_bit_for_bit(file, bank):
    bank.save(file)
    loaded = VectorBank.load(file)
    assert loaded.concepts == bank.concepts
    for concept, vector in bank.items():
        twin = loaded[concept]
        assert (twin.sites, twin.metadata) == (vector.sites, vector.metadata)
        assert all(twin[site].dtype is vector[site].dtype for site in vector)
        assert all(torch.equal(twin[site].view(torch.uint8), vector[site].view(torch.uint8)) for site in vector)


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("concept", ["nine", "a/b", "100%", "a%2Fb", "層 é", None])
def test_a_vector_is_saved_under_its_concept(tmp_path, dtype, concept):
    v = SteeringVector({"layers/0": torch.tensor([0.5, -0.0], dtype=dtype)}, concept=concept, metadata={"a": "1"})
    v.save(tmp_path / "v.safetensors")
    assert VectorBank.load(tmp_path / "v.safetensors").concepts == (concept or "vector",)
    loaded = SteeringVector.load(tmp_path / "v.safetensors")
    assert loaded.equal(v)
    assert loaded.metadata == v.metadata
    assert loaded["layers/0"].signbit().tolist() == [False, True]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("a", "b/c"), ("a/b", "c")),
        (("a/b", "c"), ("a%2Fb", "c")),
        (("%", "c"), ("%25", "c")),
        (("", "a/b"), ("/a", "b")),
    ],
)
def test_names_with_slashes_and_percents_do_not_collide(tmp_path, one, other):
    numbers = {one: 1.0, other: 2.0}
    bank = VectorBank({c: SteeringVector({s: torch.tensor([x])}) for (c, s), x in numbers.items()})
    bank.save(tmp_path / "b.safetensors")
    loaded = VectorBank.load(tmp_path / "b.safetensors")
    assert {(c, s): float(loaded[c][s]) for c, s in numbers} == numbers


def test_a_file_of_several_vectors_is_not_one_vector(tmp_path):
    (BANK | VectorBank({"ten": BANK["nine"]})).save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"expected one vector, got \['nine', 'ten'\]; open it with VectorBank.load"):
        SteeringVector.load(tmp_path / "b.safetensors")


def test_it_is_a_plain_safetensors_file(file):
    BANK.save(file)
    assert {name: t.tolist() for name, t in load(file.read_bytes()).items()} == {"nine/2": [1.0, -2.0]}


def test_nothing_is_pickled(file, monkeypatch):
    def explode(*_args, **_kwargs):
        raise AssertionError("pickle was called")

    for module in (torch, pickle):
        for name in ("load", "save", "loads", "dump", "dumps", "Unpickler", "Pickler"):
            monkeypatch.setattr(module, name, explode, raising=False)
    BANK.save(file)
    assert VectorBank.load(file)["nine"].equal(BANK["nine"])


# --- atomicity ---------------------------------------------------------------------------------------------------
class Failing:
    """A file that takes half of what is written and then fails."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, payload):
        self.file.write(payload[: len(payload) // 2])
        raise OSError("no space left")


def fail(*_args, **_kwargs):
    raise OSError("no space left")


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
def test_a_failure_in_the_middle_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, where):
    target = tmp_path / "bank.safetensors"
    BANK.save(target)
    before = target.read_bytes()
    open_really = Path.open
    with monkeypatch.context() as patch:
        if where == "write":
            patch.setattr(Path, "open", lambda self, *mode: Failing(open_really(self, *mode)))
        elif where == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="no space left"):
            VectorBank({}).save(target)
    assert list(tmp_path.iterdir()) == [target]
    assert target.read_bytes() == before


def test_saving_replaces_the_file_and_leaves_no_other(tmp_path):
    target = tmp_path / "bank.safetensors"
    for bank in (BANK, VectorBank({})):
        bank.save(target)
    assert VectorBank.load(target).concepts == ()
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_stays_a_link(tmp_path):
    target, link = tmp_path / "bank.safetensors", tmp_path / "latest.safetensors"
    link.symlink_to(target)
    BANK.save(link)
    assert link.is_symlink()
    assert VectorBank.load(target).concepts == ("nine",)


# --- reading on demand -------------------------------------------------------------------------------------------
def large(path: Path, *, concepts: int = 1500, d: int = 4, site: str = "2") -> VectorBank:
    rows = torch.arange(concepts * d, dtype=torch.float32).reshape(concepts, d) / 8
    bank = VectorBank({f"c{i}": SteeringVector({site: row}, concept=f"c{i}") for i, row in enumerate(rows)})
    bank.save(path)
    return bank


def test_of_a_large_bank_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    path = tmp_path / "large.safetensors"
    bank = large(path)
    read: list[str] = []
    tensor = Opened.tensor
    monkeypatch.setattr(Opened, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    loaded = VectorBank.load(path)
    assert (loaded.concepts, loaded.sites, len(loaded), "c7" in loaded) == (bank.concepts, ("2",), 1500, True)
    both = loaded.select("c9", "c7") | VectorBank({"mine": SteeringVector({"2": torch.zeros(4)})})
    assert read == []
    assert loaded["c7"].equal(bank["c7"])
    assert loaded["c7"] is loaded["c7"]
    assert read == ["c7/2"]
    assert both.concepts == ("c9", "c7", "mine")
    assert both["c9"].equal(bank["c9"])
    assert read == ["c7/2", "c9/2"]
    assert loaded.combine({"c1": 2.0})["2"].tolist() == (2 * bank["c1"])["2"].tolist()
    assert read == ["c7/2", "c9/2", "c1/2"]
    assert all(vector.equal(bank[concept]) for concept, vector in loaded.items())


def test_a_large_bank_is_read_on_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bank = large(Path("large.safetensors"))
    loaded = VectorBank.load("large.safetensors")
    monkeypatch.chdir(tmp_path.parent)
    assert loaded["c7"].equal(bank["c7"])


def test_in_a_large_bank_each_vector_is_verified_when_it_is_read(tmp_path):
    path = tmp_path / "large.safetensors"
    bank = large(path)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # a bit of the last tensor
    path.write_bytes(content)
    loaded = VectorBank.load(path)
    names = sorted(bank.concepts, key=lambda name: f"{name}/2")
    damaged = [name for name in names if not readable(loaded, name)]
    assert len(damaged) == 1
    with pytest.raises(FileFormatError, match=f"the SHA-256 of '{damaged[0]}' does not match"):
        loaded[damaged[0]]
    with pytest.raises(FileFormatError, match="the SHA-256 of"):
        loaded.items()
    path.write_bytes(content[:-1])
    refuse(path, content[:-1], "is it truncated")


def readable(bank: VectorBank, concept: str) -> bool:
    try:
        return bool(bank[concept])
    except FileFormatError:
        return False


def test_a_large_file_that_changes_while_it_is_open_is_refused(tmp_path):
    path = tmp_path / "large.safetensors"
    large(path)
    loaded = VectorBank.load(path)
    first = loaded["c0"]
    path.write_bytes(b"")
    with pytest.raises(FileFormatError, match="the file has changed since it was opened; open it again"):
        loaded["c1"]
    assert loaded["c0"] is first


@pytest.mark.slow
def test_a_large_bank_is_saved_over_itself_pickled_and_copied(tmp_path):
    path = tmp_path / "large.safetensors"
    bank = large(path)
    VectorBank.load(path).save(path)
    for twin in (copy.deepcopy(VectorBank.load(path)), pickle.loads(pickle.dumps(VectorBank.load(path)))):
        path.rename(tmp_path / "away.safetensors")
        assert all(vector.equal(bank[concept]) for concept, vector in twin.items())
        (tmp_path / "away.safetensors").rename(path)


def test_a_small_file_may_change_after_it_was_read(tmp_path):
    BANK.save(tmp_path / "b.safetensors")
    loaded = VectorBank.load(tmp_path / "b.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"")
    assert loaded["nine"].equal(BANK["nine"])


def test_a_pattern_opens_many_files(tmp_path):
    for name in ("b", "a"):
        VectorBank({name: SteeringVector({"2": torch.ones(2)}, concept=name)}).save(tmp_path / f"{name}.safetensors")
    assert VectorBank.load(tmp_path / "*.safetensors").concepts == ("a", "b")
    with pytest.raises(FileNotFoundError, match="no file has such a name"):
        VectorBank.load(tmp_path / "x*.safetensors")
    VectorBank({"a": SteeringVector({"2": torch.ones(2)}, concept="a")}).save(tmp_path / "c.safetensors")
    with pytest.raises(FileFormatError, match=r"c.safetensors: the concept 'a' is in .*a.safetensors too"):
        VectorBank.load(tmp_path / "*.safetensors")
    VectorBank({"c": SteeringVector({"2": torch.ones(3)})}).save(tmp_path / "c.safetensors")
    with pytest.raises(FileFormatError, match=r"site '2' has 3 features, in .*a.safetensors 2; are they of one model"):
        VectorBank.load(tmp_path / "*.safetensors")


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    BANK.save(tmp_path / "[ab].safetensors")
    assert VectorBank.load(tmp_path / "[ab].safetensors").concepts == ("nine",)


# --- the format, for ever ----------------------------------------------------------------------------------------
def test_a_file_of_format_1_is_read_for_ever():
    bank = VectorBank.load(DATA / "format1.safetensors")
    assert bank.concepts == ("nine", "polite/kind 層", "refusal")
    nine = bank["nine"]
    assert nine.sites == ("2", "layers.0.mlp:in")
    assert nine["2"].tolist() == [1.0, -2.0, 0.125]
    assert nine["layers.0.mlp:in"].dtype is torch.bfloat16
    assert nine["layers.0.mlp:in"].tolist() == [0.5, -0.0]
    assert nine.metadata == {
        "concept": "nine",
        "model": "MLP:1234:0123456789abcdef",
        "weights": "float32:0123456789abcdef",
        "axis 2": "1",
    }
    assert bank["polite/kind 層"].metadata == {"concept": "polite"}
    assert bank["refusal"].metadata == {"intervention": "ablate"}
    assert bank["refusal"]["4"].tolist() == [1 / 3]
    assert bank["refusal"]["4"].dtype is torch.float64


# --- what the vectors mean ---------------------------------------------------------------------------------------
def document(path: Path) -> dict:
    with safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()["actsteer"])


def test_the_document_says_what_the_vectors_mean(tmp_path):
    sites = {"2": torch.ones(2), "layers.3:in": torch.ones(1), "a:out.0": torch.ones(1), "x:in.hidden": torch.ones(1)}
    metadata = {"intervention": "ablate", "axis 2": "1", "model": "MLP:3:0123456789abcdef"}
    SteeringVector(sites, concept="c", metadata=metadata).save(tmp_path / "v.safetensors")
    entry = document(tmp_path / "v.safetensors")["concepts"]["c"]
    assert entry["intervention"] == "ablate"
    assert entry["model"] == "MLP:3:0123456789abcdef"
    assert {site: (own["side"], own["axis"]) for site, own in entry["sites"].items()} == {
        "2": ("output", "1"),
        "layers.3:in": ("input", None),
        "a:out.0": ("output", None),
        "x:in.hidden": ("input", None),
    }


def test_what_the_document_alone_says_is_kept(file):
    entry = {"sites": {"2": {"axis": 1}}, "metadata": {}, "intervention": "ablate", "model": "MLP:3:0123456789abcdef"}
    file.write_bytes(with_seal(bank_document(concepts={"nine": entry}), {"nine/2": torch.ones(2)}))
    assert VectorBank.load(file)["nine"].metadata == {
        "axis 2": "1",
        "intervention": "ablate",
        "model": "MLP:3:0123456789abcdef",
    }


def test_a_vector_does_what_it_is_meant_for(tmp_path):
    model, x = nn.Sequential(nn.Identity()), torch.tensor([[3.0, 4.0]])
    v = SteeringVector({"0": torch.tensor([1.0, 0.0])}, concept="c", metadata={"intervention": "ablate"})
    v.save(tmp_path / "v.safetensors")
    for meant in (v, SteeringVector.load(tmp_path / "v.safetensors")):
        with Steerer(model, meant):
            assert model(x).tolist() == [[0.0, 4.0]]
        with Steerer(model, meant, intervention=Add()):
            assert model(x).tolist() == [[4.0, 4.0]]
    clamped = SteeringVector({"0": torch.ones(2)}, metadata={"intervention": "clamp"})
    with pytest.raises(UnsupportedModelError, match=r"'vector' is meant for the intervention 'clamp', .* pass interv"):
        Steerer(model, clamped)
    with Steerer(model, VectorBank({"c": clamped, "d": v}), intervention={"c": Clamp(0.0)}):
        assert torch.allclose(model(x), torch.tensor([[0.0, 0.5]]))


# --- the model's fingerprint -------------------------------------------------------------------------------------
def made(*sizes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(a, b) for a, b in pairwise(sizes)))


def test_a_vector_from_a_file_is_checked_when_it_is_attached(tmp_path):
    model, x = made(2, 3, 1), torch.randn(4, 2)
    v = fit(model, positive=x, negative=-x, sites="0", concept="c")
    v.save(tmp_path / "v.safetensors")
    VectorBank({"c": v}).save(tmp_path / "b.safetensors")
    for loaded in (SteeringVector.load(tmp_path / "v.safetensors"), VectorBank.load(tmp_path / "b.safetensors")):
        Steerer(model, loaded)
        Steerer(copy.deepcopy(model).to(torch.bfloat16), loaded)  # the same weights, rounded
        with pytest.warns(UserWarning, match=r"the vector 'c' was made for a Sequential .* with other weights"):
            Steerer(made(2, 3, 1, seed=1), loaded)
        for other in (made(2, 3, 2), nn.Sequential(*made(2, 3), nn.ReLU(), nn.Linear(3, 1))):
            with pytest.raises(ModelMismatchError, match="the vector 'c' was made for a Sequential with 13 parameters"):
                Steerer(other, loaded)
    with pytest.raises(ModelMismatchError, match=r"b.safetensors: the vector 'c' was made for"):
        VectorBank.load(tmp_path / "b.safetensors", made(2, 3, 2))


def test_the_model_may_be_named_when_saving(tmp_path):
    model, v = made(2, 3, 1), SteeringVector({"0": torch.ones(3)}, concept="c")
    v.save(tmp_path / "v.safetensors", model=model)
    loaded = SteeringVector.load(tmp_path / "v.safetensors", model)
    assert loaded.equal(v) and loaded.metadata["model"].startswith("Sequential:13:") and "model" not in v.metadata
    with pytest.raises(ModelMismatchError, match="the vector 'c' was made for"):
        Steerer(made(2, 3, 2), loaded)
    with pytest.raises(ModelMismatchError, match="the vector 'c' was made for"):
        loaded.save(tmp_path / "w.safetensors", model=made(2, 3, 2))
    assert not (tmp_path / "w.safetensors").exists()


@pytest.mark.parametrize(
    "derived",
    [
        lambda v: 2 * v,
        lambda v: v / 2,
        lambda v: -v,
        lambda v: v.unit(),
        lambda v: v.select("0"),
        lambda v: v.to(dtype=torch.float64),
        lambda v: v + v,
        lambda v: v.project(v),
        copy.deepcopy,
        lambda v: pickle.loads(pickle.dumps(v)),
    ],
)
def test_what_is_derived_from_it_is_checked_too(tmp_path, derived):
    x = torch.randn(4, 2)
    fit(made(2, 3, 1), positive=x, negative=-x, sites="0").save(tmp_path / "v.safetensors")
    with pytest.raises(ModelMismatchError):
        Steerer(made(2, 3, 2), derived(SteeringVector.load(tmp_path / "v.safetensors")))


def test_what_was_fitted_in_this_process_is_checked_as_what_is_from_a_file():
    x, model, wider = torch.randn(4, 2), made(2, 3, 1), made(2, 3, 2)
    v = fit(model, positive=x, negative=-x, sites="0")
    for used in (v, 2 * v, v + v, v.unit(), pickle.loads(pickle.dumps(v)), VectorBank({"v": v}).select("v")):
        Steerer(model, used)
        with pytest.raises(ModelMismatchError, match="was made for a Sequential with 13 parameters"):
            Steerer(wider, used)
        with pytest.warns(UserWarning, match="with other weights"):
            Steerer(made(2, 3, 1, seed=1), used)
    edit = fit(model, positive=torch.randn(9, 2), negative=torch.randn(9, 2), sites="0", estimator=ConceptErasure())
    with pytest.raises(ModelMismatchError):
        Steerer(wider, edit)


def test_what_steering_writes_into_the_weights_does_not_count():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 3, bias=False), nn.Linear(3, 1))
    x = torch.randn(9, 2)
    v, w = (fit(model, positive=x, negative=-x, sites=site) for site in ("0", "1"))
    folded = fold(model, v, verify_on=x)
    Steerer(folded, w)
    twice = fold(folded, w, verify_on=x)
    with Steerer(model, v), Steerer(model, w):
        assert torch.allclose(model(x), twice(x), atol=1e-5)
    with Steerer(model, v, backend="fold") as steerer:
        Steerer(model, w, gate=ProjectionAbove(w, 0.0))
        steerer.c = 2.0
        inside = fit(model, positive=x, negative=-x, sites="1")
        model(x)
    Steerer(model, inside)
    fold(model, v, verify_on=x, inplace=True)
    Steerer(model, w)
    unfold(model)
    Steerer(model, w)
    for kind in (torch.float16, torch.bfloat16):
        Steerer(fold(model, v, verify_on=x).to(kind), w)
    with Steerer(folded.eval(), v, backend="fold"):
        folded(x)
    Steerer(folded, w)
    with torch.no_grad():
        folded[2].weight += 1  # a training since
    with pytest.warns(UserWarning, match="with other weights"):
        Steerer(folded, w)


def test_folds_may_be_taken_out_in_any_order():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(2, 3, bias=False), nn.Linear(3, 3, bias=False)), torch.randn(9, 2)
    v, w = (fit(model, positive=x, negative=-x, sites=site) for site in ("0", "1"))
    first, second = (Steerer(model, own, backend="fold") for own in (v, w))
    first.attach()
    second.attach()
    first.detach()
    Steerer(model, v)
    second.detach()
    Steerer(model, v)
    fold(model, v, verify_on=x, inplace=True)
    fold(model, w, verify_on=x, inplace=True)
    unfold(model)
    Steerer(model, v)
    fold(model, w, verify_on=x)
    unfold(model)
    Steerer(model, v)
    assert not any(fingerprint._before.get(module) for module in model.modules())


def test_a_lazy_layer_elsewhere_is_no_hindrance():
    x = torch.randn(5, 4)
    for backend in ("fold", "tap"):
        model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU(), nn.LazyLinear(3, bias=False)).eval()
        with Steerer(model, SteeringVector({"0": torch.ones(4)}), backend=backend):
            model(x)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LazyLinear(3)).eval()
    fold(model, SteeringVector({"0": torch.ones(4)}), verify_on=x, inplace=True)


@pytest.mark.parametrize("added", [nn.CrossEntropyLoss(), nn.Dropout(), nn.Softmax(dim=-1)])
def test_what_was_added_or_is_the_same_in_evaluation_is_no_other_layer(added):
    model, x = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Dropout()).eval(), torch.randn(4, 2)
    v = fit(model, positive=x, negative=-x, sites="0")
    model.add_module("added", added)
    Steerer(model, v)
    model[2] = nn.Identity()
    Steerer(nn.SyncBatchNorm.convert_sync_batchnorm(model), v)


def test_the_vector_of_a_gate_is_checked_too():
    x, model = torch.randn(4, 2), made(2, 3, 1)
    v = fit(model, positive=x, negative=-x, sites="0")
    plain = SteeringVector({"0": v["0"]})
    for gate in (
        ProjectionAbove(v, 0.0),
        CosineAbove(v, 0.0),
        Soft(ProbeAbove(v, offset=0.0)),
        Not(ProbeAbove(v, offset=0.0)),
    ):
        Steerer(model, plain, gate=gate)
        with pytest.raises(ModelMismatchError, match=r"the gate .* was made for a Sequential with 13 parameters"):
            Steerer(made(2, 3, 2), plain, gate=gate)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.filterwarnings("ignore:.* did not run in the block")
def test_layers_of_the_same_sizes_are_told_apart_by_class(saved, tmp_path):
    relu, tanh = (nn.Sequential(nn.Linear(2, 3), kind(), nn.Linear(3, 1)) for kind in (nn.ReLU, nn.Tanh))
    tanh.load_state_dict(relu.state_dict())
    v = fit(relu, positive=torch.ones(4, 2), negative=torch.zeros(4, 2), sites="0")
    if saved:
        v.save(tmp_path / "v.safetensors")
        v = SteeringVector.load(tmp_path / "v.safetensors")
    Steerer(relu, v)
    Steerer(nn.DataParallel(relu), v)
    with pytest.warns(UserWarning, match="with 1 ReLU, 0 Tanh among its layers, and the model has 0 ReLU, 1"):
        Steerer(tanh, v)
    with Steerer(relu, v):  # a steered module is of its class
        Steerer(relu, v)


def test_a_loaded_vector_is_carried_over_on_purpose(tmp_path):
    x = torch.randn(4, 2)
    fit(made(2, 3, 1), positive=x, negative=-x, sites="0").save(tmp_path / "v.safetensors")
    v = SteeringVector.load(tmp_path / "v.safetensors")
    Steerer(made(2, 3, 2), SteeringVector({site: v[site] for site in v}))
    Steerer(made(2, 3, 2), v.transport(SiteMap({"0": ("0", torch.eye(3))})))


# --- damage ------------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.parametrize("site", ["2", "層", "\x1f"], ids=ascii)
def test_every_single_flipped_bit_is_refused(file, site):
    VectorBank({"nine": SteeringVector({site: torch.tensor([1.0, -2.0])}, concept="nine")}).save(file)
    whole = file.read_bytes()
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        refuse(file, bytes(damaged))


def test_every_truncation_and_extension_is_refused(file):
    BANK.save(file)
    whole = file.read_bytes()
    for length in range(len(whole)):
        refuse(file, whole[:length])
    refuse(file, whole + b"\0")


def test_a_changed_number_and_a_changed_document_are_named(file):
    BANK.save(file)
    whole = file.read_bytes()
    refuse(file, whole[:-1] + b"\x3f", "the SHA-256 of 'nine' does not match; the file was altered")
    refuse(file, whole.replace(rb"\"add\"", rb"\"Add\""), "the SHA-256 does not match; the file was altered")
    refuse(file, whole[:-1], "not a readable safetensors file .* is it truncated")


# --- hostile files -----------------------------------------------------------------------------------------------
@given(content=st.binary(max_size=200))
def test_random_bytes_are_refused(file, content):
    refuse(file, content)


@given(text=st.binary(max_size=60), data=st.binary(max_size=20))
def test_random_headers_are_refused(file, text, data):
    refuse(file, safetensors(text, data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(header=st.dictionaries(st.sampled_from(["__metadata__", "nine/2"]), json_values))
def test_headers_of_random_json_are_refused(file, header):
    refuse(file, safetensors(header, b"\0" * 8))


@given(document=json_values)
def test_documents_of_random_json_are_refused_even_with_a_valid_digest(file, document):
    refuse(file, with_seal(document, {"nine/2": torch.ones(2)}))


@given(
    concepts=json_values
    | st.dictionaries(st.just("nine"), json_values)
    | st.fixed_dictionaries({"nine": st.fixed_dictionaries({"sites": json_values, "metadata": json_values})})
)
def test_concepts_of_random_json_are_refused_even_with_a_valid_digest(file, concepts):
    refuse(file, with_seal({"format": 1, "kind": "bank", "concepts": concepts}, {"nine/2": torch.ones(2)}))


HOSTILE = {
    "empty": b"",
    "pickle": pickle.dumps({"nine/2": [1.0]}),
    "header length over the file's": struct.pack("<Q", 2**20) + b"{}",
    "header length of 2^63": struct.pack("<Q", 2**63) + b"{}",
    "header length of 2^64 - 1": struct.pack("<Q", 2**64 - 1) + b"{}",
    "nested header": safetensors(b'{"a":' * 100_000 + b"1" + b"}" * 100_000),
    "no header": safetensors({}),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_bytes_are_refused(file, content):
    refuse(file, content)


@pytest.mark.parametrize("dtype", ["F4", "F6_E2M3", "F8_E8M0", "F8_E4M3", "C64", "U64", "BOOL", "X"])
@pytest.mark.parametrize(
    "shape", [[], [8], [0, 2**62], [0, 2**63], [2**32, 2**32], [0] * 200, [-1]], ids=lambda shape: str(shape)[:22]
)
def test_hostile_tensors_are_refused(file, dtype, shape):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, 0 if 0 in shape else 8]}
    metadata = {"actsteer": "{}", "sha256": ""}
    refuse(file, safetensors({"__metadata__": metadata, "nine/2": entry}, b"" if 0 in shape else b"\0" * 8))


@pytest.mark.parametrize("document", ["[" * 100_000, "", "{", "1" * 5000, "{'a': 1}"], ids=lambda text: text[:5])
def test_a_document_that_is_not_json_is_refused(file, document):
    refuse(file, with_seal(document, {}), "the header's document is not JSON")


def test_a_foreign_safetensors_file_is_refused(file):
    for metadata in (None, {"format": "pt"}, {"actsteer": "{}"}, {"sha256": ""}):
        save_file({"weight": torch.ones(2)}, file, metadata=metadata)
        with pytest.raises(FileFormatError, match="a safetensors file that actsteer did not write"):
            VectorBank.load(file)


def bank_document(**changes: object) -> dict[str, object]:
    return {"format": sealed.VERSION, "kind": "bank", "concepts": {"nine": ENTRY}} | changes


def test_the_document_that_the_hostile_ones_differ_from_is_accepted(file):
    file.write_bytes(with_seal(bank_document(), {"nine/2": torch.ones(2)}))
    assert VectorBank.load(file).concepts == ("nine",)


@pytest.mark.parametrize("version", [2, 3, 10**9])
def test_a_newer_version_asks_for_an_upgrade_whatever_its_digest(file, version):
    content = with_seal(bank_document(format=version), {"nine/2": torch.ones(2)})
    refuse(file, content, f"format {version}, this version reads up to 1; upgrade actsteer")
    refuse(file, content[:-1] + b"\0", "upgrade actsteer")


@pytest.mark.parametrize("version", [None, "1", "2", 0, -1, 1.5, float("inf")], ids=repr)
def test_a_version_that_was_never_written_is_refused(file, version):
    refuse(file, with_seal(bank_document(format=version), {"nine/2": torch.ones(2)}))


def test_a_document_without_a_version_is_refused(file):
    document = bank_document()
    del document["format"]
    refuse(file, with_seal(document, {"nine/2": torch.ones(2)}))


@pytest.mark.parametrize("document", [bank_document(kind="statistics"), bank_document(kind=None), [], None], ids=str)
def test_a_file_of_another_kind_is_refused(file, document):
    refuse(file, with_seal(document, {"nine/2": torch.ones(2)}))


def test_the_kind_that_was_expected_is_named(file):
    refuse(
        file, with_seal(bank_document(kind="statistics"), {}), "expected a file of kind 'bank'; it holds something else"
    )


@pytest.mark.parametrize("tensors", [{}, {"nine/3": torch.ones(2)}, {"ten/2": torch.ones(2)}], ids=str)
def test_a_missing_tensor_is_refused(file, tensors):
    refuse(file, with_seal(bank_document(), tensors), "the document does not describe the tensors .* write it again")


@pytest.mark.parametrize("extra", ["nine/3", "ten/2", "weight", ""])
def test_a_tensor_that_is_not_in_the_document_is_refused(file, extra):
    tensors = {"nine/2": torch.ones(2), extra: torch.zeros(2)}
    refuse(file, with_seal(bank_document(), tensors), r"tensors \['.*'\] are not in the document; write it again")


@pytest.mark.parametrize(
    "direction", [torch.ones(2, 2), torch.tensor(1.0), torch.ones(2, dtype=torch.int32), torch.tensor([float("nan")])]
)
def test_a_tensor_that_is_no_direction_is_refused(file, direction):
    refuse(file, with_seal(bank_document(), {"nine/2": direction}))


def test_vectors_that_disagree_on_a_site_are_refused(file):
    document = bank_document(concepts={"nine": ENTRY, "ten": ENTRY})
    refuse(file, with_seal(document, {"nine/2": torch.ones(2), "ten/2": torch.ones(3)}))


def test_a_site_that_is_no_name_is_refused(file):
    document = bank_document(concepts={"nine": {"sites": [2], "metadata": {}}})
    refuse(file, with_seal(document, {"nine/2": torch.ones(2)}))


# --- paths -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["bank.ckpt", "bank", "bank.safetensors.bak", "bank.npz", "safetensors"])
def test_an_unknown_suffix_is_refused_both_ways(tmp_path, name):
    for act in (BANK.save, BANK["nine"].save, VectorBank.load, SteeringVector.load):
        with pytest.raises(FileFormatError, match=r"unknown format '.*'; name the file with .safetensors"):
            act(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_the_suffix_may_be_in_capitals(tmp_path):
    BANK.save(tmp_path / "BANK.SAFETENSORS")
    assert VectorBank.load(tmp_path / "BANK.SAFETENSORS").concepts == ("nine",)


def test_a_missing_file_and_folder_are_the_operating_system_s_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent"):
        VectorBank.load(tmp_path / "absent.safetensors")
    with pytest.raises(FileNotFoundError, match="absent"):
        BANK.save(tmp_path / "absent" / "bank.safetensors")


def test_a_side_that_is_not_the_site_s_is_refused(file):
    entry = ENTRY | {"sites": {"2": {"side": "input"}}}
    content = with_seal(bank_document(concepts={"nine": entry}), {"nine/2": torch.ones(2)})
    refuse(file, content, "concept 'nine': site '2' is not an input")
