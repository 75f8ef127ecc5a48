"""fit: from two files of examples to a file of vectors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from actsteer.cli import banks, factory, models, options, screen
from actsteer.cli.examples import batches
from actsteer.cli.options import BatchSize, Chat, Device, DtypeName, OutPath, RowPositions, TrustRemoteCode
from actsteer.cli.show import describe
from actsteer.collecting.statistics import Statistics
from actsteer.estimators import fit as fitting
from actsteer.estimators.estimator import COVARIANCE, Estimator, check_estimator
from actsteer.estimators.logistic_direction import LogisticDirection
from actsteer.estimators.mean_difference import MeanDifference
from actsteer.estimators.principal_direction import PrincipalDirection
from actsteer.estimators.ridge_direction import RidgeDirection
from actsteer.estimators.whitened_mean_difference import WhitenedMeanDifference
from actsteer.files import sealed
from actsteer.steering.alone import save_edit
from actsteer.steering.steering import Steering
from actsteer.tokens.positions import Positions
from actsteer.vectors.vector import SteeringVector

_OURS: dict[str, Callable[[], Estimator[Any]]] = {
    kind.__name__: kind
    for kind in (MeanDifference, WhitenedMeanDifference, PrincipalDirection, RidgeDirection, LogisticDirection)
}
"""The estimators that `actsteer fit` knows by a name alone."""
_FILE = "Texts, .txt or .jsonl, a line each; inputs, .safetensors or .pt; or statistics, as `collect` writes them."


def fit(
    positive: Annotated[Path, typer.Option(help=f"Examples of the concept. {_FILE}", **options.READ)],
    negative: Annotated[Path, typer.Option(help="Examples without it.", **options.READ)],
    output: OutPath,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="A Hugging Face directory or name, or module:factory; not for statistics."),
    ] = None,
    sites: Annotated[
        list[str] | None,
        typer.Option(help="A name, a glob or re:EXPRESSION; repeatable. Of statistics names, or all."),
    ] = None,
    concept: Annotated[str | None, typer.Option(help="What the vector stands for; the positive file's name.")] = None,
    estimator: Annotated[
        str, typer.Option(help=f"How the direction is found: {', '.join(_OURS)}, or yours as module:Class.")
    ] = "MeanDifference",
    positions: RowPositions = None,
    batch_size: BatchSize = 32,
    chat: Chat = False,
    device: Device = None,
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Fit the vector that points from the negative examples to the positive ones, and write it to a file."""
    options.check_output(output, ".safetensors", ".gguf", inputs=(positive, negative))
    banks.check_own(output, "bank")
    made = _estimator(estimator)
    asked = None if positions is None else options.positions(positions)
    name = concept or positive.stem
    if _are_statistics(positive, negative):
        if asked is not None:
            raise typer.BadParameter("statistics have their positions already", param_hint="--positions")
        if made.reads not in COVARIANCE:
            raise typer.BadParameter(
                f"{estimator} reads {made.reads}, which statistics do not have; give it texts", param_hint="--estimator"
            )
        high, low = (_statistics(path, sites) for path in (positive, negative))
        vector = fitting.estimated(made, positive=high, negative=low, concept=name)
        known = models.names(model, trust_remote_code=trust_remote_code)
    else:
        if model is None or not sites:
            raise typer.BadParameter("texts and inputs need --model and --sites")
        loaded = models.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        toward, are_texts = batches(positive, loaded, batch_size=batch_size, chat=chat)
        away, _ = batches(negative, loaded, batch_size=batch_size, chat=chat)
        chosen: Positions = asked if asked is not None else "last" if are_texts else "all"
        vector = fitting.fit(
            loaded.model,
            positive=toward,
            negative=away,
            sites=sites,
            estimator=made,
            concept=name,
            positions=chosen,
            batch_size=batch_size,
        )
        known = loaded.model
    if isinstance(vector, SteeringVector):
        vector.save(output, model=known)
    else:
        save_edit(vector, output, model=known)
    describe(Steering(vector))
    screen.say(f"written to {output}")


def _are_statistics(*paths: Path) -> bool:
    """Whether these are files of statistics; all of them or none."""
    kinds = [sealed.kind_of(path) if path.suffix.lower() == ".safetensors" else None for path in paths]
    found = [kind == "statistics" for kind in kinds]
    if any(found) and not all(found):
        raise typer.BadParameter("one side has statistics, the other examples; give both alike")
    return all(found)


def _statistics(path: Path, sites: list[str] | None) -> Statistics:
    """Those of a file, at some of its sites or at all."""
    stats = Statistics.load(path)
    return Statistics({site: stats[site] for site in sites or stats}, metadata=stats.metadata)


def _estimator(name: str) -> Estimator[Any]:
    """The estimator of ours that has this name, or the one that `module:Class` makes without arguments, or is."""
    if name in _OURS:
        return _OURS[name]()
    hint = "--estimator"
    if ":" not in name:
        raise typer.BadParameter(f"{name}: expected {', '.join(_OURS)}, or yours as module:Class", param_hint=hint)
    estimator = factory.made(name, Estimator, hint=hint)
    try:
        check_estimator(estimator)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(f"{name}: {error}", param_hint=hint) from error
    return cast("Estimator[Any]", estimator)
