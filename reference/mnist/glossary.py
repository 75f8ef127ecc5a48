"""What the names in the report mean, a line each."""

from __future__ import annotations

COLUMNS = {
    "overall": "the accuracy on the test images of all ten digits.",
    "retained": "the accuracy on the old digits, those it was trained on, as a share of the unsteered model's.",
    "acquired": "the accuracy on the new digits, those it was never trained on; “of 8” is that on one of them.",
}

METHODS = {
    "unsteered": "the model as it was trained; nothing is added.",
    "layer_mean": """mean activations on the new digit minus those on the old ones, averaged over units to one number
    per layer, as the published notebooks compute it.""",
    "mean_difference": "the same difference with one number per unit, as the published text says.",
    "mapped_mean_difference": """B's mean on 9 minus its mean on the rest, carried into A's basis by a linear map fitted
    between the two models' activations.""",
    "mapped_gate": """a trained vector at the last layer, added where another model's own direction for nines, carried
    into A's basis by a map fitted on 0-8 alone, finds one.""",
    "autoencoder_teacher": "constant vectors at all four layers, trained on what the published B takes for a nine.",
    "expert_teacher": """the same on the verdicts of a network trained to tell 9 from the rest, and gated vectors on
    top.""",
    "low_rank": """a trained edit of rank 1 (for two digits, of rank 4) at all four layers: how much it adds depends
    linearly on the activation.""",
    "gradient": "one constant vector at each of the four layers, trained by gradient with the weights frozen.",
    "gated": """a trained vector at the last layer for each new digit, added where a linear discriminant there finds the
    digit.""",
    "probed": """the same vector, added where nine logistic probes at an early layer, the digit against each other one,
    all find it.""",
    "few_shot": "as gradient, trained on 64 images of each digit.",
    "gated_gradient": """gradient, and on top of it gated vectors, each between 9 and a digit that it is still confused
    with.""",
    "plain_sum": "one set of constant vectors trained for 8 and one for 9, each at its own best strength, added up.",
    "joint": "one constant vector at each of the four layers, trained for both new digits at once.",
    "gated_joint": """joint, and on top of it gated vectors, each between a new digit and one that it is still confused
    with.""",
    "ceiling": "the same network trained on all ten digits, unsteered: for scale.",
}

HERE = {
    "cross": {
        "layer_mean": """B's mean activations on 9 minus A's on 0-8, averaged over units to one number per layer, as the
        published notebooks compute it.""",
        "A": "the model that is steered, trained on the digits 0-8.",
        "the published B": """an autoencoder with A's hidden layers and 784 outputs, trained on images of 9 alone to
        reproduce them (mean squared error).""",
    },
    "noise": {
        "sigma": "the standard deviation of the Gaussian noise on the training images; pixels have mean 0, std 1."
    },
}
"""What a name means in one experiment alone."""


def lines(experiment: str, methods: list[str]) -> dict[str, str]:
    """Each method of an experiment's table, and what else its text takes for known."""
    named = {name: METHODS[name] for name in methods} | HERE.get(experiment, {})
    return {name: " ".join(line.split()) for name, line in named.items()}
