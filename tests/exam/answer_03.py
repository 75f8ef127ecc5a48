import torch

from actsteer import fit


def solve(model, positive, negative):
    def parts(folder):
        return (torch.load(file) for file in sorted(folder.iterdir()))

    return fit(model, positive=parts(positive), negative=parts(negative), sites="3")["3"]
