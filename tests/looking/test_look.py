"""look: its numbers are those of the definitions, what it marks is what differs, and it is one harmless file."""

import html
import random
import re
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import actsteer.looking
from actsteer import (
    Ablate,
    Add,
    And,
    AttachedError,
    BatchError,
    LowRank,
    Not,
    ProjectionAbove,
    ShapeError,
    Steerer,
    Steering,
    SteeringVector,
    UnsupportedModelError,
    VectorBank,
    look,
    record,
    residual_sites,
)
from actsteer.looking.words import Token, differing, pieces, words
from tests.looking.pages import (
    HOSTILE,
    Page,
    Words,
    identity,
    images_page,
    measured,
    rows_page,
    shown,
    texts_page,
)
from tests.zoo import bits, cnn, gpt2, llama, mlp, normal

FOLDER = Path(actsteer.looking.__file__).parent
SITES = ("model.layers.0", "model.layers.1")
V = SteeringVector({site: normal(16, seed=own) for own, site in enumerate(SITES)}, concept="calm")
TEXT = "w3 w4 w5 w6 w7"
IDS = {"input_ids": torch.tensor([Words()(TEXT)["input_ids"]])}
ALONE = {"inputs": [TEXT], "tokenizer": Words(), "max_new_tokens": 0}


def close(found, expected):
    """Equal but for the rounding to four digits."""
    return torch.allclose(torch.tensor(found, dtype=torch.float64), expected.double(), rtol=6e-4, atol=1e-12)


def recorded(model, batch, sites, steering=None, **options):
    if steering is None:
        return record(model, batch, sites=sites, keep_shape=True, progress=False)
    with Steerer(model, steering, **options):
        return record(model, batch, sites=sites, keep_shape=True, progress=False)


# --- the numbers -------------------------------------------------------------------------------------------------
def test_along_is_the_scalar_projection_in_each_run():
    model = llama()
    plain, steered = shown(model, V, **ALONE, c=2.0).numbers["items"][0]
    for place, site in enumerate(SITES):
        for run, activations in (
            (plain, recorded(model, [IDS], SITES)),
            (steered, recorded(model, [IDS], SITES, V, c=2.0)),
        ):
            by_hand = activations[site][0] @ V[site] / V[site].norm()
            assert close(run["along"][place][0], by_hand)


@pytest.mark.parametrize("intervention", [Add(), Ablate()], ids=["Add", "Ablate"])
def test_moved_by_is_measured_just_before_and_after_the_edit_in_the_steered_run(intervention):
    model = llama()
    _, steered = shown(model, V, **ALONE, c=1.0, intervention=intervention).numbers["items"][0]
    for place, site in enumerate(SITES):
        earlier = [V.select(*SITES[:place])] if place else []
        before = (
            recorded(model, [IDS], [site], *earlier, intervention=intervention)
            if place
            else recorded(model, [IDS], [site])
        )
        h = before[site][0]
        after = recorded(model, [IDS], [site], V, intervention=intervention)[site][0]
        assert close(steered["added"][place], (after - h).norm(dim=1) / h.norm(dim=1))


def test_what_was_added_is_not_computed_from_c():
    """An edit inside a module whose result is edited in place, and a concept whose positions leave tokens out."""
    model = nn.Sequential(nn.Identity(), nn.ReLU(inplace=True))
    x = torch.tensor([[1.0, 0.0], [0.0, -2.0], [0.0, 10.0]], dtype=torch.float64)
    v = SteeringVector({"1": torch.tensor([3.0, 4.0], dtype=torch.float64)})
    _, steered = shown(model, v, inputs=x, c=2.0).numbers["items"][0]
    assert steered["added"][0] == [10, None, 1]  # of ‖h‖ = 0 no share
    assert shown(model, v, inputs=x, c=0.0).numbers["items"][0][1]["added"][0] == [0, None, 0]


def test_an_input_site_is_measured_too():
    v = SteeringVector({"1:in": torch.tensor([3.0, 4.0])})
    plain, steered = shown(identity("0", "1"), v, inputs=torch.tensor([[5.0, 0.0]]), c=1.0).numbers["items"][0]
    assert plain["along"][0][0] == [3] and steered["along"][0][0] == [8] and steered["added"][0] == [1]


def test_positions_that_are_generated_leave_the_prompt_as_it_is():
    options = {"inputs": [TEXT], "tokenizer": Words(), "max_new_tokens": 4, "positions": "generated", "c": 50.0}
    _, steered = shown(llama(), V, **options).numbers["items"][0]
    assert steered["added"][0][:5] == [0] * 5 and len(steered["added"][0]) == 5 + 3
    assert min(steered["added"][0][5:]) > 0


