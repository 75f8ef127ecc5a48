"""The pictures of docs/gallery: each is shown on a page, for light and dark, and is small; the command makes them."""

import re
from pathlib import Path

import pytest
import typer
from PIL import Image
from typer.testing import CliRunner

from reference.gallery import DRAWN, main

DOCS = Path(__file__).parent.parent.parent / "docs"
PICTURES = DOCS / "images" / "gallery"
CHOSEN = {f"{name}{page}.png" for names in DRAWN.values() for name in names for page in ("", "-dark")}


def test_the_pages_show_every_picture_that_is_chosen_and_no_other_each_for_its_page():
    shown = re.findall(
        r"\(\.\./images/gallery/(\S+)#only-(\w+)\)", "".join(p.read_text() for p in DOCS.glob("gallery/*"))
    )
    assert {name for name, _ in shown} == CHOSEN == {path.name for path in PICTURES.iterdir()}
    assert all(("-dark" in name) == (page == "dark") for name, page in shown)


@pytest.mark.parametrize("name", sorted(CHOSEN))
def test_a_picture_is_small(name):
    assert (PICTURES / name).stat().st_size < 150_000


def test_the_command_takes_what_was_drawn_before(tmp_path):
    for (reference, _), names in DRAWN.items():
        (tmp_path / reference).mkdir(exist_ok=True)
        for name in (f"{figure}{page}.png" for figure in names for page in ("", "-dark")):
            Image.new("RGBA", (20, 10), "red").save(tmp_path / reference / name)
    app = typer.Typer()
    app.command()(main)
    ran = CliRunner().invoke(app, ["--drawn", str(tmp_path), "--out", str(tmp_path / "out")])
    assert ran.exit_code == 0, ran.output
    assert {path.name for path in (tmp_path / "out").iterdir()} == CHOSEN
