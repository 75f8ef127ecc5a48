"""Doses: several strengths in one forward pass give what each of them gives alone."""

import pytest
import torch

from actsteer import OutputMetric, Steerer, SteeringVector
from actsteer.tuning.doses import Doses, has_independent_rows
from tests.tuning.trained import is_two, points, toward_two, trained
from tests.zoo import exact, llama, normal

STRENGTHS = [0.0, 0.5, -1.0, 2.0, 3.0]


def alone(model, vectors, batches, c):
    with Steerer(model, vectors, c=c), torch.no_grad():
        return [model(**batch) if isinstance(batch, dict) else model(batch) for batch in batches]


@pytest.mark.parametrize("size", [1, 4, 8, 100])
def test_rows_of_a_tensor(size):
    model, x = exact(), normal(10, 4)
    v = SteeringVector({"1": torch.tensor([1.0, -2.0, 0.5, 4.0])})
    found = [[] for _ in STRENGTHS]
    passes = 0
    with Steerer(model, v, c=0.0) as steerer, torch.no_grad():
        for run in Doses(model, steerer, batch_size=size, together=True).runs(x, STRENGTHS):
            passes += 1
            assert run.output.shape[0] == run.rows * len(run.which) <= max(size, run.rows)
            for place, part in zip(run.which, run.output.chunk(len(run.which)), strict=True):
                found[place].append(part)
    for own, c in zip(found, STRENGTHS, strict=True):
        assert torch.allclose(torch.cat(own), alone(model, v, [x], c)[0])
    assert passes == {1: 50, 4: 13, 8: 7, 100: 1}[size]


def test_a_tokenizers_batches():
    model = llama()
    v = SteeringVector(
        {"model.layers.0": torch.randn(model.config.hidden_size, generator=torch.Generator().manual_seed(0))}
    )
    ids = torch.randint(1, model.config.vocab_size, (3, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with Steerer(model, v, c=0.0) as steerer, torch.no_grad():
        (run,) = Doses(model, steerer, batch_size=64, together=True).runs([batch], STRENGTHS)
    for own, c in zip(run.output.logits.chunk(len(STRENGTHS)), STRENGTHS, strict=True):
        assert torch.allclose(own, alone(model, v, [batch], c)[0].logits, atol=1e-5)


@pytest.mark.parametrize("batch", [({"x": normal(4, 4)}), ((normal(4, 4),))], ids=["names of its own", "a tuple"])
def test_any_other_batch_runs_once_for_every_strength(batch):
    model = Named() if isinstance(batch, dict) else exact()
    v = SteeringVector({"inner.1" if isinstance(batch, dict) else "1": torch.ones(4)})
    with Steerer(model, v, c=0.0) as steerer, torch.no_grad():
        runs = list(Doses(model, steerer, batch_size=64, together=True).runs([batch], STRENGTHS))
    assert [list(run.which) for run in runs] == [[place] for place in range(len(STRENGTHS))]


class Named(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = exact()

    def forward(self, x):
        return self.inner(x)


def test_a_metric_of_outputs_is_the_same_at_once_and_one_by_one_with_the_targets_of_its_rows():
    model, v, x = trained(), toward_two(trained()), points(0, 30, seed=1)
    y = torch.arange(30) % 12
    metric = OutputMetric(inputs=x, targets=y, score=lambda out, own: out.gather(1, own[:, None])[:, 0], batch_size=7)
    with Steerer(model, v, c=0.0) as steerer:
        at_once = metric.at(Doses(model, steerer, batch_size=64, together=True), STRENGTHS)
        for c, own in zip(STRENGTHS, at_once, strict=True):
            steerer.c = c
            assert torch.allclose(metric(model), own, atol=1e-5)
            with torch.no_grad():
                assert torch.allclose(own, model(x).gather(1, y[:, None])[:, 0].double(), atol=1e-5)


def test_a_score_that_is_no_number_for_every_row_is_refused():
    for wrong in (lambda out: out, lambda out: out.mean(), lambda out: None):
        with pytest.raises(TypeError, match=r"OutputMetric.score: expected a number for every row, \(10,\), got"):
            OutputMetric(inputs=points(0, 10, seed=1), score=wrong)(trained())
    assert is_two()(trained()).dtype == torch.float64


class Backward(torch.nn.Module):
    """(B, T, d) in, (T, B, d) out."""

    def forward(self, x):
        return x.transpose(0, 1)


class Mixed(torch.nn.Module):
    def __init__(self, mix):
        super().__init__()
        self.mix = mix

    def forward(self, x):
        return self.mix(x)


@pytest.mark.parametrize(
    ("model", "independent"),
    [
        (trained(), True),
        (Mixed(lambda x: x - x.mean(dim=0)), False),
        (Mixed(lambda x: x.cumsum(dim=0)), False),
        (Mixed(lambda x: x.flip(0).cumsum(dim=0).flip(0)), False),
        (Mixed(lambda x: x[None]), False),
        (Mixed(lambda x: x.sum()), False),
        (Backward(), False),
        (torch.nn.GRU(6, 6), False),
    ],
)
def test_rows_that_depend_on_each_other_are_known(model, independent):
    x = torch.randn(36, 36) if isinstance(model, torch.nn.Sequential) else torch.randn(6, 6, 6)
    assert has_independent_rows(model, x, batch_size=64) == independent


def test_tokens_are_tried_in_another_order():
    model = llama()
    ids = torch.randint(1, model.config.vocab_size, (3, 5))
    assert has_independent_rows(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], batch_size=64)
    assert not has_independent_rows(model, [(ids,)], batch_size=64)  # which runs one strength at a time
