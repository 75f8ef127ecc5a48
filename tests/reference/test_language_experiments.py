"""The language reference on a tiny random model: what its numbers mean, and that its report says what was measured."""

import ast
import json
import re
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import reference.language
from actsteer import Steerer, SteeringVector
from reference.language import __main__ as command
from reference.language import data, low_rank, methods, prompt, refusal, sentiment, topic
from reference.language.model import cache, load, packaged
from reference.language.reading import GLOSSARY, readings
from reference.language.report import TABLES
from reference.language.study import QUICK, Study, drawn_like
from tests.zoo import llama

FILES = sorted(Path(reference.language.__file__).parent.glob("*.py"))
TEMPLATE = (
    "{% for m in messages %}<s> {{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant {% endif %}"
)


def strings(value):
    """Every string in lists, tuples and mappings of them."""
    parts = value.values() if isinstance(value, dict) else value
    return [value] if isinstance(value, str) else [own for part in parts for own in strings(part)]


@pytest.fixture(scope="module")
def study():
    """A random Llama, with a tokenizer that knows every word of the texts."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    texts = [own for name, value in vars(data).items() if name.isupper() for own in strings(value)]
    split = Whitespace()
    words = {word for text in texts for word, _ in split.pre_tokenize_str(text)} | {"user", "assistant"}
    known = {word: index for index, word in enumerate(["<unk>", "</s>", "<pad>", "<s>", *sorted(words)])}
    made = Tokenizer(WordLevel(known, unk_token="<unk>"))
    made.pre_tokenizer = split
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    model = llama(vocab_size=len(known), num_hidden_layers=4, max_position_embeddings=256)
    return Study(model.float(), tokenizer, QUICK)


@pytest.fixture(scope="module")
def results(study, tmp_path_factory):
    """All that the command writes, for the tiny model."""
    out = tmp_path_factory.mktemp("language")
    made = typer.Typer()
    made.command()(command.main)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command, "load", lambda: (study.model, study.tokenizer))
        ran = CliRunner().invoke(made, ["--quick", "--out", str(out)])
    assert ran.exit_code == 0, ran.output
    return out, ran.output


# --- the command -----------------------------------------------------------------------------------------------------
def test_every_experiment_has_its_json_its_table_and_its_reading(results):
    out, printed = results
    documents = {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}
    assert documents.keys() == set(TABLES)
    for name, document in documents.items():
        assert document["experiment"] == name and document["quick"] is True
        assert document["seconds"]["processor"] > 0 and {"torch", "actsteer"} <= document["versions"].keys()
        assert readings({name: document})[name] in text_of((out / "report.html").read_text())
    assert all(f"{number}. " in printed for number in range(1, 7))


def test_the_report_is_self_contained_and_names_what_its_tables_name(results):
    out, _ = results
    report = (out / "report.html").read_text()
    figures = list(out.glob("*.png"))
    assert len(figures) == 2 * 5 and report.count("data:image/png;base64,") == len(figures)
    assert not re.findall(r'(?:src|srcset|href)="(?!data:)', report)
    assert report.count("<table") == len(TABLES) and "A quick run" in report
    for lines in GLOSSARY.values():
        assert all(f"<b>{name}</b>" in report for name in lines)


def text_of(html):
    from html import unescape

    return unescape(html)


def test_a_reading_says_something_else_where_the_numbers_do(results):
    out, _ = results
    own = json.loads((out / "refusal.json").read_text())
    own["unsteered"]["sorry impossible"] = 0.8
    for share, expected in ((0.3, "proves little"), (0.5, "none of them less than half")):
        for one in own["random"]:
            one["sorry impossible"] = share
        assert expected in readings({"refusal": own})["refusal"]
    moods = json.loads((out / "sentiment.json").read_text())
    for c, log_odds in ((1, 9.0), (-1, -9.0)):
        (row,) = (row for row in moods["curve"] if row["c"] == c)
        row["log_odds"], row["perplexity"] = log_odds, moods["unsteered"]["perplexity"]
    assert ", is reached." in " ".join(readings({"sentiment": moods})["sentiment"].split())
    row["perplexity"] *= 1.3
    assert ", is not reached." in " ".join(readings({"sentiment": moods})["sentiment"].split())


# --- the measures ----------------------------------------------------------------------------------------------------
def test_the_log_odds_are_those_of_the_next_word_of_each_text_alone(study):
    prompts = ["The hotel by the lake was", "This", "We baked the potatoes for dinner, and it was"]
    found = study.log_odds(prompts)(study.model)
    for text, own in zip(prompts, found, strict=True):
        ids = torch.tensor([study.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p = study.model(ids).logits[0, -1].double().softmax(dim=0)
        good, bad = (sum(p[study.tokenizer(word)["input_ids"][0]] for word in words) for words in (data.GOOD, data.BAD))
        assert float(own) == pytest.approx(float((good / bad).log()), abs=1e-4)


def test_the_likelihood_of_an_end_is_that_of_its_tokens_alone_whatever_is_beside_it(study):
    begins, ends = ["The guests went home", "She opened the letter and"], [" happy and grateful.", " smiled with joy."]
    found = study.of_ends(begins, ends)
    for begin, end, own in zip(begins, ends, found, strict=True):
        before, whole = (study.tokenizer(text)["input_ids"] for text in (begin, begin + end))
        with torch.no_grad():
            logp = study.model(torch.tensor([whole])).logits[0].double().log_softmax(dim=-1)
        expected = sum(float(logp[place - 1, whole[place]]) for place in range(len(before), len(whole)))
        assert float(own) == pytest.approx(expected, abs=1e-3)


def test_an_answer_is_judged_behind_its_question(study):
    question, answer = "What is a volcano?", "I'm sorry"
    ids = [study.tokenizer(text)["input_ids"] for text in (f"<s> user {question} <s> assistant", f" {answer}")]
    whole = ids[0] + ids[1]
    with torch.no_grad():
        logp = study.model(torch.tensor([whole])).logits[0].double().log_softmax(dim=-1)
    expected = sum(float(logp[place - 1, whole[place]]) for place in range(len(ids[0]), len(whole)))
    assert float(study.of_ends([question], [answer], chat=True)) == pytest.approx(expected, abs=1e-3)


def test_a_prefix_changes_what_the_perplexity_is_given_and_not_what_it_counts(study):
    plain = study.perplexity()
    assert plain > 1 and study.perplexity("Answer cheerfully. ") != plain
    text = data.NEUTRAL[0]
    for prefix in ("", "Answer cheerfully. "):
        one = Study(study.model, study.tokenizer, QUICK)
        one.some = lambda texts: [text] if texts is data.NEUTRAL else list(texts)
        ids, own = (study.tokenizer(each)["input_ids"] for each in (prefix + text, text))
        with torch.no_grad():
            logp = study.model(torch.tensor([ids])).logits[0].double().log_softmax(dim=-1)
        counted = [float(logp[place - 1, ids[place]]) for place in range(len(ids) - len(own) + 1, len(ids))]
        assert one.perplexity(prefix) == pytest.approx(2.718281828 ** (-sum(counted) / len(counted)), rel=1e-3)


# --- the experiments -------------------------------------------------------------------------------------------------
def test_controls_are_as_long_as_the_vector_or_as_they_are_fitted_and_point_elsewhere(study):
    v = study.sentiment
    controls = sentiment.directions_that_mean_nothing(study, v)
    for other in controls["random"] + controls["stretched"]:
        assert float(other.norm()) == pytest.approx(float(v.norm()), rel=1e-5)
        assert abs(float(other.cosine(v))) < 0.99
    for fitted, stretched in zip(controls["shuffled"], controls["stretched"], strict=True):
        assert float(fitted.cosine(stretched)) == pytest.approx(1.0, abs=1e-5)
    rows = torch.randn(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 1.0, 0.0])
    like = SteeringVector({"0": torch.tensor([0.0, 2.0, 0.0])})
    drawn = torch.stack([drawn_like(rows, like, torch.Generator().manual_seed(seed))["0"] for seed in range(50)])
    shares = drawn.square().mean(dim=0)
    assert shares[0] > 1.5 * shares[1] > 0 and shares[2] == 0


def test_a_random_direction_is_drawn_like_all_tokens_but_the_first(study):
    one = Study(study.model, study.tokenizer, QUICK)
    one.some = lambda texts: [data.KEPT[0]]
    (site,) = study.sentiment.sites
    ids = torch.tensor([study.tokenizer(data.KEPT[0])["input_ids"]])
    seen = []
    handle = study.model.get_submodule(site).register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        study.model(ids)
    handle.remove()
    h = (seen[0][0] if isinstance(seen[0], tuple) else seen[0])[0].double()
    unit = (h / h.norm(dim=1, keepdim=True))[1:]
    drawn = one.random_direction(study.sentiment, torch.Generator().manual_seed(0))[site].double()
    basis = torch.linalg.svd(unit - unit.mean(dim=0)).Vh[: len(unit) - 1]
    assert len(basis) < len(drawn) - 1
    assert float((drawn - basis.T @ (basis @ drawn)).norm()) < 1e-4 * float(drawn.norm())


def test_behind_a_gate_that_never_fires_nothing_moves_and_behind_one_that_always_does_all_do(study):
    class Fires:
        per = "last"

        def __init__(self, site, whether):
            self.site, self._whether = site, whether

        def __call__(self, rows):
            return torch.full((len(rows),), self._whether)

    for whether in (False, True):
        found = topic.behind(study, Fires(study.site(topic.DEPTH), whether))["shift"]
        for own in found.values():
            assert own["left alone"] == (0 if whether else 1)
            assert own["gated"] == (pytest.approx(own["ungated"]) if whether else 0)
            assert own["ungated"] != 0


def test_precision_and_recall_are_those_of_scores_above_the_threshold():
    told = topic.told(torch.tensor([1.0, 3.0, 4.0, 5.0]), torch.tensor([0.0, 1.0, 6.0]), 2.0)
    assert (told["precision"], told["recall"], told["fires wrongly"]) == (3 / 4, 3 / 4, 1)
    assert told["scores"]["other"] == [-2.0, -1.0, 4.0]
    assert topic.told(torch.zeros(2), torch.zeros(2), 1.0)["precision"] == 0.0


def test_what_is_ablated_is_in_nothing_that_writes_the_stream(study):
    site = study.site(0.5)
    direction = torch.randn(16, generator=torch.Generator().manual_seed(0))
    seen = {}
    blocks = [f"model.layers.{number}" for number in range(4)]
    handles = [
        study.model.get_submodule(name).register_forward_hook(lambda m, a, out, n=name: seen.update({n: out}))
        for name in blocks
    ]
    with refusal.everywhere(study, SteeringVector({site: direction})), torch.no_grad():
        study.model(torch.arange(10)[None])
    for handle in handles:
        handle.remove()
    for out in seen.values():
        assert float(((out[0] if isinstance(out, tuple) else out) @ direction).abs().max()) < 1e-4
    assert len(seen) == 4


def test_the_prompts_that_teach_alternate_and_a_vector_and_an_edit_are_trained(study):
    cooking, other = low_rank._taught(Study(study.model, study.tokenizer))
    assert len(cooking) == len(other) == 32 and not set(cooking) & set(other)
    edits = [low_rank.trained(study, start) for start in (None, low_rank.LowRank(rank=2))]
    plain = low_rank.measured(study)
    for edit in edits:
        with Steerer(study.model, edit):
            assert low_rank.measured(study) != plain


def test_what_is_left_of_a_prompt_is_nothing_where_it_is_there_and_the_answers_are_the_same(study):
    pairs = prompt.answered(study, data.ASKED[:3])
    where = prompt.Answering(study.tokenizer)
    goal, plain = (prompt.said(study, side, where) for side in zip(*pairs, strict=True))
    assert goal.shape == plain.shape and not torch.equal(goal, plain)
    assert prompt.apart(goal, goal) == 0 < prompt.apart(goal, plain)
    for prompted, alone in pairs:
        assert prompted[1:] == alone and prompted[0] == {"role": "system", "content": data.SYSTEM}


# --- what is written -------------------------------------------------------------------------------------------------
def test_no_text_that_reports_was_seen_before():
    before = ["PAIRS", "CHOOSE", "COOKING", "OTHER", "OTHER_KEPT", "KEPT", "IMPOSSIBLE", "POSSIBLE", "TAUGHT"]
    after = ["REPORT", "ENDINGS", "NEUTRAL", "COOKING_HELD_OUT", "OTHER_HELD_OUT"]
    after += ["IMPOSSIBLE_HELD_OUT", "POSSIBLE_HELD_OUT", "ASKED", "QUESTIONS"]
    seen, held_out = ([text for name in names for text in strings(getattr(data, name))] for names in (before, after))
    assert not set(seen) & set(held_out)
    pieces = " ".join(strings(data.PAIRS)).lower()
    assert [word for word in data.GOOD + data.BAD if word in pieces.split()] == []
    for positive, negative in data.PAIRS:
        assert positive != negative and positive.split()[-1] == negative.split()[-1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_the_reference_uses_public_names_alone_and_hooks_nothing_itself(path):
    tree = ast.parse(path.read_text())
    imported = [node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module]
    assert {module for module in imported if module.startswith("actsteer.")} <= {"actsteer.integrations.transformers"}
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not [name for name in attributes if "hook" in name]


# --- the real model --------------------------------------------------------------------------------------------------
@pytest.mark.slow
@pytest.mark.real
@pytest.mark.skipif(not (cache().exists() or packaged()), reason="SmolLM2 is not installed")
def test_the_raw_mean_difference_moves_the_log_odds_of_smollm2_both_ways_at_little_cost():
    study = Study(*load())
    prompts, plain = study.some(data.REPORT), study.perplexity()
    before = study.log_odds(prompts)(study.model)
    for c in (1.0, -1.0):
        with Steerer(study.model, study.sentiment, c=c):
            assert c * float(study.shift(prompts, before).mean()) > 2
            assert study.perplexity() / plain < 1.25
    for other in sentiment.directions_that_mean_nothing(study, study.sentiment)["shuffled"]:
        with Steerer(study.model, other):
            assert abs(float(study.shift(prompts, before).mean())) < 1


# --- the methods side by side ----------------------------------------------------------------------------------------
def test_methods_are_fitted_on_some_openings_measured_on_others_and_compared_at_one_length(study):
    assert not set(methods.FITTED) & set(methods.HELD_OUT)
    makes = methods.steerings(study)
    length = makes["MeanDifference"]().norm()
    for name in ("random", *methods.DIRECTIONS):
        assert torch.isclose(makes[name]().norm(), length), name
    assert makes["optimize"]().norm() <= length * 1.001
