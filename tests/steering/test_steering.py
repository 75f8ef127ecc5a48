"""Steering: a value, from which a Steerer takes all; what is loaded does what was saved, bit for bit, or is refused."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import nn

from actsteer import (
    Ablate,
    Add,
    Affine,
    And,
    Chain,
    Clamp,
    ConceptErasure,
    ConceptNotFoundError,
    CosineAbove,
    FileFormatError,
    KeepNorm,
    LowRank,
    ModelMismatchError,
    Not,
    NotFoldable,
    Or,
    ProbeAbove,
    ProjectionAbove,
    Replace,
    Rotate,
    Saved,
    Soft,
    SoftProjection,
    Steerer,
    Steering,
    SteeringVector,
    StrengthError,
    VectorBank,
    fit,
    fold,
    optimize,
    sweep,
)
from actsteer.files import sealed
from actsteer.files.opened import Opened
from tests.strategies import eighths

D, ROOT = 4, Path(__file__).parent.parent.parent
G = torch.Generator().manual_seed(0)
ROWS, TOKENS = torch.randn(6, D, generator=G), torch.randn(3, 5, D, generator=G)
V = SteeringVector({"0": torch.tensor([1.0, -2.0, 0.5, 0.0])}, concept="kind", metadata={"offset 0": "0.1"})
W = SteeringVector({"0": torch.tensor([0.0, 1.0, 1.0, 3.0]), "1": torch.ones(D)}, concept="calm")
BANK = VectorBank({"kind": V, "calm": W})
PARTS = tuple(torch.randn(*shape, generator=G) for shape in ((2, D), (2, D), (2,)))
EDITS = {
    "low rank": LowRank({"0": PARTS, "1": PARTS}, concept="kind", metadata={"axis 0": "1"}),
    "affine": Affine({"0": (torch.randn(D, D, generator=G), torch.ones(D))}, concept="kind"),
    "soft projection": SoftProjection({"0": torch.eye(D) / 2, "1": torch.zeros(D, D)}, concept="kind"),
    "replace": Replace({"0": torch.full((D,), 0.3), "1": torch.ones(6, D)}),
    "norm kept": KeepNorm(LowRank({"1": PARTS}, concept="kind")),
}
PROBE = ProbeAbove(V, probability=0.3)
GATES = {
    "projection": ProjectionAbove(V, 1 / 3, per="token"),
    "cosine": CosineAbove(V, 0.1),
    "probe": PROBE,
    "soft": Soft(PROBE, width=0.7),
    "and": And(PROBE, Not(CosineAbove(V, 0.9))),
    "or": Or(Soft(ProjectionAbove(V, -0.1), width=0.2), CosineAbove(V, float("-inf"))),
}
INTERVENTIONS = {
    "add": Add(relative=True),
    "ablate": Ablate(one_sided=True),
    "ablate around": Ablate(around={"0": torch.ones(D), "1": torch.zeros(D)}),
    "clamp": Clamp(1 / 3),
    "rotate": Rotate(0.1),
    "chain": Chain(Ablate(), KeepNorm(Add()), Clamp(-0.1)),
    "for each": {"kind": Clamp(0.2), "calm": KeepNorm(Rotate(1))},
}
STEERINGS = {
    **{f"the edit {name}": Steering(edit, c=0.7) for name, edit in EDITS.items()},
    **{f"the gate {name}": Steering(BANK, c={"calm": 2}, gate=gate) for name, gate in GATES.items()},
    **{f"the intervention {name}": Steering(BANK, intervention=own) for name, own in INTERVENTIONS.items()},
    "gates of each": Steering(BANK, gate={"kind": GATES["and"], "calm": GATES["and"]}),
    "a strength for each row": Steering(BANK, c={"kind": torch.linspace(-1, 1, 6), "calm": 0.1}),
    "a strength on sites": Steering(BANK, c=1e-3, sites=["1", "0"]),
    "one site": Steering(BANK, sites="1"),
    "vectors alone": Steering(V),
}
SPREAD = {
    "a word": "last",
    "an index": -2,
    "indices": [0, 3],
    "a slice": slice(1, None, 2),
    "a mask": torch.tensor([True, False, True, True, False]),
    "for each": {"kind": "prompt", "calm": slice(None, 2)},
}


class Network(nn.Module):
    """Two sites, "0" and "1", and tokens by name."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, part in {"0": nn.Linear(D, D), "1": nn.Linear(D, D), "2": nn.Linear(D, 3)}.items():
            self.add_module(name, part)

    def forward(self, hidden, attention_mask=None):
        for part in self.children():
            hidden = part(hidden)
        return hidden


MODEL = Network().eval()


