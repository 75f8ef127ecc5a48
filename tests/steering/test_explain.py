"""explain: what would be edited where, before anything runs."""

import pytest
import torch
from torch import Tensor, nn

from actsteer import Ablate, Chain, KeepNorm, ProjectionAbove, Steerer, SteeringVector, VectorBank
from tests.oracles import state
from tests.zoo import cnn, exact

D = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=torch.float64)
X = torch.ones(2, 4, dtype=torch.float64)
BANK = VectorBank({"eight": SteeringVector({"1": D}), "nine": SteeringVector({"1": D, "2:in": 2 * D})})


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_it_prints_nothing_and_reads_well_and_runs_and_changes_nothing(capsys):
    model = exact()
    before = state(model)
    ran = model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    text = Steerer(model, BANK).explain()
    ran.remove()
    assert capsys.readouterr().out == ""
    assert repr(text) == str(text) and text.startswith("Sequential: ")
    assert state(model) == before


def test_every_site_has_its_side_axis_backend_intervention_and_strengths():
    text = Steerer(exact(), BANK, c={"eight": -1.5, "nine": 2.0}).explain()
    assert text.splitlines() == [
        "Sequential: 2 sites, in this order",
        "'1': the output of ReLU, 4 features",
        "    axis: -1",
        "    backend: tap (a call of the module's forward)",
        "    eight: Add, c = -1.5, norm 5",
        "    nine: Add, c = 2, norm 5",
        "    eight and nine: cosine 1.000",
        "'2:in': the input of Linear, 4 features",
        "    axis: -1",
        "    backend: tap (a call of the module's forward)",
        "    nine: Add, c = 2, norm 10",
    ]


class Nothing:
    """An intervention of the user's own."""

    def __call__(self, activation: Tensor, direction: Tensor, c: Tensor) -> Tensor:
        return activation


OPTIONS = {
    "rows": ({"c": torch.ones(7)}, "eight: Add, c = 7 rows, norm 5"),
    "gate": (
        {"gate": {"eight": ProjectionAbove(SteeringVector({"0": D}), 1.0)}},
        "eight: Add, c = 1, norm 5, gated by ProjectionAbove(site='0', threshold=1)",
    ),
    "no gate": ({"gate": {"eight": ProjectionAbove(SteeringVector({"0": D}), 1.0)}}, "nine: Add, c = 1, norm 5\n"),
    "intervention": ({"intervention": Nothing()}, "eight: Nothing, c = 1"),
    "inside another": (
        {"intervention": Chain(Ablate(), KeepNorm(Nothing()))},
        "eight: Chain(Ablate, KeepNorm(Nothing)), c",
    ),
    "axis": ({"axis": {"1": 1}}, "axis: 1"),
    "some sites": ({"sites": "1"}, "Sequential: 1 site, in this order"),
    "tap": ({"backend": "tap"}, "backend: tap (as asked for)"),
    "buffer": ({"backend": "buffer"}, "backend: buffer by tap (it is to be compiled)"),
    "fold": ({"backend": "fold", "sites": "2"}, "backend: fold (as asked for)"),
}


@pytest.mark.parametrize(("options", "line"), OPTIONS.values(), ids=OPTIONS)
def test_what_was_asked_for_is_said(options, line):
    bank = VectorBank({"a": SteeringVector({"2": D})}) if options.get("backend") == "fold" else BANK
    assert line in Steerer(exact(), bank, **options).explain()


def test_it_says_a_tap_whether_code_is_compiled_or_not():
    for model in (exact(), torch.compile(exact(), backend="eager")):
        assert "backend: tap (a call of the module's forward)" in Steerer(model, BANK).explain()


def test_it_says_a_hook_where_the_module_is_lazy():
    model = nn.Sequential(nn.LazyLinear(4))
    text = Steerer(model, SteeringVector({"0": D})).explain()
    assert "backend: hook (it is lazy, and changes its class at its first call)" in text


def test_while_attached_it_says_what_was_attached():
    model = nn.Sequential(nn.LazyLinear(4, dtype=X.dtype))
    with Steerer(model, SteeringVector({"0": D})) as steerer:
        model(X)
        assert "backend: hook (it is lazy" in steerer.explain()
    assert "backend: tap" in steerer.explain()


def test_it_names_the_channel_axis_of_a_convolution_and_admits_an_open_one():
    assert "axis: -3" in Steerer(cnn(), SteeringVector({"0": D})).explain()

    class Unknown(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    text = Steerer(nn.Sequential(Unknown()), SteeringVector({"0": D})).explain()
    assert "axis: found at the first call" in text


def test_a_strength_that_changes_is_said_at_once():
    steerer = Steerer(exact(), BANK, c=1)
    steerer.c = {"nine": 2.5}
    assert "nine: Add, c = 2.5" in steerer.explain() and "eight: Add, c = 0" in steerer.explain()


def test_the_part_of_an_output_is_named():
    attention = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2)})
    text = Steerer(attention, SteeringVector({"attention": D})).explain()
    assert "'attention': the output.0 of MultiheadAttention, 4 features" in text