def gates():
    one = ProjectionAbove(V.select(SITES[0]), 0.0, per="token")
    other = ProjectionAbove(V.select(SITES[0]), 5.0)
    return {"token": one, "sequence": other, "both": And(one, Not(other))}


@pytest.mark.parametrize("name", gates())
def test_what_the_gate_decided_is_what_the_gate_says(name):
    model, gate = llama(), gates()[name]
    _, steered = shown(model, V, **ALONE, gate=gate, c=1.0).numbers["items"][0]
    rows = recorded(model, [IDS], SITES[:1])[SITES[0]][0]
    one, other = gates()["token"](rows), gates()["sequence"](rows.mean(dim=0, keepdim=True))
    expected = {"token": one, "sequence": other.expand(5), "both": one & ~other}[name]
    for place, _ in enumerate(SITES):
        assert steered["gate"][place][0] == expected.int().tolist()
        added = torch.tensor(steered["added"][place])
        assert torch.equal(added > 0, expected)


def test_a_gate_that_reads_where_it_edits_decides_for_rows():
    v = SteeringVector({"0": torch.tensor([1.0, 0.0])})
    gate, x = ProjectionAbove(v, 1.5), torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    page = shown(identity(), v, inputs=x, gate=gate)
    assert page.numbers["items"][0][1]["gate"] == [[[0, 1]]] and page.numbers["gated"]
    assert not shown(identity(), v, inputs=x).numbers["gated"]


def test_of_a_channel_map_the_mean_over_its_positions():
    model, x = cnn(), normal(5, 3, 4, 4)
    v = SteeringVector({"0": normal(4)})
    plain, steered = shown(model, v, inputs=x, c=2.0).numbers["items"][0]
    h = record(model, x, sites="0", keep_shape=True, progress=False)["0"]
    assert close(plain["along"][0][0], (h @ v["0"] / v["0"].norm()).mean(dim=(1, 2)))
    moved = 2 * v["0"].norm() * 4 / h.flatten(1).norm(dim=1)  # at 16 positions
    assert close(steered["added"][0], moved)


def test_a_direction_of_zero_has_no_along_and_the_edit_is_seen():
    edit = LowRank({"0": (torch.tensor([[-0.5, 0.0]]), torch.tensor([[1.0, 0.0]]), torch.zeros(1))})
    _, steered = shown(identity(), edit, inputs=torch.tensor([[4.0, 3.0]])).numbers["items"][0]
    assert steered["along"][0][0] == [None] and steered["added"][0] == [0.4]


def test_a_concept_that_lacks_a_site_has_no_numbers_there():
    bank = VectorBank({"calm": V, "late": SteeringVector({SITES[1]: normal(16)})})
    page = shown(llama(), bank, **ALONE)
    assert page.numbers["items"][0][0]["along"][0][1] is None and page.numbers["scale"]["along"][0][1] is None
    assert len(page.numbers["items"][0][0]["along"][1][1]) == 5


def test_concepts_without_a_strength_are_left_out():
    bank = VectorBank({"calm": V, "loud": 2 * V})
    assert shown(llama(), bank, **ALONE, c={"loud": 1.0}).numbers["concepts"] == ["loud"]
    assert shown(llama(), Steering(bank, c={"calm": 1.0}), **ALONE).numbers["concepts"] == ["calm"]


def test_a_colour_is_relative_to_twice_the_median_size_in_both_runs():
    v = SteeringVector({"0": torch.tensor([1.0, 0.0])})
    x = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [1000.0, 0.0]])
    assert shown(identity(), v, inputs=x, c=0.0).numbers["scale"]["along"] == [[4]]
    assert shown(identity(), v, inputs=torch.zeros(2, 2), c=0.0).numbers["scale"]["along"] == [[None]]


# --- texts -------------------------------------------------------------------------------------------------------
def test_what_is_marked_is_exactly_what_differs():
    generator = random.Random(0)
    for _ in range(200):
        one, other = ([generator.randrange(4) for _ in range(generator.randrange(12))] for _ in range(2))
        left, right = differing(one, other)
        kept = [own for place, own in enumerate(one) if place not in left]
        assert kept == [own for place, own in enumerate(other) if place not in right]
        assert (left, right) == (set(), set()) if one == other else left or right