def steered(steering, x=ROWS, **options):
    inputs = {"hidden": x}
    if x.ndim == 3:
        inputs["attention_mask"] = torch.ones(x.shape[:2], dtype=torch.long)
    with torch.no_grad(), Steerer(MODEL, steering, **options):
        return MODEL(**inputs)


def again(steering, tmp_path, **options):
    steering.save(tmp_path / "s.safetensors")
    return Steering.load(tmp_path / "s.safetensors", **options)


def document(path: Path) -> dict:
    with safe_open(path, framework="pt") as opened:
        return json.loads(opened.metadata()["actsteer"])


def with_document(path: Path, changed: dict) -> None:
    """The file with another document, whatever it says, and the seal that belongs to it."""
    text, tensors = json.dumps(changed), load_file(path)
    apart = {f"{c}/{s}" for c, entry in document(path).get("concepts", {}).items() for s in entry["sites"]}
    seal = sealed.digest({name: own for name, own in tensors.items() if name not in apart}, text)
    path.write_bytes(save(tensors, metadata={"actsteer": text, "sha256": seal}))


# --- a value ---------------------------------------------------------------------------------------------------------
def test_it_has_what_it_was_given():
    gate = GATES["and"]
    steering = Steering(BANK, c=2, intervention=Clamp(1.0), gate={"kind": gate}, positions="last", sites=["0"])
    assert (steering.vectors, steering.concepts, steering.c) == (BANK, ("kind", "calm"), 2)
    assert steering.intervention == Clamp(1.0) and dict(steering.gate) == {"kind": gate}
    assert (steering.positions, steering.sites) == ("last", ("0",))
    plain = Steering(V)
    assert plain.vectors["kind"] is V and plain.is_plain and plain.c == 1.0
    assert (plain.intervention, plain.gate, plain.positions, plain.sites) == (None, None, None, None)
    edit = EDITS["low rank"]
    assert Steering(edit).intervention is edit and Steering(edit).vectors["kind"].equal(edit.constant)


def test_it_cannot_be_changed_and_copies_what_can_be():
    c, each, mask, sites = torch.ones(6), {"kind": 1.0}, torch.ones(5, dtype=torch.bool), ["0"]
    one, other = Steering(V, c=c, positions=mask, sites=sites), Steering(V, c=each, gate={"kind": PROBE})
    c.zero_()
    mask.zero_()
    each["calm"] = 3.0
    sites.append("1")
    assert torch.equal(one.c, torch.ones(6)) and bool(one.positions.all()) and one.sites == ("0",)
    assert dict(other.c) == {"kind": 1.0}
    for change in (lambda: setattr(one, "c", 2), lambda: other.c.update(kind=2), lambda: other.gate.clear()):
        with pytest.raises((dataclasses.FrozenInstanceError, AttributeError)):
            change()


@pytest.mark.parametrize("twin", [copy.copy, copy.deepcopy, lambda own: pickle.loads(pickle.dumps(own))])
def test_a_copy_does_the_same(twin):
    for steering in STEERINGS.values():
        assert torch.equal(steered(twin(steering)), steered(steering))


def test_its_repr_says_what_was_given_and_nothing_else():
    assert repr(Steering(V)) == "Steering(concepts=('kind',))"
    shown = "Steering(concepts=('kind', 'calm'), c={'kind': 2}, gate=Not(CosineAbove(site='0', threshold=0.1)))"
    assert repr(Steering(BANK, c={"kind": 2}, gate=Not(CosineAbove(V, 0.1)))) == shown


@pytest.mark.parametrize("name", STEERINGS)
def test_a_steerer_takes_all_from_it(name):
    steering = STEERINGS[name]
    parts = {part: own for part, own in steering.parts().items() if own is not None}
    given = steering.vectors
    if name.startswith("the edit"):
        given = parts.pop("intervention")
    assert torch.equal(steered(steering), steered(given, **parts))


@pytest.mark.parametrize("positions", SPREAD.values(), ids=SPREAD)
def test_positions_too(positions, tmp_path):
    steering = Steering(BANK, positions=positions)
    expected = steered(BANK, TOKENS, positions=positions)
    assert torch.equal(steered(steering, TOKENS), expected)
    assert torch.equal(steered(again(steering, tmp_path), TOKENS), expected)
    assert not torch.equal(expected, steered(BANK, TOKENS))


def test_what_is_given_beside_it_wins():
    steering = Steering(BANK, c=3, intervention=Clamp(1.0), gate=PROBE, sites="0")
    assert torch.equal(steered(steering, c=0), steered(BANK, c=0))
    assert torch.equal(
        steered(steering, c={"kind": 2.0}, intervention=Add(), gate=GATES["cosine"], sites="1"),
        steered(BANK, c={"kind": 2.0}, gate=GATES["cosine"], sites="1"),
    )
    rows = sweep(MODEL, steering, c=[0, 2], evaluate=lambda m: m(ROWS).sum(), progress=False)
    assert rows[1]["value"] == float(steered(steering, c=2).sum())
    assert Steerer(MODEL, steering).c == 3 and Steerer(MODEL, BANK).c == 1.0


