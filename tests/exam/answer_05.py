import torch

from actsteer import OutputMetric, SteeringVector, calibrate


def solve(model, directions, zeros, kept):
    v = SteeringVector(directions, concept="four")
    effect = OutputMetric(inputs=zeros, score=lambda logits: logits.log_softmax(dim=1)[:, 4])
    generator = torch.Generator().manual_seed(0)
    result = calibrate(model, v, evaluate=effect, retain=kept, budget=0.2, controls=39, generator=generator)
    return result.best.sites or list(directions), result.best.c, result.found
