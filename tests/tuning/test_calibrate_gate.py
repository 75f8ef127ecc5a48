"""calibrate_gate: the rate on other data is the one that was asked for, whatever the gate decides on."""

import pytest
import torch
from torch import nn

from actsteer import And, CosineAbove, ProjectionAbove, StatisticsError, SteeringVector, calibrate_gate
from tests.zoo import llama

V = SteeringVector({"0": torch.tensor([1.0, 0.0, 0.0])})


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.3])
@pytest.mark.parametrize("kind", [ProjectionAbove, CosineAbove])
def test_the_rate_on_the_other_half_is_about_the_one_that_was_asked_for(kind, rate):
    x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0))
    model, gate = nn.Sequential(nn.Identity()), kind(V, 0.123)
    found = calibrate_gate(model, gate, retain=x, false_positive_rate=rate, progress=False)
    low, high = found.interval
    assert low <= found.rate <= high
    assert low <= rate * 1.3
    assert high >= rate / 1.3
    assert gate.threshold == 0.123
    assert found.gate.threshold == found.threshold
    assert float(found.gate(x).double().mean()) == pytest.approx(rate, rel=0.25)
    assert found.rows == 4000


def test_a_half_chooses_the_threshold_exactly():
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    found = calibrate_gate(nn.Sequential(nn.Identity()), ProjectionAbove(V, 0.0), retain=x, false_positive_rate=0.1)
    scores = x[:, 0].double()
    above = int((scores > found.threshold).sum())
    assert above == pytest.approx(10 + found.rate * 100, abs=1e-6)  # 10 % of the half that chooses, and the other's
    assert any(abs(found.threshold - own) < 1e-12 for own in scores.tolist())


@pytest.mark.parametrize("per", ["sequence", "last", "token"])
def test_a_gate_is_calibrated_on_what_it_reads(per):
    lm = llama()
    size = lm.config.hidden_size
    v = SteeringVector({"model.layers.0": torch.randn(size, generator=torch.Generator().manual_seed(0))})
    ids = torch.randint(1, lm.config.vocab_size, (60, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[:, 4] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    found = calibrate_gate(lm, ProjectionAbove(v, 0.0, per=per), retain=batch, false_positive_rate=0.1, progress=False)
    assert found.rows == (240 if per == "token" else 60)
    with torch.no_grad():
        h = lm.model(ids[:, :4], output_hidden_states=True).hidden_states[1]
    seen = {"sequence": h.mean(dim=1), "last": h[:, -1], "token": h.flatten(0, 1)}[per]
    fires = float(found.gate(seen).double().mean())
    low, high = found.interval
    assert low / 2 <= fires <= high * 2


def test_scores_that_are_not_finite_are_refused():
    x = torch.randn(400, 3)
    x[:30] = float("nan")
    with pytest.raises(StatisticsError, match="30 of 400 scores at site '0' are not finite"):
        calibrate_gate(nn.Sequential(nn.Identity()), ProjectionAbove(V, 0.0), retain=x, false_positive_rate=0.05)


def test_too_few_rows_and_what_is_no_such_gate_are_refused():
    model, x = nn.Sequential(nn.Identity()), torch.randn(50, 3)
    with pytest.raises(StatisticsError, match=r"25 scores .* do not tell a rate of 0.01; expected more than 200 rows"):
        calibrate_gate(model, ProjectionAbove(V, 0.0), retain=x, false_positive_rate=0.01)
    gates = [And(ProjectionAbove(V, 0.0), CosineAbove(V, 0.0)), ProjectionAbove, None]
    for wrong in gates:
        with pytest.raises(TypeError, match="gate: expected one that compares a score with a threshold"):
            calibrate_gate(model, wrong, retain=x)
    for rate in (0, 1, -0.1, 2):
        with pytest.raises(ValueError, match="false_positive_rate"):
            calibrate_gate(model, ProjectionAbove(V, 0.0), retain=x, false_positive_rate=rate)
