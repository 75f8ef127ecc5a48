from actsteer import Steerer, fit


def solve(model, left, right):
    return Steerer(model, fit(model, positive=right, negative=left, sites="1"), c=1.5)
