"""In a notebook: small tables, of escaped text, that read no more of a file than they show."""

import re
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

from actsteer import (
    ClassStatistics,
    ProjectionAbove,
    Statistics,
    Steerer,
    Steering,
    SteeringVector,
    VectorBank,
    collect,
)
from actsteer import html as made
from actsteer.vectors import stack
from actsteer.vectors.vector import from_file

HOSTILE = "<script>alert('x')</script>&\"\x00"
V = SteeringVector({"0": torch.tensor([3.0, 4.0]), "1": torch.tensor([0.0, 1.0])}, concept=HOSTILE)
BANK = VectorBank({HOSTILE: V, "other": SteeringVector({"0": torch.tensor([4.0, -3.0])})})
MODEL = nn.Sequential(nn.Identity(), nn.Identity())
STATS = collect(MODEL, torch.tensor([[3.0, 4.0], [3.0, 4.0]]), sites="*", covariance="diagonal", progress=False)
STEERER = Steerer(MODEL, BANK, gate=ProjectionAbove(V.select("0"), 1.0))
VALUES = {
    "vector": V,
    "bank": BANK,
    "statistics": STATS,
    "statistics of means": collect(MODEL, torch.ones(2, 2), sites="0", progress=False),
    "statistics of nothing": Statistics({}),
    "classes": ClassStatistics({HOSTILE: STATS}),
    "steering": Steering(BANK, c={HOSTILE: 2.0}, positions={"other": "last"}),
    "steerer": STEERER,
    "explanation": STEERER.explain(),
}


class Parsed(HTMLParser):
    """What a browser would make of it: the tags, each closed, and the text."""

    def __init__(self, source):
        super().__init__()
        self.open, self.tags, self.text = [], set(), ""
        self.feed(source)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.mark.parametrize("name", VALUES)
def test_what_is_shown_is_well_formed_and_its_text_is_escaped(name):
    parsed = Parsed(VALUES[name]._repr_html_())
    assert parsed.tags <= {"table", "caption", "thead", "tbody", "tr", "th", "td", "span", "div"}
    if name not in ("statistics", "statistics of means", "statistics of nothing"):
        assert HOSTILE.replace("\x00", "") in parsed.text.replace("\ufffd", "")
    assert "\x00" not in parsed.text


@pytest.mark.parametrize("name", VALUES)
def test_the_plain_repr_stays_one_line(name):
    assert name == "explanation" or len(repr(VALUES[name]).splitlines()) == 1


def test_a_vector_shows_the_norm_of_every_site():
    text = Parsed(V._repr_html_()).text
    assert "025" in text and "121" in text  # site, features, norm: 0 2 5 and 1 2 1


def test_a_bank_shows_cosines_and_leaves_out_a_vector_of_zero():
    orthogonal = VectorBank({"a": V.select("0"), "b": BANK["other"], "none": SteeringVector({"0": torch.zeros(2)})})
    text = Parsed(orthogonal._repr_html_()).text
    assert text.endswith("a+1.00+0.00b+0.00+1.00") and "none0" in text


def test_statistics_show_counts_and_rms_norms_where_they_are_kept():
    assert "0225" in Parsed(STATS._repr_html_()).text  # site, rows, features, norm
    assert "022" in Parsed(VALUES["statistics of means"]._repr_html_()).text


def test_a_steerer_says_what_explain_says():
    words = re.findall(r"\w+", str(STEERER.explain()))
    assert [word for word in words if word not in Parsed(STEERER._repr_html_()).text] == []
    assert STEERER.explain()._repr_html_() == STEERER._repr_html_()


def test_a_large_bank_in_a_file_is_read_no_further_than_it_is_shown(tmp_path, monkeypatch):
    names = [f"c{number};" for number in range(1200)]
    VectorBank({name: SteeringVector({"0": torch.randn(2)}) for name in names}).save(tmp_path / "many.safetensors")
    bank, read = VectorBank.load(tmp_path / "many.safetensors"), []
    monkeypatch.setattr(stack, "from_file", lambda stored: read.append(stored) or from_file(stored))
    text = Parsed(bank._repr_html_()).text
    assert f"and {1200 - made.SHOWN} more" in text and "c29;" in text and "c30;" not in text
    assert len(read) == made.SHOWN
    Steerer(MODEL, bank, c={"c7;": 1.0})._repr_html_()
    Steering(bank)._repr_html_()
    assert len(read) <= 3 * made.SHOWN + 1


def test_numbers_that_are_not_finite_have_no_bar():
    assert "width:0.00em" in made.bar(float("inf"), of=1.0) and "width:0.00em" in made.bar(1.0, of=float("nan"))
    assert "width:8.00em" in made.bar(2.0, of=1.0)
