"""The errors: a docstring that explains, a note that points to it, and causes and cures that are what it says."""

import copy
import pickle
import re
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import GPT2Config, GPT2LMHeadModel

import actsteer
from actsteer import (
    Ablate,
    ActsteerError,
    AttachedError,
    BatchError,
    Clamp,
    ConceptNotFoundError,
    DistributedError,
    FileFormatError,
    GateError,
    InputError,
    KeepNorm,
    LossError,
    MeanDifference,
    ModelMismatchError,
    NotFoldable,
    OutputError,
    PositionsError,
    ShapeError,
    SiteNotFoundError,
    Statistics,
    StatisticsError,
    Steerer,
    SteeringNotApplied,
    SteeringVector,
    StrengthError,
    UnsupportedModelError,
    VectorBank,
    WhitenedMeanDifference,
    ZeroDirectionError,
    collect,
    detach_all,
    find_sites,
    fit,
    fold,
    optimize,
    residual_sites,
    steerers,
)
from actsteer import errors as module
from actsteer.errors import PAGES, explained

ROOT = Path(actsteer.__file__).parent.parent


def below(kind):
    return [own for sub in kind.__subclasses__() if sub.__module__ == module.__name__ for own in (sub, *below(sub))]


KINDS = below(ActsteerError)


# --- what a class says ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", KINDS)
def test_a_class_says_what_happened_three_causes_and_the_cure_of_each(kind):
    what, happened, causes, *_ = module.inspect.cleandoc(kind.__doc__).split("\n\n")
    assert what.endswith(".") and "\n" not in what
    assert happened.startswith("What happened: ")
    assert [line[:3] for line in causes.splitlines() if line[0] != " "] == ["1. ", "2. ", "3. "]
    assert [part.count("Cure: ") for part in re.split(r"^\d\. ", causes, flags=re.M)] == [0, 1, 1, 1]


def test_the_tree_has_every_class_and_the_built_in_kind_that_it_resembles():
    drawn = re.findall(r"── (\w+) +\((\w+)\)", module.__doc__)
    assert drawn == [(kind.__name__, kind.__bases__[1].__name__) for kind in KINDS]
    assert {kind.__name__ for kind in (ActsteerError, *KINDS)} == set(actsteer.__all__) & set(vars(module))


def test_every_class_has_a_page_in_the_navigation_and_the_address_is_that_of_the_site():
    site = (ROOT / "mkdocs.yml").read_text()
    listed = re.findall(r"^ +- errors/(\w+)\.md$", site, flags=re.M)
    assert listed == ["index", *(kind.__name__ for kind in (ActsteerError, *KINDS))]
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert f"site_url: {urls['Documentation']}\n" in site and f"{urls['Documentation']}errors/" == PAGES


# --- the note ------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", [ActsteerError, *KINDS])
def test_an_error_has_one_note_however_it_travels_and_its_text_is_its_message(kind):
    error = kind("expected this, got that")
    told = [f"`actsteer explain {kind.__name__}` tells more, as does {PAGES}{kind.__name__}/"]
    gone = pickle.loads(pickle.dumps(error))
    for own in (error, gone, pickle.loads(pickle.dumps(gone)), copy.copy(error), copy.deepcopy(error)):
        assert type(own) is kind and own.args == ("expected this, got that",)
        assert own.__notes__ == told and str(own) == "expected this, got that"


class TooNarrowError(ShapeError):
    def __init__(self, width):
        super().__init__(f"too narrow: {width}")
        self.width = width

    def __reduce__(self):
        return TooNarrowError, (self.width,)


def test_a_class_of_the_users_own_points_to_the_class_that_it_refines():
    for own in (TooNarrowError(3), pickle.loads(pickle.dumps(TooNarrowError(3))), copy.copy(TooNarrowError(3))):
        assert own.width == 3 and str(own) == "too narrow: 3"
        assert [note.split("`")[1] for note in own.__notes__] == ["actsteer explain ShapeError"]
    with pytest.raises(LookupError, match="Close names: 'ShapeError'"):
        explained("ShapError")
    with pytest.raises(LookupError, match="no error is called 'inspect'"):
        explained("inspect")


def test_a_note_of_the_users_own_comes_after_it_and_stays_with_its_error():
    error, other = ShapeError("a"), ShapeError("b")
    error.add_note("mine")
    assert error.__notes__[1:] == ["mine"] and len(other.__notes__) == 1
    assert pickle.loads(pickle.dumps(error)).__notes__ == error.__notes__