def test_what_is_no_steering_is_refused_without_a_model():
    for options, error, match in (
        ({"c": {"calmer": 1.0}}, ConceptNotFoundError, "c names no concept.*'calmer'"),
        ({"gate": {"calmer": PROBE}}, ConceptNotFoundError, "gate names no concept.*'calmer'"),
        ({"intervention": {"calmer": Add()}}, ConceptNotFoundError, "intervention names no concept"),
        ({"positions": {"calmer": "last"}}, ConceptNotFoundError, "positions names no concept"),
        ({"c": float("nan")}, StrengthError, "nan"),
        ({"c": "2"}, StrengthError, "got '2'"),
        ({"gate": V}, TypeError, "got SteeringVector, which has no site"),
        ({"intervention": {"kind": "add"}}, TypeError, "intervention of 'kind': expected one such as"),
        ({"positions": "first"}, ValueError, "got 'first'"),
        ({"sites": [1]}, TypeError, "got 1"),
    ):
        with pytest.raises(error, match=match):
            Steering(BANK, **options)
    for wrong in (MODEL, "v.safetensors", {"0": torch.ones(D)}):
        with pytest.raises(TypeError, match="expected a SteeringVector, a VectorBank, or an edit"):
            Steering(wrong)
    with pytest.raises(TypeError, match=r"got Steering; dataclasses.replace"):
        Steering(Steering(V), c=2)
    assert dataclasses.replace(Steering(V, gate=PROBE), c=2).gate is PROBE
    with pytest.raises(TypeError, match="says itself how it edits"):
        Steering(EDITS["affine"], intervention=Add())


def test_of_some_concepts_it_is_the_same_steering():
    each = {"c": {"kind": 2.0, "calm": 3.0}, "gate": {"calm": PROBE}, "intervention": {"kind": Clamp(0.1)}}
    for concept in BANK.concepts:
        part = Steering(BANK, **each, sites="0").select(concept)
        rest = {name: {k: own for k, own in given.items() if k == concept} for name, given in each.items()}
        assert part.concepts == (concept,)
        assert torch.equal(steered(part), steered(BANK.select(concept), **rest, sites="0"))
    with pytest.raises(ConceptNotFoundError):
        Steering(BANK).select("calmer")


def test_it_is_folded_where_weights_can_carry_it():
    x = torch.randn(8, D)
    for steering in (Steering(BANK, c={"kind": 2.0}, sites="0"), Steering(EDITS["affine"], c=0.5)):
        assert torch.allclose(fold(MODEL, steering, verify_on=x)(ROWS), steered(steering), atol=1e-5)
    assert torch.allclose(fold(MODEL, Steering(V, c=2), 0.5, verify_on=x)(ROWS), steered(V, c=0.5), atol=1e-5)
    for options in ({"gate": PROBE}, {"positions": "last"}):
        with pytest.raises(NotFoldable, match=f"{next(iter(options))}: weights steer every row and token alike"):
            fold(MODEL, Steering(V, **options), verify_on=x)


# --- saved and loaded ------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("steering", STEERINGS.values(), ids=STEERINGS)
def test_what_is_loaded_does_the_same_bit_for_bit(steering, tmp_path):
    loaded = again(steering, tmp_path)
    assert repr(loaded) == repr(steering)
    assert torch.equal(steered(loaded), steered(steering))
    assert not torch.equal(steered(loaded), steered(steering, c=0))
    paths = tmp_path / "again.safetensors", tmp_path / "s.safetensors"
    loaded.save(paths[0])
    assert document(paths[0]) == document(paths[1])
    one, other = map(load_file, paths)
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


