"""fit: from two files of examples to a file of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, TypeAlias

import typer

from actsteer.cli import models, options, screen
from actsteer.cli.examples import batches
from actsteer.cli.options import BatchSize, Chat, Device, DtypeName, ModelName, OutPath, TrustRemoteCode
from actsteer.cli.show import describe
from actsteer.collecting.positions import Positions
from actsteer.estimators import fit as fitting
from actsteer.estimators.logistic_direction import LogisticDirection
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.estimators.principal_direction import PrincipalDirection
from actsteer.estimators.ridge_direction import RidgeDirection
from actsteer.estimators.whitened_mean_difference import WhitenedMeanDifference
from actsteer.vectors.bank import VectorBank

Name: TypeAlias = Literal[
    "MeanDifference", "WhitenedMeanDifference", "PrincipalDirection", "RidgeDirection", "LogisticDirection"
]
_MADE = {
    kind.__name__: kind
    for kind in (MeanDifference, WhitenedMeanDifference, PrincipalDirection, RidgeDirection, LogisticDirection)
}
_FILE = "Texts, .txt or .jsonl, a line each; or inputs, .safetensors or .pt."


def fit(
    model: ModelName,
    positive: Annotated[Path, typer.Option(help=f"Examples of the concept. {_FILE}", **options.READ)],
    negative: Annotated[Path, typer.Option(help="Examples without it.", **options.READ)],
    sites: Annotated[list[str], typer.Option(help="A name, a glob or re:EXPRESSION; repeatable.", show_default=False)],
    output: OutPath,
    concept: Annotated[str | None, typer.Option(help="What the vector stands for; the positive file's name.")] = None,
    estimator: Annotated[Name, typer.Option(help="How the direction is found.")] = "MeanDifference",
    positions: Annotated[
        str | None, typer.Option(help="all, last, an index, or start:stop; of texts the last token, else all.")
    ] = None,
    batch_size: BatchSize = 32,
    chat: Chat = False,
    device: Device = None,
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fit the vector that points from the negative examples to the positive ones, and write it to a file."""
    options.check_output(output, ".safetensors", ".gguf", inputs=(positive, negative))
    asked = None if positions is None else options.positions(positions)
    loaded = models.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    toward, are_texts = batches(positive, loaded, batch_size=batch_size, chat=chat)
    away, _ = batches(negative, loaded, batch_size=batch_size, chat=chat)
    chosen: Positions = asked if asked is not None else "last" if are_texts else "all"
    vector = fitting.fit(
        loaded.model,
        positive=toward,
        negative=away,
        sites=sites,
        estimator=_MADE[estimator](),
        concept=concept or positive.stem,
        positions=chosen,
        batch_size=batch_size,
    )
    if not float(vector.norm()):
        screen.complain("warning", "the vector is zero: both sides are alike at these sites")
    vector.save(output, model=loaded.model)
    describe(VectorBank({vector.concept or "vector": vector}))
    screen.say(f"written to {output}")
