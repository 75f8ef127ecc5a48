"""`python -m reference.gallery`: draw the pictures of docs/gallery/ anew, small enough for a page."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from PIL import Image

NETWORKS = ("pitch", "voice", "vision", "sentences", "diffusion", "maze", "lens")
DRAWN = {
    ("mnist", "self"): ("self_example", "self_methods", "self_strength"),
    ("language", "sentiment"): ("sentiment",),
    ("language", "topic"): ("topic",),
    ("language", "low_rank"): ("low_rank",),
    **{("zoo", network): (network,) for network in NETWORKS},
}
"""The command that draws, and which of its figures are shown."""


def main(
    out: Annotated[Path, typer.Option(help="Where the pictures go.")] = Path("docs/images/gallery"),
    drawn: Annotated[Path | None, typer.Option(help="A folder with mnist, language and zoo, as drawn before.")] = None,
) -> None:
    """Run the commands of reference/ and keep the figures that docs/gallery/ shows, for a light and for a dark page."""
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as empty:
        home = Path(empty) if drawn is None else drawn
        for (reference, experiment), figures in DRAWN.items():
            if drawn is None:
                command = [sys.executable, "-m", f"reference.{reference}", experiment, "--out", str(home / reference)]
                subprocess.run(command, check=True)
            for name in (f"{figure}{page}.png" for figure in figures for page in ("", "-dark")):
                with Image.open(home / reference / name) as figure:
                    figure.convert("RGB").quantize(256).save(out / name, optimize=True)


if __name__ == "__main__":
    typer.run(main)