fractions = st.floats(-100, 100)
directions = eighths(D, dtype=torch.float32).map(lambda row: SteeringVector({"0": row + 20}, concept="drawn"))
scored = st.one_of(
    st.builds(ProjectionAbove, directions, fractions, per=st.sampled_from(["sequence", "last", "token"])),
    st.builds(CosineAbove, directions, st.floats(allow_nan=False)),
    st.builds(ProbeAbove, directions, offset=fractions, probability=st.floats(1e-9, 1 - 1e-9)),
)
gates = st.recursive(
    scored | st.builds(Soft, scored, width=st.floats(1e-3, 1e3)),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map(lambda many: And(*many)),
        st.lists(inner, min_size=1, max_size=3).map(lambda many: Or(*many)),
        inner.map(Not),
    ),
    max_leaves=5,
)
interventions = st.recursive(
    st.one_of(
        st.builds(Add, relative=st.booleans()),
        st.builds(Ablate, one_sided=st.booleans(), around=st.none() | eighths(D, dtype=torch.float32)),
        st.builds(Clamp, fractions),
        st.builds(Rotate, fractions),
    ),
    lambda inner: inner.map(KeepNorm) | st.lists(inner, min_size=1, max_size=3).map(lambda many: Chain(*many)),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """A path for the examples of one test after the other."""
    return tmp_path_factory.mktemp("steering") / "drawn.safetensors"


@given(gate=gates, intervention=interventions, c=st.integers(-4, 4) | fractions)
def test_whatever_it_is_made_of(file, gate, intervention, c):
    steering = Steering(BANK, c=c, gate=gate, intervention={"calm": intervention})
    steering.save(file)
    loaded = Steering.load(file)
    assert json.dumps(document(file)["gate"]) and repr(loaded) == repr(steering)
    assert torch.equal(steered(loaded, TOKENS), steered(steering, TOKENS))


def test_a_gate_keeps_what_is_known_of_its_vector(tmp_path):
    v = fit(MODEL, positive=ROWS, negative=-ROWS, sites="0")
    made = ProjectionAbove.between(v, positive=ROWS @ v["0"] + 3, negative=ROWS @ v["0"] - 3)
    made.threshold = 1 / 3 + 1e-17  # set after it was made
    loaded = again(Steering(V, gate=Not(made)), tmp_path).gate.gates[0]
    assert loaded.metadata == v.metadata and loaded.threshold == made.threshold
    assert torch.equal(loaded.direction, made.direction)
    other = nn.Sequential(nn.Linear(D, D), nn.Linear(D, 2))
    with pytest.raises(ModelMismatchError, match="the gate"):
        Steerer(other, again(Steering(SteeringVector({"0": V["0"]}), gate=made), tmp_path))


def test_what_is_shared_is_stored_and_loaded_once(tmp_path):
    many = VectorBank({f"c{i}": V for i in range(20)})
    loaded = again(Steering(many, gate=dict.fromkeys(many.concepts, GATES["and"])), tmp_path)
    assert len({id(gate) for gate in loaded.gate.values()}) == 1
    assert sum(name.startswith("#") for name in load_file(tmp_path / "s.safetensors")) == 1


def test_the_header_says_what_the_steering_does(tmp_path):
    Steering(BANK, c={"kind": 2}, gate=GATES["projection"], positions=slice(1, 3)).save(tmp_path / "s.safetensors")
    said = document(tmp_path / "s.safetensors")
    assert said["kind"] == "steering" and list(said["concepts"]) == ["kind", "calm"]
    assert said["concepts"]["calm"]["sites"]["1"] == {"side": "output", "axis": None}
    assert said["c"] == {"mapping": {"kind": 2}} and said["positions"] == {"slice": [1, 3, None]}
    gate = said["gate"]
    assert gate["class"] == "ProjectionAbove" and list(gate["arguments"]["vector"]["vector"]) == ["0"]
    assert gate["arguments"]["threshold"] == 1 / 3 and gate["arguments"]["per"] == "token"
    EDITS["low rank"].save(tmp_path / "e.safetensors")
    said = document(tmp_path / "e.safetensors")
    assert said["intervention"]["class"] == "LowRank"
    assert said["concepts"]["kind"]["sites"] == {
        "0": {"side": "output", "axis": "1"},
        "1": {"side": "output", "axis": None},
    }


def test_a_file_of_vectors_is_a_steering_by_vectors_and_the_other_way_round(tmp_path):
    BANK.save(tmp_path / "b.safetensors")
    SteeringVector({"model.layers.1": torch.ones(D)}, concept="n").save(tmp_path / "v.gguf")
    for name in ("b.safetensors", "*.safetensors", "v.gguf"):
        loaded, bank = Steering.load(tmp_path / name), VectorBank.load(tmp_path / name)
        assert loaded.is_plain and loaded.concepts == bank.concepts
        assert all(loaded.vectors[concept].equal(bank[concept]) for concept in bank)
    Steering(BANK).save(tmp_path / "s.safetensors")
    assert document(tmp_path / "s.safetensors") == document(tmp_path / "b.safetensors")
    Steering(loaded.vectors).save(tmp_path / "w.gguf")
    assert VectorBank.load(tmp_path / "w.gguf")["n"].equal(bank["n"])


def test_what_is_more_than_vectors_is_no_file_of_vectors(tmp_path):
    Steering(V, gate=PROBE).save(tmp_path / "s.safetensors")
    for load in (VectorBank.load, SteeringVector.load):
        with pytest.raises(FileFormatError, match=r"expected a file of kind 'bank'.*Steering.load\(path\)"):
            load(tmp_path / "s.safetensors")
    BANK.save(tmp_path / "b.safetensors")
    with pytest.raises(FileFormatError, match=r"s.safetensors: .*Steering.load\(path\)"):
        Steering.load(tmp_path / "*.safetensors")
    with pytest.raises(FileFormatError, match=r"v.gguf: this format holds vectors alone, and the steering has c, gate"):
        Steering(V, gate=PROBE, c=2).save(tmp_path / "v.gguf")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b.safetensors", "s.safetensors"]


def test_the_model_may_be_named_when_saving(tmp_path):
    path, other = tmp_path / "s.safetensors", nn.Sequential(nn.Linear(D, 3))
    Steering(W, c=2).save(path, model=MODEL)
    assert torch.equal(steered(Steering.load(path, MODEL)), steered(W, c=2))
    with pytest.raises(ModelMismatchError):
        Steering.load(path, other)
    EDITS["norm kept"].save(path, model=MODEL)
    loaded = KeepNorm.load(path, MODEL)
    assert loaded.constant.metadata.items() > EDITS["norm kept"].constant.metadata.items()
    for load in (KeepNorm.load, Steering.load):
        with pytest.raises(ModelMismatchError):
            load(path, other)


def test_of_a_large_file_only_what_is_asked_for_is_read(tmp_path, monkeypatch):
    bank = VectorBank({f"c{i}": SteeringVector({"0": torch.full((D,), i / 8)}) for i in range(1500)})
    Steering(bank, c={"c7": 2}, gate=PROBE).save(tmp_path / "s.safetensors")
    read, tensor = [], Opened.tensor
    monkeypatch.setattr(Opened, "tensor", lambda self, name: read.append(name) or tensor(self, name))
    loaded = Steering.load(tmp_path / "s.safetensors")
    assert read == ["#0"]
    assert torch.equal(steered(loaded), steered(bank, c={"c7": 2}, gate=PROBE))
    assert read == ["#0", "c7/0"]


# --- in another process ----------------------------------------------------------------------------------------------
READER = """
import sys, torch
from safetensors.torch import load_file, save_file
from torch import nn
from actsteer import LowRank, Steerer, Steering, SteeringVector
folder = sys.argv[1]
tensors = load_file(f"{folder}/inputs.safetensors")
x = tensors["x"].clone()  # at an address that the kernels like as much as the one there
model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)).eval()
model.load_state_dict({name[2:]: own for name, own in tensors.items() if name.startswith("m.")})
outputs = {}
for name in ("trained", "erased", "gated"):
    loaded = Steering.load(f"{folder}/{name}.safetensors", model)
    with torch.no_grad(), Steerer(model, loaded):
        outputs[name] = model(x)
with torch.no_grad(), Steerer(model, LowRank.load(f"{folder}/trained.safetensors")):
    assert torch.equal(model(x), outputs["trained"])
save_file(outputs, f"{folder}/outputs.safetensors")
"""


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory):
    """What was trained, fitted and decided here: the outputs of this process, and those of another one."""
    folder, model = tmp_path_factory.mktemp("travel"), nn.Sequential(*copy.deepcopy(MODEL).children()).eval()
    generator = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, D, generator=generator) + 1, torch.randn(40, D, generator=generator) - 1
    loss = lambda output: output[:, 0].mean()  # noqa: E731
    with torch.random.fork_rng():
        edit = optimize(model, x, sites="1", loss=loss, steps=4, train=LowRank(rank=2), progress=False)
    erasure = fit(model, positive=x, negative=y, sites="0", estimator=ConceptErasure())
    v = fit(model, positive=x, negative=y, sites="0", concept="side")
    with torch.no_grad():
        gate = CosineAbove.between(v, positive={"0": model[0](x)}, negative={"0": model[0](y)})
    values = {"trained": Steering(edit), "erased": Steering(erasure), "gated": Steering(v, c=2, gate=gate)}
    edit.save(folder / "trained.safetensors")
    erasure.save(folder / "erased.safetensors")
    values["gated"].save(folder / "gated.safetensors")
    x = torch.cat([x, y])
    weights = {f"m.{name}": own for name, own in model.state_dict().items()}
    (folder / "inputs.safetensors").write_bytes(save({"x": x, **weights}))
    subprocess.run([sys.executable, "-c", READER, str(folder)], check=True, cwd=ROOT)
    here = {}
    for name, steering in values.items():
        with torch.no_grad(), Steerer(model, steering):
            here[name] = model(x)
    with torch.no_grad():
        return here, load_file(folder / "outputs.safetensors"), model(x)


