from actsteer import OutputMetric, SteeringVector, calibrate


def solve(model, directions, zeros, kept):
    v = SteeringVector(directions, concept="four")
    effect = OutputMetric(inputs=zeros, score=lambda logits: logits.log_softmax(dim=1)[:, 4])
    result = calibrate(model, v, evaluate=effect, retain=kept, budget=0.2, controls=19)
    if result.chosen is None:
        return list(directions), 0.0, False
    return result.chosen["sites"], result.chosen["c"], result.found
