"""What the report says beside its numbers: titles, a line on each name, captions, and readings made of the results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from reference.language.data import BAD, GOOD, QUESTIONS
from reference.language.study import DEPTH

TITLES = {
    "sentiment": "1. Sentiment: a mean difference, against c",
    "topic": "2. A condition: only where the prompt is about cooking",
    "refusal": "3. Apologies: a direction taken out at every writer of the residual stream",
    "low_rank": "4. An edit of low rank, trained on prompts, beside a trained vector",
    "prompt": "5. A prompt, distilled into an edit",
    "generations": "6. Side by side",
}

GLOSSARY = {
    "sentiment": {
        "log-odds": f"""log p(one of {len(GOOD)} good words comes next) less that of {len(BAD)} bad ones, in nats, over
        prompts.""",
        "happy endings": """log p(a happy ending) less that of an unhappy one, in nats, over beginnings; and the share
        of beginnings of which the happy one is preferred.""",
        "perplexity": """of neutral text, but for the first token of each; ratio is that to the unsteered model. Of the
        prompts it is that of the same text behind them, to be compared with “here is a text”, which asks for
        nothing.""",
        "calibrated": "the block and the strength that calibrate chooses on other prompts.",
        "worst random, shuffled, stretched": """of directions that mean nothing, at c = 1, the one that moves the
        log-odds most, up or down. Random ones are drawn like activations of neutral text, and as long as the vector;
        shuffled ones are mean differences of the same pairs, of which one half is turned round; stretched ones are
        these, made as long as the vector.""",
        "“answer cheerfully”, ...": "the unsteered model with these words in front of every text.",
    },
    "topic": {
        "probe": "a logistic regression at the last token of the prompt.",
        "cosine": "the cosine of the activation there with the mean difference.",
        "fires wrongly": "held-out prompts about something else for which the gate fires.",
        "moved by": "the log-odds of good words, in nats, by the sentiment vector at c = 1 behind the gate.",
        "left alone": "the share of those prompts for which the log-odds are bit for bit those of the unsteered model.",
    },
    "refusal": {
        "impossible": "requests that a model of text cannot fulfil, as to turn off a light; possible: the others.",
        "log p": "the mean log-probability, in nats, with which the answer begins with “I'm sorry”.",
        "says sorry": "the share of greedy answers with the word in their first tokens, 12 at most.",
        "ablated": "the direction is taken out of the embeddings, and of what every attention and MLP writes.",
        "added": "the direction is added, c = 1, at the block where it was found.",
        "random": """another direction, drawn like activations of neutral text, is taken out at the same places. It
        has no choice of blocks, as the direction has, by the requests that it was fitted on.""",
    },
    "low_rank": {
        "vector": "one constant vector, trained in the same way on the same prompts; other sentences are to stay.",
        "low_rank": "h + Rᵀ(W h + b - R h), trained; how much it adds along each direction depends on the activation.",
        "right": "log-odds above 0 where the prompt is about cooking, and below 0 where not; the mean of both shares.",
    },
    "prompt": {
        "KL": "KL(prompted ‖ not prompted) at the tokens of the answers, in nats for a token.",
        "constant": "the mean difference of the activations with the prompt and without it.",
        "rank 1": "h + a(h) v, with a(h) affine in the activation h; rank 8 and full rank: along more directions.",
    },
    "generations": {
        "c = 2, c = -2": "the sentiment vector of experiment 1, at twice its length, at all tokens.",
        "answer cheerfully": "the unsteered model, asked to in the question.",
    },
}

CAPTIONS = {
    "sentiment": """The three measures against c on held-out texts. Steering works where the orange line moves and the
    grey marks, directions that mean nothing, stay; what it costs is on the right.""",
    "topic": """What each gate compares with its threshold, for every held-out prompt: it fires right of the dashed
    line.""",
    "refusal": """How likely an answer begins with an apology, on held-out requests. The further left, the less
    likely; crosses are random directions taken out at the same places.""",
    "low_rank": """The log-odds of good words for every held-out prompt. Cooking is to be right of the dashed line,
    and all else left of it.""",
    "prompt": """How far the answers without the prompt are from those with it, on held-out questions; grey is the
    constant vector, orange the edits whose strength depends on the activation. Lines: the questions by which they
    were fitted.""",
}


def readings(results: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """A paragraph for each experiment."""
    return {name: " ".join(READINGS[name](document).split()) for name, document in results.items()}


def moved(document: Mapping[str, Any], c: float) -> float:
    """By how much the log-odds of experiment 1 are moved at a strength."""
    (row,) = (row for row in document["curve"] if row["c"] == c)
    return float(row["log_odds"] - document["unsteered"]["log_odds"])


def worst_control(document: Mapping[str, Any], kind: str) -> float:
    """The largest move of the log-odds by a control of experiment 1."""
    plain = document["unsteered"]["log_odds"]
    return float(max(abs(row["log_odds"] - plain) for row in document["controls"][kind]))


def cost(document: Mapping[str, Any], c: float) -> float:
    """The perplexity at a strength, as a multiple of the unsteered model's."""
    (row,) = (row for row in document["curve"] if row["c"] == c)
    return float(row["perplexity"] / document["unsteered"]["perplexity"])