@pytest.mark.parametrize("name", ["trained", "erased", "gated"])
def test_what_was_made_here_does_the_same_in_another_process(elsewhere, name):
    here, there, plain = elsewhere
    assert torch.equal(there[name], here[name])
    assert not torch.equal(there[name], plain)


# --- edits and gates by themselves -----------------------------------------------------------------------------------
@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_an_edit_is_saved_and_loaded_like_a_vector(edit, tmp_path):
    edit.save(tmp_path / "e.safetensors")
    loaded = type(edit).load(tmp_path / "e.safetensors")
    assert repr(loaded) == repr(edit) and loaded.constant.metadata == edit.constant.metadata
    assert torch.equal(steered(loaded), steered(edit))
    assert torch.equal(steered(Steering.load(tmp_path / "e.safetensors")), steered(edit))


@pytest.mark.parametrize("gate", GATES.values(), ids=GATES)
def test_a_gate_is_saved_and_loaded_like_a_vector(gate, tmp_path):
    gate.save(tmp_path / "g.safetensors")
    loaded = type(gate).load(tmp_path / "g.safetensors")
    assert repr(loaded) == repr(gate)
    assert torch.equal(steered(V, gate=loaded), steered(V, gate=gate))


def test_a_loaded_edit_is_all_that_the_file_holds(tmp_path):
    path, edit = tmp_path / "s.safetensors", EDITS["low rank"]
    two = VectorBank({"kind": edit.constant, "calm": W})
    for more in (Steering(edit, c=2), Steering(edit, gate=PROBE), Steering(edit, sites="0"), Steering(W, c=2)):
        more.save(path)
        with pytest.raises(FileFormatError, match=r"expected one LowRank and nothing else, got Steering"):
            LowRank.load(path)
    Steering(two, intervention=edit).save(path)
    with pytest.raises(FileFormatError, match="expected one LowRank and nothing else"):
        LowRank.load(path)
    edit.save(path)
    with pytest.raises(FileFormatError, match=r"expected one Affine .* got .*LowRank.* open it with Steering.load"):
        Affine.load(path)
    with pytest.raises(FileFormatError, match=r"expected a file of kind 'gate'.*Steering.load\(path\)"):
        ProjectionAbove.load(path)
    Steering(V, intervention=KeepNorm(Add())).save(path)
    with pytest.raises(FileFormatError, match="has no sites"):
        KeepNorm.load(path)
    PROBE.save(path)
    with pytest.raises(FileFormatError, match="expected a CosineAbove, got ProbeAbove"):
        CosineAbove.load(path)
    with pytest.raises(FileFormatError, match="a gate: open it with the load of its class"):
        Steering.load(path)
    for save_as in (edit.save, PROBE.save):
        with pytest.raises(FileFormatError, match="safetensors"):
            save_as(tmp_path / "s.gguf")


