"""Pads: a Steerer leaves them alone, folded weights do not, and what counts is equal."""

import pytest
import torch

from actsteer import Steerer, SteeringVector, fold
from actsteer.folding.unpadded import at_tokens, unpadded
from tests.zoo import llama, normal

LEFT = {
    "input_ids": torch.tensor([[2, 2, 5, 9], [3, 14, 15, 9]]),
    "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
}
RIGHT = {name: tensor.flip(1) for name, tensor in LEFT.items()}


def test_rows_lose_their_pads_on_either_side_and_in_every_tensor():
    places = torch.arange(4).expand(2, 4)
    one, two = unpadded(LEFT | {"position_ids": places, "use_cache": False, "scale": torch.ones(3)})
    assert one["input_ids"].tolist() == [[5, 9]] and one["position_ids"].tolist() == [[2, 3]]
    assert two["input_ids"].tolist() == [[3, 14, 15, 9]]
    assert one["attention_mask"].tolist() == [[1, 1]] and one["use_cache"] is False and len(one["scale"]) == 3


def test_an_encoder_and_a_decoder_have_a_mask_each():
    batch = LEFT | {"decoder_input_ids": torch.tensor([[1, 2], [3, 4]]), "labels": torch.tensor([[5, 6], [7, 8]])}
    one, _ = unpadded(batch)
    assert one["decoder_input_ids"].tolist() == [[1, 2]] and one["labels"].tolist() == [[5, 6]]
    one, _ = unpadded(batch | {"decoder_attention_mask": torch.tensor([[1, 0], [1, 1]])})
    assert one["decoder_input_ids"].tolist() == [[1]] and one["labels"].tolist() == [[5]]
    assert one["input_ids"].tolist() == [[5, 9]]


def test_of_outputs_only_what_stands_at_tokens_counts():
    logits, flat, pooled, weights = torch.rand(2, 4, 3), torch.rand(8, 3, 2), torch.rand(2, 3), torch.rand(2, 5, 4, 4)
    real = LEFT["attention_mask"].bool()
    found = at_tokens([logits, flat, pooled, weights], LEFT)
    assert [tuple(own.shape) for own in found] == [(6, 3), (6, 3, 2), (2, 3)]  # the weights are of pads too
    assert torch.equal(found[0], logits[real]) and torch.equal(found[1], flat[real.flatten()])


@pytest.mark.parametrize(
    "batch",
    [torch.ones(2, 2), (torch.ones(2, 2),), {"x": torch.ones(2)}, {**LEFT, "attention_mask": torch.ones(2, 4)}],
    ids=["tensor", "tuple", "no mask", "no pads"],
)
def test_without_pads_the_batch_is_what_it_was(batch):
    (same,) = unpadded(batch)
    assert same is batch


@pytest.mark.parametrize("batch", [LEFT, RIGHT], ids=["left", "right"])
def test_a_fold_is_proved_on_texts_of_several_lengths(batch):
    model, v = llama(), SteeringVector({"model.layers.1": normal(16, seed=3)})
    folded = fold(model, v, 2.0, verify_on=batch)
    real = batch["attention_mask"].bool()
    with torch.no_grad(), Steerer(model, v, c=2.0):
        steered = model(**batch).logits[real]
    assert torch.allclose(folded(**batch).logits[real], steered, atol=1e-9)
    assert not torch.allclose(model(**batch).logits[real], steered, atol=1e-3)


def test_a_mask_that_is_passed_by_position_is_seen():
    model, v = llama(), SteeringVector({"model.layers.1": normal(16, seed=3)})
    folded = fold(model, v, 2.0, verify_on=(LEFT["input_ids"], LEFT["attention_mask"]))
    with torch.no_grad(), Steerer(model, v, c=2.0):
        steered = model(**LEFT).logits
    real = LEFT["attention_mask"].bool()
    assert torch.allclose(folded(**LEFT).logits[real], steered[real], atol=1e-9)
