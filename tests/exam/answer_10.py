import torch

from actsteer import Steerer, SteeringVector


def solve(model, direction, x, strengths, compiler):
    steerer = Steerer(model, SteeringVector({"1": direction}), backend="buffer").install()
    compiled, answers = torch.compile(model, backend=compiler), []
    for c in strengths:
        steerer.c = c
        with steerer:
            answers.append(compiled(x))
    steerer.uninstall()
    return answers