def test_an_edit_that_is_yet_to_be_trained_is_saved_too(tmp_path):
    LowRank(rank=3, concept="kind").save(tmp_path / "e.safetensors")
    assert repr(LowRank.load(tmp_path / "e.safetensors")) == "LowRank(rank=3, sites=(), concept='kind')"


# --- classes of the user's -------------------------------------------------------------------------------------------
@dataclass
class Shifted:
    """An intervention as a dataclass, with a tensor, a vector and an intervention inside."""

    shift: torch.Tensor
    vector: SteeringVector
    inner: object
    scale: float = 1.0

    def __call__(self, activation, direction, c):
        return self.inner(activation, direction, c) + self.scale * (self.shift + self.vector["0"])


class FirstAbove:
    """A gate that says what it is made with."""

    def __init__(self, limit, *, per="sequence"):
        self.bound, self.per, self.site = limit, per, "0"

    def __call__(self, rows):
        return rows[:, 0] > self.bound

    def saved(self):
        return {"limit": self.bound, "per": self.per}


class Xor:
    """A combination of any number of gates."""

    def __init__(self, *gates):
        self.gates = gates

    def combine(self, weights):
        return weights[0] ^ weights[1]

    def saved(self):
        return {"gates": self.gates}


OWN = (Shifted, FirstAbove, Xor)


def test_a_class_of_the_users_travels_as_ours_do(tmp_path):
    assert isinstance(FirstAbove(1.0), Saved) and isinstance(PROBE, Saved)
    shifted = Shifted(torch.arange(4.0), V, KeepNorm(Shifted(torch.ones(4), V, Add())), scale=1 / 3)
    steering = Steering(BANK, intervention=shifted, gate=Xor(FirstAbove(0.1), Not(GATES["cosine"])))
    loaded = again(steering, tmp_path, kinds=OWN)
    assert type(loaded.gate) is Xor and loaded.gate.gates[0].bound == 0.1
    assert torch.equal(steered(loaded), steered(steering))
    mixed = And(FirstAbove(0.1), PROBE)
    mixed.save(tmp_path / "g.safetensors")
    assert And.load(tmp_path / "g.safetensors", kinds=OWN).gates[0].bound == 0.1


