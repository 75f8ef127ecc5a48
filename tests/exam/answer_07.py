from actsteer import ProjectionAbove, Steerer, WhitenedMeanDifference, collect, fit


def solve(model, threes, fives, rest):
    sides = {
        "positive": collect(model, threes, sites="1", covariance=True),
        "negative": collect(model, rest, sites="1", covariance=True),
    }
    gate = ProjectionAbove.between(WhitenedMeanDifference()(**sides), **sides)
    return Steerer(model, fit(model, positive=fives, negative=threes, sites="1"), c=2.0, gate=gate)