def test_the_page_marks_the_tokens_that_differ_and_shows_both_continuations():
    model, options = llama(), {"do_sample": False, "max_new_tokens": 12, "pad_token_id": 2}
    batch = IDS | {"attention_mask": torch.ones_like(IDS["input_ids"])}
    plain = model.generate(**batch, **options)[0, 5:].tolist()
    with Steerer(model, V, c=2.0):
        steered = model.generate(**batch, **options)[0, 5:].tolist()
    assert plain != steered
    page = shown(model, V, inputs=[TEXT], tokenizer=Words(), c=2.0, max_new_tokens=12)
    for run, own, marked in zip(("plain", "steered"), (plain, steered), differing(plain, steered), strict=True):
        items = [item for item in page.items if item["data-r"] == run]
        assert [item["text"].strip() for item in items] == [Words.words[token].replace("\n", "↵") for token in own]
        assert {place for place, item in enumerate(items) if "differs" in item["class"]} == marked
        assert [int(item["data-i"]) for item in items] == list(range(5, 5 + len(own)))
    assert len(page.numbers["items"][0][0]["added"]) == len(SITES)
    assert len(page.numbers["items"][0][1]["added"][0]) == 5 + len(steered) - 1  # the last one is never fed
    assert shown(model, V, inputs=[TEXT], tokenizer=Words(), c=0.0, max_new_tokens=12).text.count("the same") == 1


def test_pads_are_never_shown_and_change_nothing():
    model, mask = llama(), torch.tensor([[0, 0, 1, 1, 1, 1, 1]])
    padded = {"input_ids": torch.cat([torch.full((1, 2), 2), IDS["input_ids"]], dim=1), "attention_mask": mask}
    expected = shown(model, V, **ALONE)
    for inputs in (padded, [padded], IDS, IDS["input_ids"], TEXT):
        page = shown(model, V, inputs=inputs, tokenizer=Words(), max_new_tokens=0)
        assert [item["text"] for item in page.items] == [item["text"] for item in expected.items]
        assert page.numbers == expected.numbers
    assert [item["text"] for item in shown(model, V, inputs=IDS, max_new_tokens=0).items] == list("34567")


def test_a_model_that_does_not_generate_shows_the_texts_alone():
    page = shown(gpt2().transformer, SteeringVector({"h.0": normal(8)}), inputs=IDS, c=1.0)
    assert len(page.items) == 5 and "steered" not in {item["data-r"] for item in page.items}


def test_letters_of_several_tokens_and_words_stay_together():
    class Bytes:
        def decode(self, ids, *, clean_up_tokenization_spaces):
            return bytes(ids).decode(errors="replace")

    said = pieces(Bytes(), list(" hé 你".encode()))
    assert said == [" ", "h", "\ufffd", "é", " ", "\ufffd", "\ufffd", "你"] or "".join(said[-1:]) == "你"
    assert [
        len(word) for word in words([Token(text, "both", 0) for text in ("a" * 10, "b" * 10, " c", "\n", "d")])
    ] == [*(1, 1, 1, 1, 1)]


# --- rows and images ---------------------------------------------------------------------------------------------
def test_rows_stand_in_the_place_of_tokens_with_their_answers():
    model, v, x = mlp(), SteeringVector({"5": normal(6)}, concept="nine"), normal(9, 12)
    page = shown(model, v, inputs=x, c=3.0, classes=["one", "two", "three"])
    with Steerer(model, v, c=3.0):
        after = model(x).argmax(dim=1)
    changed = int((after != model(x).argmax(dim=1)).sum())
    assert len(page.items) == 9 and f"changes for {changed} of 9" in page.text and "three" in page.text
    assert page.numbers["items"][0][0]["added"] == [None]


def test_answers_are_the_softmax_before_and_after():
    v, x = SteeringVector({"0": torch.tensor([-3.0, 3.0])}), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    page = shown(identity(), v, inputs=x, classes=["no", "yes"])
    assert "changes for 1 of 2" in page.text
    before, after = x.softmax(dim=1), (x + v["0"]).softmax(dim=1)
    percents = [f"{100 * float(p[row, own]):.1f} %" for row in (0, 1) for own in (0, 1) for p in (before, after)]
    assert re.findall(r"[\d.]+ %", page.text) == [*percents, *re.findall(r"[\d.]+ %", page.text)[len(percents) :]]
    tops = re.findall(r"(no|yes) → +(no|yes)", page.text)
    assert tops == [("no", "yes"), ("yes", "yes")]


def test_the_model_runs_in_evaluation_mode_and_keeps_its_buffers():
    class Counts(nn.Identity):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x

    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Dropout(0.5), nn.Flatten(), nn.Linear(48, 2), Counts()).train()
    before, x, v = bits(model[0].running_mean).clone(), torch.randn(4, 3, 4, 4), SteeringVector({"1": torch.ones(3)})
    page = shown(model, v, inputs=x)
    assert all(module.training for module in model.modules()) and torch.equal(bits(model[0].running_mean), before)
    assert model[4].calls == 0
    assert page.numbers == shown(model.eval(), v, inputs=x).numbers