def test_a_class_that_is_not_given_is_named_and_never_imported(tmp_path):
    Steering(V, gate=FirstAbove(1.0)).save(tmp_path / "s.safetensors")
    for kinds in ((), (Xor,)):
        with pytest.raises(FileFormatError, match=r"s.safetensors: it holds a FirstAbove, .*kinds=\(FirstAbove,\)"):
            Steering.load(tmp_path / "s.safetensors", kinds=kinds)


def test_two_classes_of_one_name_cannot_be_told_apart(tmp_path):
    twin = dataclass(type("Clamp", (), {"__annotations__": {"x": float}, "__call__": lambda self, h, v, c: h}))
    with pytest.raises(FileFormatError, match="two classes are called Clamp"):
        Steering(V, intervention=twin(1.0)).save(tmp_path / "s.safetensors")
    Steering(V, intervention=Clamp(1.0)).save(tmp_path / "s.safetensors")
    with pytest.raises(ValueError, match="kinds: two classes are called Clamp; rename one"):
        Steering.load(tmp_path / "s.safetensors", kinds=(twin,))
    with pytest.raises(TypeError, match="kinds: expected classes"):
        Steering.load(tmp_path / "s.safetensors", kinds=("Clamp",))


class Forgets(FirstAbove):
    """Says something else than it was made with."""

    def saved(self):
        return {"limit": self.bound / 2, "per": self.per}


class Fails(FirstAbove):
    """Says what it does not take."""

    def saved(self):
        return {"bound": self.bound}


@dataclass
class Holds:
    """An intervention with anything in it."""

    what: object

    def __call__(self, activation, direction, c):
        return activation


class Silent:
    """A gate that a Steerer takes and a file does not."""

    site, per = "0", "token"

    def __call__(self, rows):
        return rows[:, 0] > 0


def nested(depth):
    gate = PROBE
    for _ in range(depth):
        gate = Not(gate)
    return gate


def itself():
    held = Holds(None)
    held.what = held
    return held


UNSAVED = {
    "a schedule": ({"c": lambda step: 1.0}, r"c: <function .*> cannot be saved"),
    "one schedule": ({"c": {"kind": lambda step: 1.0}}, r"c\['kind'\]: <function .*> cannot be saved"),
    "computed positions": ({"positions": lambda batch: batch}, "positions: <function"),
    "a function": ({"intervention": lambda h, v, c: h}, "intervention: <function"),
    "a function in it": ({"intervention": Chain(Add(), lambda h, v, c: h)}, r"intervention.interventions\[1\]: <fun"),
    "a gate that does not say": ({"gate": Silent()}, "gate: <.*Silent.*> cannot be saved"),
    "a module as a site": ({"sites": nn.Identity()}, r"sites: Identity\(\) cannot be saved"),
    "a set": ({"intervention": Holds({1})}, "intervention.what: a set cannot be saved"),
    "keys": ({"intervention": Holds({1: 2})}, "expected a mapping from str, got the key 1"),
    "a class": ({"intervention": Holds(Clamp)}, "<class .*Clamp'> cannot be saved"),
    "a sparse tensor": ({"intervention": Holds(torch.ones(2).to_sparse())}, "expected a plain, dense tensor"),
    "a complex tensor": ({"intervention": Holds(torch.ones(2) + 1j)}, "got Tensor of torch.complex64"),
    "a tensor without numbers": ({"intervention": Holds(torch.ones(2, device="meta"))}, "expected a plain, dense"),
    "what says another": ({"gate": Forgets(0.123)}, "is another one when it is made again"),
    "what says too much": ({"gate": Fails(0.123)}, "cannot be made again .*takes no bound"),
    "depth": ({"gate": nested(80)}, "it is nested more than 64 deep"),
    "itself": ({"intervention": itself()}, "it is nested more than 64 deep"),
}


@pytest.mark.parametrize(("options", "match"), UNSAVED.values(), ids=UNSAVED)
def test_what_a_file_cannot_hold_is_refused_before_anything_is_written(options, match, tmp_path):
    with pytest.raises(FileFormatError, match=rf"s.safetensors: .*{match}"):
        Steering(V, **options).save(tmp_path / "s.safetensors")
    assert list(tmp_path.iterdir()) == []


