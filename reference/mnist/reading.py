"""The reading: what the numbers say, in sentences whose figures are taken from the results themselves."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from reference.mnist.suite import Results

OVERALL = """Read the unsteered row first. A network that never says the new digit at all scores {unsteered.overall}
overall, because it loses that digit only. An overall accuracy near that number is therefore no evidence of steering,
which is why the published overall accuracies say little; look at acquired and retained together."""

CROSS = """The published direction mixes two models that live in different bases. With the strength chosen to balance
old and new on held-out images, one number per layer acquires {layer_mean.acquired} of the nines and retains
{layer_mean.retained}; one number per unit acquires {mean_difference.acquired} and retains {mean_difference.retained}.
Where no strength yields a nine at all, the choice falls on not steering. Carried over by a linear map into A's own
basis, the mean acquires {mapped_mean_difference.acquired}: a mean in the right place is still a mean, and the readout
of 9 has never learned to answer to it. What does cross over is a decision. A gate carried over by a map fitted on 0-8
alone reaches {mapped_gate.overall} overall, and vectors trained on the verdicts of a model that can tell nines, with
no label in their training, {expert_teacher.overall}, {expert_teacher.acquired} of the nines acquired and
{expert_teacher.retained} retained. The published B, an autoencoder of nines, makes a poor teacher
({autoencoder_teacher.overall} overall): it reproduces other digits too well to tell them from nines."""

SELF = """One number per layer, as the published notebooks compute it, acquires {layer_mean.acquired} and retains
{layer_mean.retained}; the spread over seeds shows how far that is luck. One number per unit, as their text says,
acquires {mean_difference.acquired} at the best strength there is. Constant vectors trained by gradient, the weights
frozen, reach {gradient.overall} overall and acquire {gradient.acquired}; with 64 images of each digit,
{few_shot.overall} and {few_shot.acquired}. A vector at the last layer, added only where a discriminant finds a nine,
reaches {gated.overall}; where nine logistic probes at an early layer, nine against each other digit, all find one,
{probed.overall} overall, {probed.retained} retained, {probed.acquired} acquired. Gated gradient puts the two together:
the constant vectors, and then gated ones between 9 and each digit that it is still confused with;
{gated_gradient.overall} overall, {gated_gradient.retained} retained, {gated_gradient.acquired} acquired. An edit of
rank 1, h + Rᵀ(W h + b - R h) at the four layers, trained by gradient with the weights frozen, reaches
{low_rank.overall} overall, {low_rank.retained} retained, {low_rank.acquired} acquired. That is no longer plain
steering: at each layer it adds along one direction, but how much of it depends linearly on the activation. Of what it
adds, in squares, {dependence} differs from image to image, where a vector adds the same to all; it is a small trained
layer beside the frozen ones, with 201 numbers per layer where a vector has 100. The same network trained on all ten
digits scores {ceiling.overall}."""

MULTI = """Two vectors that work alone do not simply add up. Trained separately and summed, each at its own best
strength, they acquire {plain_sum.digits}, {plain_sum.overall} overall. A gate per digit keeps them apart:
{gated.digits}, {gated.overall} overall; with gates of nine logistic probes each, {probed.digits}, {probed.overall}
overall and {probed.retained} retained: what the vectors do is simple, and it is the gates that decide. One vector
trained for both digits reaches {joint.overall}; gated ones on top of it, between each new digit and what it is still
confused with, {gated_joint.overall} overall, {gated_joint.retained} retained, {gated_joint.digits}. An edit of rank 4
at the four layers reaches {low_rank.overall} overall, {low_rank.retained} retained, {low_rank.digits}; it adds along
four directions with strengths that depend linearly on the activation ({dependence} of what it adds, in squares, differs
from image to image), and so decides by itself what the gates decide for the vectors. The means again:
{mean_difference.digits} for one number per unit; {layer_mean.digits} for one per layer, which retains
{layer_mean.retained}."""

NOISE = """The published claim is a rise from 0.62 to 0.89 overall by noise of sigma 0.2, from a single run each. Here
is the largest gain of each method at any sigma over no noise at all, and the spread over seeds of that difference:
{gains}. Training with noise at this learning rate ends unevenly: the worst model of any seed and sigma scores
{worst:.3f} overall before it is steered. Where retained exceeds 1, steering has given back what such a model had lost
of the old digits, and a mean over seeds should be read with that in mind."""


def readings(results: Results) -> dict[str, str]:
    """One paragraph per experiment, and one on overall accuracy itself under "all"."""
    first = next(iter(results.values()))
    clean = first["sigma"]["0.0"] if "sigma" in first else first
    texts = {"cross": CROSS, "self": SELF, "multi": MULTI}
    return {"all": _fill(OVERALL, clean)} | {
        name: _read_noise(document["sigma"]) if name == "noise" else _fill(texts[name], document)
        for name, document in results.items()
    }


def _fill(text: str, document: Mapping[str, Any]) -> str:
    """`{method.score}` becomes that method's mean over seeds; `.digits` lists the new digits one by one."""
    rows = {"unsteered": document["unsteered"], **document["methods"]}
    if "ceiling" in document:
        rows["ceiling"] = document["ceiling"]
    means = {
        name: SimpleNamespace(
            digits=" and ".join(f"{s['mean']:.3f} of the {digit}s" for digit, s in scores["acquired_by_digit"].items()),
            **{key: f"{scores[key]['mean']:.3f}" for key in ("overall", "retained", "acquired")},
        )
        for name, scores in rows.items()
    }
    share = document.get("dependence")
    return text.format(**means, dependence="" if share is None else f"{share['mean']:.0%}")


def _read_noise(sigmas: Mapping[str, Any]) -> str:
    worst = min(value for at in sigmas.values() for value in at["unsteered"]["overall"]["values"])
    sentences = []
    for method, clean in sigmas["0.0"]["methods"].items():
        noisy = {sigma: at["methods"][method]["overall"] for sigma, at in sigmas.items() if sigma != "0.0"}
        sigma, best = max(noisy.items(), key=lambda pair: pair[1]["mean"])
        gain = best["mean"] - clean["overall"]["mean"]
        spread = (best["std"] ** 2 + clean["overall"]["std"] ** 2) ** 0.5
        verdict = "more" if gain > spread else "no more"
        name = method.replace("_", " ")
        sentences.append(f"{name} {gain:+.3f} at sigma {sigma}, {verdict} than the spread of {spread:.3f}")
    return NOISE.format(gains="; ".join(sentences), worst=worst)
