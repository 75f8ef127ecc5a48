"""merge: from the statistics of several parts of the data to those of all."""

from __future__ import annotations

from functools import reduce
from pathlib import Path
from typing import Annotated

import typer

from actsteer.cli import banks, options, screen
from actsteer.cli.collect import show
from actsteer.cli.options import OutPath
from actsteer.collecting.statistics import Statistics
from actsteer.files import sealed


def merge(
    parts: Annotated[list[Path], typer.Argument(help="Files of statistics, of one model in one way.", **options.READ)],
    output: OutPath,
) -> None:
    """Merge the statistics that `collect` wrote for the parts of some data into those of all.

    A part that is given twice would count twice, and is refused.
    """
    options.check_output(output, ".safetensors", inputs=parts)
    banks.check_own(output, "statistics")
    seen: dict[str, Path] = {}
    found = []
    for path in parts:
        stats = Statistics.load(path)
        if not stats.is_empty:
            means = {site: stats[site].mean for site in stats}
            digest = sealed.digest(means, str([stats[site].count for site in stats]))
            if digest in seen:
                raise typer.BadParameter(f"{path}: the same as {seen[digest]}; a part counts once", param_hint="PARTS")
            seen[digest] = path
        found.append(stats)
    merged = reduce(Statistics.merge, found)
    merged.save(output)
    show(merged)
    screen.say(f"{len(found)} parts written to {output}")