# --- what is not trusted ---------------------------------------------------------------------------------------------
@pytest.mark.slow
def test_every_single_flipped_bit_is_refused(tmp_path):
    path = tmp_path / "s.safetensors"
    for save_as, load in (
        (Steering(V, gate=Soft(PROBE)).save, Steering.load),
        (LowRank({"0": PARTS}).save, LowRank.load),
        (Not(PROBE).save, Not.load),
    ):
        save_as(path)
        whole = path.read_bytes()
        for bit in range(8 * len(whole)):
            damaged = bytearray(whole)
            damaged[bit // 8] ^= 1 << bit % 8
            path.write_bytes(damaged)
            with pytest.raises(FileFormatError):
                load(path)


def deep(node, depth):
    for _ in range(depth):
        node = {"class": "Not", "arguments": {"gate": node}}
    return node


WRONG = {
    "a part is missing": lambda d: d.pop("gate"),
    "a part too many": lambda d: d.update(backend="tap"),
    "another class": lambda d: d.update(gate={"class": "os.system", "arguments": {}}),
    "a class that is no gate": lambda d: d["gate"].update({"class": "Clamp", "arguments": {"target": 1.0}}),
    "no class": lambda d: d["gate"].update({"class": 3}),
    "arguments as a list": lambda d: d["gate"].update(arguments=[1]),
    "an argument too many": lambda d: d["gate"]["arguments"].update(unit=True),
    "an argument is missing": lambda d: d["gate"]["arguments"].pop("threshold"),
    "a threshold as text": lambda d: d["gate"]["arguments"].update(threshold="0.5"),
    "a threshold as a list": lambda d: d["gate"]["arguments"].update(threshold=[0.5]),
    "no number": lambda d: d["gate"]["arguments"].update(threshold={"float": "nan"}),
    "a float in words": lambda d: d["gate"]["arguments"].update(threshold={"float": "0.5"}),
    "an odd word": lambda d: d["gate"]["arguments"].update(per="word"),
    "no tensor": lambda d: d["gate"]["arguments"]["vector"]["vector"].update({"0": 1.0}),
    "a tensor of no name": lambda d: d["gate"]["arguments"]["vector"]["vector"].update({"0": {"tensor": [1]}}),
    "another tensor": lambda d: d["gate"]["arguments"]["vector"]["vector"].update({"0": {"tensor": "#9"}}),
    "a tensor of a vector": lambda d: d["gate"]["arguments"]["vector"]["vector"].update({"0": {"tensor": "kind/0"}}),
    "two sites": lambda d: d["gate"]["arguments"]["vector"]["vector"].update({"1": {"tensor": "#0"}}),
    "metadata of numbers": lambda d: d["gate"]["arguments"]["vector"]["metadata"].update(a=1),
    "two things at once": lambda d: d["gate"].update(tuple=[]),
    "tensors that nobody names": lambda d: d.update(gate=None),
    "a strength as text": lambda d: d.update(c="1"),
    "no strength": lambda d: d.update(c=None),
    "a strength of another": lambda d: d.update(c={"mapping": {"b": 1.0}}),
    "an infinite strength": lambda d: d.update(c={"float": "inf"}),
    "positions of a float": lambda d: d.update(positions=1.5),
    "a slice of texts": lambda d: d.update(positions={"slice": ["a", None, None]}),
    "a slice of two": lambda d: d.update(positions={"slice": [1, 2]}),
    "sites of numbers": lambda d: d.update(sites={"tuple": [1]}),
    "an intervention as text": lambda d: d.update(intervention="add"),
    "a flag as a number": lambda d: d.update(intervention={"class": "Add", "arguments": {"relative": 1}}),
    "depth": lambda d: d.update(gate=deep(d["gate"], 100)),
    "a deep list": lambda d: d.update(sites=json.loads("[" * 400 + "]" * 400)),
    "concepts as a list": lambda d: d.update(concepts=[]),
    "a newer format": lambda d: d.update(format=2),
    "another kind": lambda d: d.update(kind="steering2"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_document_that_makes_no_sense_is_refused_though_its_seal_is_right(change, tmp_path):
    path = tmp_path / "s.safetensors"
    Steering(V, gate=CosineAbove(V, 0.5)).save(path)
    said = document(path)
    with_document(path, said)
    Steering.load(path)
    change(said)
    with_document(path, said)
    with pytest.raises(FileFormatError, match=r"s\.safetensors"):
        Steering.load(path)


ODD = {"nan": torch.full((D,), torch.nan), "matrix": torch.ones(D, 2), "integers": torch.ones(D, dtype=torch.long)}


@pytest.mark.parametrize("odd", ODD.values(), ids=ODD)
def test_tensors_that_make_no_sense_are_refused_though_the_seal_is_right(odd, tmp_path):
    path = tmp_path / "s.safetensors"
    for steering in (Steering(V, gate=PROBE), Steering(V, intervention=Ablate(around=torch.ones(D)))):
        steering.save(path)
        said, tensors = document(path), load_file(path)
        tensors["#0"] = odd
        path.write_bytes(save(tensors, metadata={"actsteer": json.dumps(said), "sha256": ""}))
        with_document(path, said)
        with pytest.raises(FileFormatError, match=r"s\.safetensors"):
            Steering.load(path)