def test_images_are_drawn_and_flat_ones_where_their_shape_is_given():
    v = SteeringVector({"0": torch.ones(12)})
    assert sum(tag == "img" for tag, _ in shown(identity(), v, inputs=torch.rand(3, 12), image_shape=(3, 4)).tags) == 3
    assert (
        sum(tag == "img" for tag, _ in shown(identity(), v, inputs=torch.rand(3, 12), image_shape=(3, 2, 2)).tags) == 3
    )
    assert sum(tag == "img" for tag, _ in shown(identity(), v, inputs=torch.rand(3, 12)).tags) == 0
    images = shown(cnn(), SteeringVector({"0": normal(4)}), inputs=normal(4, 3, 4, 4))
    assert sum(tag == "img" for tag, _ in images.tags) == 4
    with pytest.raises(ShapeError, match=r"image_shape: expected \(H, W\) or .* of 12 numbers, got \(5, 5\)"):
        look(identity(), v, inputs=torch.rand(3, 12), image_shape=(5, 5))


def test_outputs_that_are_no_class_scores_are_left_out():
    model = nn.Sequential(nn.Identity(), nn.Flatten(0))
    page = shown(model, SteeringVector({"0": torch.ones(2)}), inputs=torch.rand(3, 2))
    assert "likeliest" not in page.text and len(page.items) == 3


def test_of_many_rows_the_first_are_shown():
    page = shown(identity(), SteeringVector({"0": torch.ones(2)}), inputs=torch.rand(205, 2))
    assert len(page.items) == 200 and "And 5 more rows" in page.text


# --- what is refused ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (["w3"], "texts need the model's tokenizer; pass tokenizer="),
        ([], "expected texts, what a tokenizer makes of them, or one tensor"),
        (3, "expected texts, .* got int"),
        ((torch.ones(2, 2), torch.ones(2, 2)), "expected texts, .* got tuple of Tensor"),
        (torch.ones(0, 2), "expected a row for each of one or more inputs"),
    ],
)
def test_inputs_that_are_none(inputs, message):
    with pytest.raises(BatchError, match=message):
        look(identity(), SteeringVector({"0": torch.ones(2)}), inputs=inputs)


def test_a_model_that_is_steered_already_or_has_two_kinds_of_tokens_is_refused():
    model, v = identity(), SteeringVector({"0": torch.ones(2)})
    with Steerer(model, v):
        model(torch.ones(1, 2))
        with pytest.raises(AttachedError, match="steered already"):
            look(model, v, inputs=torch.ones(1, 2))
    model.config = SimpleNamespace(is_encoder_decoder=True)
    with pytest.raises(UnsupportedModelError, match="a decoder of its own"):
        look(model, v, inputs=IDS)


def test_a_site_without_an_activation_for_every_token_is_refused():
    v = SteeringVector({"lm_head": normal(37)})
    with pytest.raises(UnsupportedModelError, match="expected an activation for each of 8 tokens, got 4"):
        look(llama(), v, inputs=[TEXT], tokenizer=Words(), max_new_tokens=4, progress=False)
    assert len(shown(llama(), v, **ALONE).items) == 5


@pytest.mark.parametrize("package", ["jinja2", "matplotlib"])
def test_without_its_extra_it_says_which(package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=r"pip install 'actsteer\[look\]'"):
        look(identity(), SteeringVector({"0": torch.ones(2)}), inputs=torch.ones(1, 2))


