import torch
from torch import nn

from actsteer import LowRank, Steerer, optimize


def solve(model, new, old, labels):
    edit = optimize(
        model,
        torch.cat([new.repeat(4, 1), old]),  # there are eleven times as many of the old
        targets=torch.cat([torch.full((4 * len(new),), 11), labels]),
        loss=nn.functional.cross_entropy,
        sites=["1", "3"],
        train=LowRank(rank=4),
        steps=400,
        lr=0.03,
        generator=torch.Generator().manual_seed(0),
    )
    return Steerer(model, edit)
