import torch
from torch import nn

from actsteer import Steerer, SteeringVector, find_sites


def solve(model, pictures):
    places = find_sites(model, lambda name, module: isinstance(module, nn.ReLU))
    v = SteeringVector({"stages.1.act1": torch.eye(8)[5]})
    with Steerer(model, v, c=2, axis={"stages.1.act1": 1}):
        return places, model(pictures)