# --- the causes and the cures --------------------------------------------------------------------------------------
torch.manual_seed(0)
X = torch.randn(6, 2)
LOADER = DataLoader(TensorDataset(X, torch.arange(6)), batch_size=2)
V = SteeringVector({"1": torch.ones(4)}, concept="nine")
IDS = torch.randint(1, 50, (2, 6))
BLOCK = SteeringVector({"transformer.h.1": torch.arange(16.0)})
QUIET = {"progress": False}


def net(*more):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 2), *more)


def lm():
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_embd=16, n_head=2, vocab_size=50, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def run(model, vectors, inputs=X, **options):
    with Steerer(model, vectors, **options), torch.no_grad():
        return model(inputs)


def kept(sites="1", inputs=X, **options):
    return collect(net(), inputs, sites=sites, **QUIET, **options)


def trained(loss, model=None, sites="1"):
    return optimize(model or net(), X, sites=sites, loss=loss, steps=1, **QUIET)


def decoded(mask=None, gate=None, positions="all"):
    """Two passes with a cache, as a loop of one's own makes them."""
    model = lm()
    with Steerer(model, BLOCK, gate=gate, positions=positions), torch.no_grad():
        first = model(IDS, use_cache=True)
        mask = None if mask is None else torch.ones(2, mask)
        return model(IDS[:, :1], past_key_values=first.past_key_values, attention_mask=mask)


def generated(gate=None, positions="all"):
    model = lm()
    with Steerer(model, BLOCK, gate=gate, positions=positions):
        return model.generate(IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=3, min_new_tokens=3)


class Gate:
    def __init__(self, site, *, per="sequence", weights=None):
        self.site, self.per, self.weights = site, per, weights

    def __call__(self, rows):
        return rows.sum(dim=1) > 0 if self.weights is None else self.weights


class Branches(nn.Module):
    """`b` never runs, and `a` is read for its weight."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.around = nn.Linear(2, 2), nn.Linear(2, 2), nn.Identity()

    def forward(self, x):
        return self.around(nn.functional.linear(x, self.a.weight))


class Early(nn.Module):
    """One output does not depend on the other's module."""

    def __init__(self):
        super().__init__()
        self.early, self.late = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x):
        early = self.early(x)
        return {"early": early, "late": self.late(early)}


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 4), nn.Linear(4, 5)

    def forward(self, ids):
        return self.head(self.embed(ids))


class Parts(nn.Module):
    def forward(self, x):
        return {"hidden": x, "gate": x.sigmoid()}


class Packet:
    def __init__(self, x):
        self.x = x


