"""collect: from texts or inputs to a file of statistics, in one process or in several that do not know each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from actsteer.cli import banks, models, options, screen
from actsteer.cli.examples import batches, dataset_batches
from actsteer.cli.options import BatchSize, Chat, Device, DtypeName, ModelName, OutPath, RowPositions, TrustRemoteCode
from actsteer.collecting import collect as collecting
from actsteer.collecting.batches import Batches
from actsteer.collecting.moments import Covariance
from actsteer.collecting.statistics import Statistics
from actsteer.tokens.positions import Positions

Kept: TypeAlias = Literal["none", "diagonal", "full"]
_KEPT: dict[Kept, Covariance] = {"none": False, "diagonal": "diagonal", "full": True}


def collect(
    model: ModelName,
    texts: Annotated[
        str,
        typer.Option(
            help="Texts, .txt or .jsonl, a line each; inputs, .safetensors or .pt; or a dataset of Hugging Face's, a "
            "directory or a name, which is streamed.",
            show_default=False,
        ),
    ],
    sites: Annotated[list[str], typer.Option(help="A name, a glob or re:EXPRESSION; repeatable.", show_default=False)],
    output: OutPath,
    shard: Annotated[
        str | None, typer.Option(help="i/n: the i-th of n parts of the texts alone, from 0/n to n-1/n.")
    ] = None,
    covariance: Annotated[Kept, typer.Option(help="What to keep beside the means; diagonal: variances.")] = "none",
    positions: RowPositions = None,
    batch_size: BatchSize = 32,
    chat: Chat = False,
    split: Annotated[str, typer.Option(help="Of a dataset.")] = "train",
    column: Annotated[str, typer.Option(help="Where a dataset has its texts.")] = "text",
    config: Annotated[str | None, typer.Option(help="Which configuration of a dataset.")] = None,
    every: Annotated[int, typer.Option(min=1, help="After how many batches what is done so far is written.")] = 100,
    whole: Annotated[bool, typer.Option("--whole", help="Run every pass to its end; see `stop` of collect.")] = False,
    device: Device = None,
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Collect the statistics of a model's activations, and write them to a file, for `fit` and `merge`.

    What is done so far is kept beside the output, in a hidden file. A command that was killed goes on from there when
    it is given again, and ends bit for bit as it would have; the hidden file goes then.
    """
    is_file = Path(texts).is_file()
    options.check_output(output, ".safetensors", inputs=(texts,) if is_file else ())
    banks.check_own(output, "statistics")
    part = None if shard is None else options.shard(shard)
    asked = None if positions is None else options.positions(positions)
    loaded = models.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    found: Batches
    are_texts = True
    if is_file:
        found, are_texts = batches(Path(texts), loaded, batch_size=batch_size, chat=chat)
    else:
        found = dataset_batches(
            texts, loaded, split=split, column=column, config=config, batch_size=batch_size, chat=chat
        )
    chosen: Positions = asked if asked is not None else "last" if are_texts else "all"
    resume = output.with_name(f".{output.stem}.resume.safetensors")
    if resume.exists():
        screen.say(f"going on from {resume}")
    stats = collecting.collect(
        loaded.model,
        found,
        sites=sites,
        covariance=_KEPT[covariance],
        positions=chosen,
        batch_size=batch_size,
        stop=not whole,
        shard=part,
        checkpoint=resume,
        every=every,
    )
    stats.save(output)
    resume.unlink(missing_ok=True)
    show(stats)
    screen.say(f"written to {output}")


def show(stats: Statistics) -> None:
    """A table of the sites, their features and rows."""
    rows = [(site, stats[site].d or "", stats[site].count) for site in stats]
    screen.table("site", "features", "rows", rows=rows, numbers=("features", "rows"))
