"""A control vector of ours in llama.cpp: the logits that torch gives with the same vector attached."""

import importlib.util

import pytest
import torch

from actsteer import Steerer, SteeringVector
from benchmarks.llama_cpp import LlamaCpp, write_llama
from reference.language.model import INSTALL, load, packaged
from tests.zoo import llama

IDS = [5, 17, 33, 2, 30, 11]


def check(model, folder, *, site, norm, tolerance):
    """In llama.cpp the file does at its block what the Steerer does, and at the neighbours something else."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(model.config.hidden_size, generator=generator)
    v = SteeringVector({site: norm * direction / direction.norm()}, concept="random")
    v.save(folder / "v.gguf", model=model)
    write_llama(model, folder / "model.gguf")
    with torch.no_grad():
        plain = model(torch.tensor([IDS])).logits[0, -1]
        with Steerer(model, v):
            steered = model(torch.tensor([IDS])).logits[0, -1]
    other = LlamaCpp(folder / "model.gguf")
    try:
        size = model.config.vocab_size
        assert (other.logits(IDS, size) - plain).abs().max() < tolerance
        there = {shift: other.logits(IDS, size, folder / "v.gguf", shift=shift) for shift in (-1, 0, 1)}
    finally:
        other.close()
    error = {shift: float((logits - steered).abs().max()) for shift, logits in there.items()}
    print(f"differences at block N - 1, N, N + 1: {error}; steered by {float((steered - plain).abs().max()):.3g}")
    assert error[0] < tolerance, error
    assert min(error[-1], error[1]) > 10 * tolerance, error
    assert (steered - plain).abs().max() > 10 * tolerance


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None, reason="llama.cpp is prebuilt for some machines only"
)
@pytest.mark.parametrize("site", ["model.layers.2", "model.layers.3:in"])
def test_a_tiny_llama(tmp_path, site):
    model = llama(hidden_size=64, intermediate_size=96, head_dim=16, num_attention_heads=4, num_hidden_layers=4)
    check(model, tmp_path, site=site, norm=4.0, tolerance=1e-3)


@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(packaged() is None, reason=f"{INSTALL} accelerate")
def test_smollm2(tmp_path):
    model, _ = load()
    check(model, tmp_path, site="model.layers.14", norm=10.0, tolerance=1e-3)