class Packs(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Identity()

    def forward(self, x):
        return Packet(self.inner(x))


def steered_for_good(call, cure):
    """A model that a lost Steerer is attached to."""
    model = net()
    Steerer(model, V).attach()
    if cure:
        assert len(steerers(model)) == 1
        detach_all(model)
    return call(model)


def replaced(when):
    model = net()
    if when == "before":
        model[1] = nn.Tanh()
    with Steerer(model, V):
        model(X)
        if when == "within":
            model[1] = nn.Tanh()
        model(X)


def attached_twice(cure):
    steerer = Steerer(net(), V).attach()
    if cure:
        steerer.detach()
    steerer.attach().detach()


def checked(within):
    steerer = Steerer(net(), V)
    if not within:
        return steerer.check(X)
    with steerer:
        return steerer.check(X)


def altered(path, *, cure):
    V.save(path / "v.safetensors")
    content = bytearray((path / "v.safetensors").read_bytes())
    content[-1] ^= not cure
    (path / "copy.safetensors").write_bytes(content)
    return SteeringVector.load(path / "copy.safetensors")


def stored(path, load):
    kept().save(path / "s.safetensors")
    return load(path / "s.safetensors")


def used_up(make):
    batches = make()
    for _ in range(2):
        collect(net(), batches, sites="1", **QUIET)


BANK = VectorBank({"a": V, "b": 2 * V, "c": SteeringVector({"1": torch.eye(4)[0]})})
MINE = fit(net(), positive=X, negative=-X, sites="1", **QUIET)
LARGE = SteeringVector({"0": torch.full((2,), 60000.0)})
ZERO_AT_2 = SteeringVector({"1": torch.ones(4), "2": torch.zeros(2)})
FLAT = SteeringVector({"0": torch.ones(3)})
CAUSES = {  # class, number -> what raises it, and its cure; of each the path of an empty folder
    (SiteNotFoundError, 1): (lambda _: run(net(), SteeringVector({"relu": torch.ones(4)})), lambda _: run(net(), V)),
    (SiteNotFoundError, 2): (
        lambda _: find_sites(nn.ModuleDict({"a": nn.Sequential(net())}), "*.1"),
        lambda _: find_sites(nn.ModuleDict({"a": nn.Sequential(net())}), "**.1"),
    ),
    (SiteNotFoundError, 3): (
        lambda _: MeanDifference()(positive=kept("1"), negative=kept("2")),
        lambda _: MeanDifference()(positive=kept("1"), negative=kept("1", -X)),
    ),
    (ConceptNotFoundError, 1): (lambda _: BANK["aa"], lambda _: BANK["a"]),
    (ConceptNotFoundError, 2): (lambda _: run(net(), V, c={"1": 2.0}), lambda _: run(net(), V, c={"nine": 2.0})),
    (ConceptNotFoundError, 3): (
        lambda _: run(net(), SteeringVector({"1": torch.ones(4)}), c={"nine": 2.0}),
        lambda _: run(net(), SteeringVector({"1": torch.ones(4)}), c=2.0),
    ),
    (ShapeError, 1): (lambda _: run(net(), SteeringVector({"1": torch.ones(5)})), lambda _: run(net(), V)),
    (ShapeError, 2): (
        lambda _: run(nn.Sequential(nn.Identity()), FLAT, torch.ones(2, 3, 5)),
        lambda _: run(nn.Sequential(nn.Identity()), FLAT, torch.ones(2, 3, 5), axis=1),
    ),
    (ShapeError, 3): (
        lambda _: SteeringVector({"1": torch.ones(1, 4)}),
        lambda _: SteeringVector({"1": torch.ones(1, 4)[0]}),
    ),
    (ZeroDirectionError, 1): (lambda _: MeanDifference()(positive=kept(), negative=kept()).unit(), lambda _: V.unit()),
    (ZeroDirectionError, 2): (lambda _: BANK.orthogonalize(), lambda _: BANK.select("a", "c").orthogonalize()),
    (ZeroDirectionError, 3): (
        lambda _: run(net(), ZERO_AT_2, intervention=Ablate()),
        lambda _: run(net(), ZERO_AT_2.select("1"), intervention=Ablate()),
    ),
    (StrengthError, 1): (
        lambda _: run(net(), V, c=[0, 1, 2, 3, 4, 5]),
        lambda _: run(net(), V, c=torch.tensor([0, 1, 2, 3, 4, 5])),
    ),
    (StrengthError, 2): (lambda _: run(net(), V, c=torch.ones(3)), lambda _: run(net(), V, c=torch.ones(6))),
    (StrengthError, 3): (
        lambda _: run(nn.Sequential(nn.Identity()), LARGE, X.half(), c=2.0),
        lambda _: run(nn.Sequential(nn.Identity()), LARGE, X.half(), c=0.5),
    ),
    (BatchError, 1): (lambda _: kept(inputs=LOADER), lambda _: kept(inputs=[x for x, y in LOADER])),
    (BatchError, 2): (lambda _: kept(inputs=["a text"]), lambda _: kept(inputs=[{"input": X}])),
    (BatchError, 3): (lambda _: used_up(lambda: iter(X.split(2))), lambda _: used_up(lambda: list(X.split(2)))),
    (InputError, 1): (
        lambda _: kept(inputs=torch.ones(6, 2, 1)),
        lambda _: kept(inputs=torch.ones(6, 2, 1).flatten(start_dim=1)),
    ),
    (InputError, 2): (lambda _: kept(inputs=X.double()), lambda _: kept(inputs=X.double().float())),
    (InputError, 3): (
        lambda _: collect(Words(), torch.tensor([[7]]), sites="embed", **QUIET),
        lambda _: collect(Words(), torch.tensor([[4]]), sites="embed", **QUIET),
    ),
    (LossError, 1): (
        lambda _: trained(lambda output: (output - 1).square()),
        lambda _: trained(lambda output: (output - 1).square().mean()),
    ),
    (LossError, 2): (
        lambda _: trained(lambda output: output.argmax(dim=1).float().mean()),
        lambda _: trained(lambda output: nn.functional.cross_entropy(output, torch.ones(6).long())),
    ),
    (LossError, 3): (
        lambda _: trained(lambda output: output["early"].mean(), model=Early(), sites="late"),
        lambda _: trained(lambda output: output["early"].mean(), model=Early(), sites="early"),
    ),
    (StatisticsError, 1): (
        lambda _: WhitenedMeanDifference(shrinkage=0.1)(positive=kept(), negative=kept(inputs=-X)),
        lambda _: WhitenedMeanDifference(shrinkage=0.1)(
            positive=kept(covariance=True), negative=kept(inputs=-X, covariance=True)
        ),
    ),
    (StatisticsError, 2): (
        lambda _: collect(Branches(), X, sites="b", **QUIET),
        lambda _: collect(Branches(), X, sites="around", **QUIET),
    ),
    (StatisticsError, 3): (
        lambda _: kept(inputs=X[:1], covariance=True)["1"].covariance,
        lambda _: kept(inputs=X, covariance=True)["1"].covariance,
    ),
    (FileFormatError, 1): (lambda path: V.save(path / "v.pt"), lambda path: V.save(path / "v.safetensors")),
    (FileFormatError, 2): (lambda path: altered(path, cure=False), lambda path: altered(path, cure=True)),
    (FileFormatError, 3): (lambda path: stored(path, VectorBank.load), lambda path: stored(path, Statistics.load)),
    (ModelMismatchError, 1): (
        lambda _: run(nn.Sequential(nn.Linear(2, 5), nn.ReLU(), nn.Linear(5, 2)), MINE),
        lambda _: run(net(), MINE),
    ),
    (ModelMismatchError, 2): (
        lambda _: run(net(nn.Linear(2, 3)), MINE),
        lambda _: run(net(nn.Linear(2, 3)), fit(net(nn.Linear(2, 3)), positive=X, negative=-X, sites="1", **QUIET)),
    ),
    (ModelMismatchError, 3): (
        lambda _: run(net(nn.Linear(2, 3)), MINE),
        lambda _: run(net(nn.Linear(2, 3)), SteeringVector({site: MINE[site] for site in MINE})),
    ),
    (NotFoldable, 1): (
        lambda _: fold(net(), V, torch.ones(6), verify_on=X),
        lambda _: fold(net(), V, 1.0, verify_on=X),
    ),
    (NotFoldable, 2): (
        lambda _: fold(net(), V, 1.0, intervention=KeepNorm(Ablate()), verify_on=X),
        lambda _: [fold(net(), V, 1.0, intervention=own, verify_on=X) for own in (Ablate(), Clamp(3.0))],
    ),
    (NotFoldable, 3): (
        lambda _: fold(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Tanh()), V, 1.0, verify_on=X),
        lambda _: fold(
            nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Tanh()), SteeringVector({"0": V["1"][:2]}), 1.0, verify_on=X
        ),
    ),
    (OutputError, 1): (
        lambda _: run(Words(), SteeringVector({"embed:in": torch.ones(4)}), torch.tensor([[1]])),
        lambda _: run(Words(), SteeringVector({"embed": torch.ones(4)}), torch.tensor([[1]])),
    ),
    (OutputError, 2): (
        lambda _: run(nn.Sequential(Parts()), SteeringVector({"0": torch.ones(2)})),
        lambda _: run(nn.Sequential(Parts()), SteeringVector({"0:out.hidden": torch.ones(2)})),
    ),
    (OutputError, 3): (
        lambda _: run(nn.Sequential(Packs()), SteeringVector({"0": torch.ones(2)})),
        lambda _: run(nn.Sequential(Packs()), SteeringVector({"0.inner": torch.ones(2)})),
    ),
    (UnsupportedModelError, 1): (
        lambda _: run(torch.jit.script(net()), V),
        lambda _: torch.jit.script(fold(net(), V, 1.0, verify_on=X)),
    ),
    (UnsupportedModelError, 2): (lambda _: Steerer("gpt2", V), lambda _: Steerer(net(), V)),
    (UnsupportedModelError, 3): (lambda _: residual_sites(net()), lambda _: find_sites(net(), "*")),
    (AttachedError, 1): (lambda _: attached_twice(cure=False), lambda _: attached_twice(cure=True)),
    (AttachedError, 2): (lambda _: checked(within=True), lambda _: checked(within=False)),
    (AttachedError, 3): (
        lambda _: steered_for_good(lambda model: fold(model, V, 1.0, verify_on=X), cure=False),
        lambda _: steered_for_good(lambda model: fold(model, V, 1.0, verify_on=X), cure=True),
    ),
    (GateError, 1): (lambda _: run(net(), V, gate=Gate("2")), lambda _: run(net(), V, gate=Gate("0"))),
    (GateError, 2): (
        lambda _: run(net(), V, gate=Gate("1", weights=torch.ones(3))),
        lambda _: run(net(), V, gate=Gate("1", weights=torch.ones(6))),
    ),
    (GateError, 3): (
        lambda _: decoded(gate=Gate("transformer.h.1")),
        lambda _: [generated(gate=Gate("transformer.h.1")), decoded(gate=Gate("transformer.h.1", per="token"))],
    ),
    (PositionsError, 1): (
        lambda _: decoded(positions="generated"),
        lambda _: [generated(positions="generated"), decoded(positions=3)],
    ),
    (PositionsError, 2): (lambda _: decoded(mask=1, positions=3), lambda _: decoded(mask=7, positions=3)),
    (PositionsError, 3): (
        lambda _: decoded(positions=lambda batch: batch["input_ids"] > 9),
        lambda _: generated(positions=lambda batch: batch["input_ids"] > 9),
    ),
    (SteeringNotApplied, 1): (
        lambda _: run(Branches(), SteeringVector({"b": torch.ones(2)})),
        lambda _: run(Branches(), SteeringVector({"b": torch.ones(2)}), strict=False),
    ),
    (SteeringNotApplied, 2): (
        lambda _: run(Branches(), SteeringVector({"a": torch.ones(2)})),
        lambda _: run(Branches(), SteeringVector({"around": torch.ones(2)})),
    ),
    (SteeringNotApplied, 3): (lambda _: replaced("within"), lambda _: replaced("before")),
}


