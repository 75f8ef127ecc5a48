from actsteer import SteeringVector, fold


def solve(model, direction, c, x):
    return fold(model, SteeringVector({"1": direction}), c, verify_on=x)