def test_the_model_is_left_as_it_was():
    model = llama().train()
    before = {name: bits(tensor).clone() for name, tensor in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(UnsupportedModelError):
        look(model, SteeringVector({"lm_head": normal(37)}), inputs=[TEXT], tokenizer=Words(), progress=False)
    look(model, V, inputs=[TEXT], tokenizer=Words(), gate=gates()["both"], progress=False)
    assert all(module.training for module in model.modules()) and model.config.use_cache
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(not (module._forward_hooks or module._forward_pre_hooks) for module in model.modules())
    assert all(torch.equal(bits(tensor), before[name]) for name, tensor in model.state_dict().items())


# --- one harmless file -------------------------------------------------------------------------------------------
PAGES = {"texts": texts_page, "rows": rows_page, "images": images_page}


@pytest.fixture(scope="module", params=PAGES)
def page(request):
    return Page(PAGES[request.param]())


def test_it_asks_for_nothing(page):
    assert re.findall(r"https?:|//[a-z]|@import|url\((?!#)", re.sub(r"data:image[^\"]*", "", page.source)) == []
    assert all(own.startswith(("data:", "#")) for own in page.references)
    policy = next(own["content"] for tag, own in page.tags if own.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'") and "connect" not in policy


def test_its_script_has_at_most_a_hundred_lines(page):
    assert len(page.scripts) == 2  # the numbers, and
    assert len(page.scripts[1].strip().splitlines()) <= 100
    assert (FOLDER / "page.js").read_text().strip() == page.scripts[1].strip()


def test_names_and_tokens_that_are_hostile_are_text(page):
    assert [own for tag, own in page.tags if tag == "img" and not own["src"].startswith("data:image/png")] == []
    assert [name for _, own in page.tags for name in own if name.startswith("on")] == []
    assert "<script>alert" not in page.source.replace(HOSTILE, "", 0)


def test_hostile_text_is_shown_as_it_stands():
    assert Page(texts_page()).numbers["concepts"] == ["calm", HOSTILE]
    assert HOSTILE in Page(texts_page()).text and HOSTILE in Page(rows_page()).text
    assert HOSTILE in [item["text"].strip() for item in Page(texts_page()).items]


def test_headings_and_language(page):
    levels = [int(tag[1]) for tag, _ in page.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert ("html", {"lang": "en"}) in page.tags
    ids = [own["id"] for _, own in page.tags if "id" in own]
    assert len(ids) == len(set(ids))


def test_a_calibration_is_drawn_and_listed():
    calibration = measured()
    v = SteeringVector({"0": normal(4), "2": normal(4)})
    plain = shown(cnn(), v, inputs=normal(2, 3, 4, 4))
    page = shown(cnn(), v, inputs=normal(2, 3, 4, 4), calibration=calibration)
    assert sum(tag == "svg" for tag, _ in page.tags) == 2 and not any(tag == "svg" for tag, _ in plain.tags)
    fills = [own.get("style", "") for tag, own in page.tags if tag == "use"]
    assert sum("var(--gate)" in style for style in fills) == len(calibration.table)  # the costs
    assert sum("var(--plus)" in style for style in fills) == 2 and sum("var(--minus)" in style for style in fills) == 1
    assert calibration.verdict in page.text
    rows = [own for tag, own in page.tags if tag == "tr" and own.get("class") == "now"]
    assert len(rows) == 1  # the best point
    for point in calibration.table:
        assert point["effect"] is None or f"{point['effect']:.3g}" in page.text
    assert HOSTILE in shown(cnn(), v, inputs=normal(2, 3, 4, 4), calibration=measured(site=HOSTILE)).text
    calibration.table.clear()
    shown(cnn(), v, inputs=normal(2, 3, 4, 4), calibration=calibration)


def test_a_bank_shows_how_far_its_concepts_interfere():
    bank = VectorBank({"a": SteeringVector({"0": torch.tensor([1.0, 0.0])}), "b": SteeringVector({"0": torch.ones(2)})})
    page = shown(identity(), bank, inputs=torch.ones(1, 2))
    assert "interfere" in page.text and "+0.71" in page.text
    assert "interfere" not in shown(identity(), bank["a"], inputs=torch.ones(1, 2)).text


def test_it_is_saved_and_shown_in_a_notebook(tmp_path):
    made = look(identity(), SteeringVector({"0": torch.ones(2)}), inputs=torch.ones(1, 2), progress=False)
    made.save(tmp_path / "look.html")
    assert (tmp_path / "look.html").read_text(encoding="utf-8") == made.html
    frame = made._repr_html_()
    (inside,) = re.findall(r'srcdoc="([^"]*)"', frame)
    assert html.unescape(inside) == made.html and 'sandbox="allow-scripts"' in frame
    assert repr(made) == f"Look({len(made.html.encode()):,} bytes)"


def test_two_hundred_tokens_at_thirty_sites_are_less_than_two_megabytes():
    model = llama(num_hidden_layers=30, max_position_embeddings=256)
    v = SteeringVector({site: normal(16) for site in residual_sites(model)})
    text = " ".join(f"w{number % 34 + 1}" for number in range(200))
    made = look(model, v, inputs=[text], tokenizer=Words(), c=0.1, max_new_tokens=16, progress=False)
    assert len(Page(made.html).numbers["items"][0][0]["along"][29][0]) >= 200
    assert len(made.html.encode()) < 2_000_000


def test_all_that_the_page_is_made_of_lies_beside_the_code():
    assert {path.name for path in FOLDER.iterdir() if path.suffix not in (".py", "")} == {
        *("page.html.j2", "page.css", "page.js")
    }