def _sentiment(document: Mapping[str, Any]) -> str:
    up, down = moved(document, 1), moved(document, -1)
    worst = {kind: worst_control(document, kind) for kind in document["controls"]}
    least, largest = min(up, -down), max(worst["random"], worst["shuffled"])
    reached = least > 2 and max(cost(document, 1), cost(document, -1)) < 1.25 and least >= 2 * largest
    along = max(abs(own) for own in document["cosines"]["stretched"])
    plain = document["unsteered"]["log_odds"]
    said = {name: own["log_odds"] - plain for name, own in document["prompts"].items()}
    best = max(said.values())
    found = document["calibrated"]
    return f"""At {document["site"]}, near {DEPTH:g} of the depth, the raw mean difference moves the log-odds by
    {up:+.2f} at c = 1 and by {down:+.2f} at c = -1, at {cost(document, 1):.2f} and {cost(document, -1):.2f} times the
    perplexity. The worst of {len(document["controls"]["random"])} random directions moves them by
    {worst["random"]:.2f}, the worst of as many fits to shuffled pairs, at the same c, by {worst["shuffled"]:.2f}.
    What was aimed at, more than 2 either way, at less than 1.25 times the perplexity, and by at least twice the worst
    of these, is {"reached" if reached else "not reached"}. Stretched to the length of the vector a shuffled fit, whose
    cosine with the vector is up to {along:.2f} either way, moves them by up to {worst["stretched"]:.2f}: the vector
    does {least / worst["stretched"]:.1f} times as much as that, in its weaker direction. Writing
    “answer cheerfully” in front moves them by {said["answer cheerfully"]:+.2f}, “answer gloomily” by
    {said["answer gloomily"]:+.2f}, and words that ask for
    nothing by {said["here is a text"]:+.2f}: so
    {"the vector does more than" if up > best else "the vector does no more than"} a prompt here. calibrate says:
    {found["verdict"]}; on the prompts of this table the log-odds are {found.get("log_odds", plain):.2f}."""


def _topic(document: Mapping[str, Any]) -> str:
    parts = [
        f"""The {name} finds {gate["recall"]:.0%} of {gate["texts"][0]} held-out prompts about cooking, and fires for
        {gate["fires wrongly"]} of {gate["texts"][1]} others, for which a share of {document["asked for"]:.0%} was
        asked for."""
        for name, gate in document["gates"].items()
    ]
    shift = document["gates"]["probe"]["shift"]
    return f"""{" ".join(parts)} Behind the probe the sentiment vector moves the log-odds of prompts about cooking by
    {shift["cooking"]["gated"]:+.2f} and of others by {shift["other"]["gated"]:+.2f}; without a gate by
    {shift["cooking"]["ungated"]:+.2f} and {shift["other"]["ungated"]:+.2f}."""


def _refusal(document: Mapping[str, Any]) -> str:
    plain, own, random = (document[name] for name in ("unsteered", "ablated", "random"))
    still, left, worth = ([one[key] for one in random] for key in ("sorry impossible", "impossible", "perplexity"))
    before = plain["perplexity"]
    told = (
        "so that such a share by itself proves little"
        if min(still) < plain["sorry impossible"] / 2
        else "none of them less than half of the share before"
    )
    return f"""Without the direction, of {document["site"]}, the log-probability of an apology goes from
    {plain["impossible"]:.2f} to {own["impossible"]:.2f}, and the share of the answers to impossible requests that say
    sorry from {plain["sorry impossible"]:.0%} to {own["sorry impossible"]:.0%}, at {own["perplexity"] / before:.2f}
    times the perplexity of neutral text. Of {len(random)} random directions that are taken out at the same places each
    leaves a log-probability of {min(left):.2f} to {max(left):.2f} and a share of {min(still):.0%} to {max(still):.0%},
    at {min(worth) / before:.2f} to {max(worth) / before:.2f} times the perplexity; {told}. The block of the direction
    is the best of {len(document["tried"])} by the requests that it was fitted on, a choice that the random ones do not
    have. Whether an answer without an apology is a better one is not measured."""


def _low_rank(document: Mapping[str, Any]) -> str:
    right = {name: document[name]["right"] for name in ("unsteered", "vector", "low_rank")}
    ratio = {
        name: document[name]["perplexity"] / document["unsteered"]["perplexity"] for name in ("vector", "low_rank")
    }
    return f"""After {document["prompts"]} prompts the edit of rank {document["rank"]} has the right sign on
    {right["low_rank"]:.0%} of held-out prompts; a vector that was trained alike {right["vector"]:.0%}, the unsteered
    model {right["unsteered"]:.0%}. The perplexity of neutral text, none of which was seen in training, is
    {ratio["low_rank"]:.2f} times what it was, and with the vector {ratio["vector"]:.2f}."""


def _generations(document: Mapping[str, Any]) -> str:
    return f"""Greedy answers to {len(document["questions"])} of the {len(QUESTIONS)} questions of this reference; how
    good they are is not measured."""


def _prompt(document: Mapping[str, Any]) -> str:
    kl = {name: own["asked"] for name, own in document["kl"].items()}
    edits = ", ".join(f"{name} {kl[name]:.3f} ({kl[name] / kl['unsteered']:.0%})" for name in list(kl)[1:])
    return f"""The prompt is “{document["prompt"]}”. Without it the answers are {kl["unsteered"]:.3f} nats for a token
    from the prompted model's, on {document["answers"]["asked"]} questions that no edit was fitted on. What each edit
    leaves of that: {edits}."""


READINGS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "sentiment": _sentiment,
    "topic": _topic,
    "refusal": _refusal,
    "low_rank": _low_rank,
    "prompt": _prompt,
    "generations": _generations,
}
