"""The picture of the project, drawn from a run on a budget that learns little."""

import re
from xml.etree import ElementTree

import matplotlib
import pytest
import typer
from typer.testing import CliRunner

from reference.mnist import picture
from reference.mnist.data import load
from reference.mnist.study import BUDGETS, Budget
from reference.style import LOOKS

TINY = Budget(epochs=1, steps=20)


@pytest.fixture(scope="module")
def scene():
    return picture.play(load("bundled"), seed=0, budget=TINY)


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """What two runs of the command write: path -> text."""
    app = typer.Typer()
    app.command()(picture.main)
    written = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(BUDGETS, "bundled", TINY)
        for _ in range(2):
            out = tmp_path_factory.mktemp("picture")
            ran = CliRunner().invoke(app, ["--out", str(out / "images")])
            assert ran.exit_code == 0, ran.output
            written.append({path.name: path.read_text() for path in (out / "images").iterdir()})
    return written


def test_the_command_writes_a_light_and_a_dark_picture_with_the_words_of_its_parts(command):
    assert set(command[0]) == {"steering-light.svg", "steering-dark.svg"}
    for name, text in command[0].items():
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        for words in ("data: a 9", "activation φ(x)", "c · v", "φ(x) + c · v", "answer before", "answer after", "→ "):
            assert f"{words}" in text, (name, words)
        assert len(text) < 150_000


def test_the_command_writes_the_same_bytes_again_and_no_date(command):
    assert command[0] == command[1]
    assert not [name for name, text in command[0].items() if re.search("<dc:date>|20[0-9]{2}-[01][0-9]-", text)]


def test_each_picture_has_the_colours_of_its_page_and_no_ground(command):
    for page, parameters in LOOKS.items():
        text = command[0][f"steering-{page}.svg"]
        blue, orange = parameters["axes.prop_cycle"].by_key()["color"][:2]
        assert blue in text and orange in text and parameters["text.color"] in text
        assert f"fill: {parameters['figure.facecolor']}" not in text


def test_what_is_shown_is_the_sum(scene):
    assert len(scene.activation) == 100 and min(scene.activation) >= 0 and any(scene.added)
    assert scene.steered == pytest.approx([a + b for a, b in zip(scene.activation, scene.added, strict=True)], abs=1e-6)
    assert all(sum(answers) == pytest.approx(1) for answers in scene.answers.values())
    assert scene.digit == 9 and scene.answers["unsteered"] != scene.answers["steered"]


def test_the_strips_have_one_scale_and_the_answers_their_digits(scene):
    answers = {"unsteered": [0.0] * 4 + [0.9, 0.1] + [0.0] * 4, "steered": [0.1] * 2 + [0.0] * 7 + [0.8]}
    with matplotlib.rc_context():
        figure = picture.draw(picture.Scene(**{**vars(scene), "answers": answers}))
        figure.draw_without_rendering()
    by_title = {axes.get_title() or axes.get_title(loc="left"): axes for axes in figure.axes}
    assert {"data: a 9", "answer before: 4", "answer after: 9"} <= by_title.keys()
    strips = [axes for axes in figure.axes if len(axes.patches) == 100]
    scales = [axes.get_window_extent().height / (axes.get_ylim()[1] - axes.get_ylim()[0]) for axes in strips]
    assert len(strips) == 3 and scales == pytest.approx([scales[0]] * 3, rel=1e-2)
    assert "4 → 9" in {text.get_text() for axes in figure.axes for text in axes.texts}