def test_every_cause_is_here_but_those_of_several_processes():
    """Which `tests/collecting/test_processes.py` and its workers raise."""
    assert set(CAUSES) == {(kind, number) for kind in KINDS if kind is not DistributedError for number in (1, 2, 3)}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("kind", "number"), CAUSES, ids=[f"{kind.__name__} {number}" for kind, number in CAUSES])
def test_a_cause_raises_the_class_and_its_cure_raises_nothing(kind, number, tmp_path):
    cause, cure = CAUSES[kind, number]
    with pytest.raises(ActsteerError) as caught:
        cause(tmp_path)
    assert type(caught.value) is kind
    assert len(caught.value.__notes__) == 1 and "actsteer explain" not in str(caught.value)
    cure(tmp_path)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("kind", "number", "said"),
    [
        (SiteNotFoundError, 2, r"`\*\*` does not: \['a\.0\.1'\]"),
        (ShapeError, 2, r"If the features lie on axis 1, pass axis=\{'0': 1\}"),
        (ZeroDirectionError, 1, "leave the site out, with select"),
        (InputError, 2, r"a float32 Linear\(.*\), was given float64 of shape \(6, 2\)"),
        (OutputError, 1, r"got the input \(0: int64 Tensor\); choose a module inside .*, or a later one"),
        (UnsupportedModelError, 2, "the one in it, as pipeline.model is"),
    ],
)
def test_a_message_that_a_beginner_meets_says_what_next(kind, number, said, tmp_path):
    with pytest.raises(kind, match=said):
        CAUSES[kind, number][0](tmp_path)


def test_where_the_vectors_size_is_that_of_no_other_axis_none_is_named():
    with pytest.raises(ShapeError, match=r"was it fitted on another model\?\n"):
        run(nn.Sequential(nn.Identity()), FLAT, torch.ones(3, 5))


def test_a_safetensors_file_of_others_says_how_its_directions_are_read(tmp_path):
    save_file({"w": torch.ones(3)}, tmp_path / "w.safetensors")
    with pytest.raises(FileFormatError, match=r"read them with safetensors, and give SteeringVector\(\{site: dir"):
        SteeringVector.load(tmp_path / "w.safetensors")
