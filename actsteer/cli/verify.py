"""verify: whether a file of vectors is whole, fits a model, and does what a folded model does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import nn

from actsteer.cli import banks, models, options, screen
from actsteer.cli.examples import batches, one_batch
from actsteer.cli.metrics import metric as metric_of
from actsteer.cli.models import Loaded
from actsteer.cli.options import Chat, Concepts, Device, DtypeName, TrustRemoteCode
from actsteer.files import sealed
from actsteer.folding.proof import Proof, distance, is_lost, outputs
from actsteer.integrations.vllm.comparing import compare
from actsteer.steering.steerer import Steerer
from actsteer.steering.steering import Steering
from actsteer.tuning.evidence import Evidence, Held, evidences
from actsteer.tuning.remeasure import remeasured
from actsteer.tuning.told import name_of


def verify(
    bank: Annotated[str, typer.Argument(help="Any file of vectors or of a steering, or a pattern.")],
    model: Annotated[str | None, typer.Option("--model", "-m", help="The model that is to be steered.")] = None,
    on: Annotated[
        Path | None, typer.Option(help="Run on these: texts, .txt or .jsonl, or inputs.", **options.READ)
    ] = None,
    folded: Annotated[
        str | None, typer.Option(help="What fold wrote: a directory, or .safetensors; is it the steered model?")
    ] = None,
    engine: Annotated[
        Literal["vllm"] | None,
        typer.Option(help="Have it serve the file, and compare its answers to the texts of --on."),
    ] = None,
    metric: Annotated[
        str | None, typer.Option(help="module:function, as of calibrate: measure the effect that was recorded anew.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens --metric is to see.")] = 32,
    c: Annotated[list[str] | None, typer.Option("-c", help="The strength; that of the file, or 1.")] = None,
    concept: Concepts = None,
    chat: Chat = False,
    device: Device = None,
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Verify that a file is whole, fits a model, that every edit runs, that others do the same, that evidence holds.

    Each further option asks for a further step; the exit code is 1 if one fails. Without --on no weights are loaded.
    Where the file says what was measured, the steering is compared with what was recorded of it, and with --on what was
    lost, with --metric the effect too, is measured again.
    """
    if (on is not None or folded is not None) and model is None:
        raise typer.BadParameter("it takes a model to run", param_hint="--model")
    if (folded is not None or engine is not None) and on is None:
        raise typer.BadParameter("it takes inputs to compare outputs", param_hint="--on")
    banks.check(bank)
    if metric is not None and (on is None or sealed.kind_of(bank) is None):
        raise typer.BadParameter("it takes --on, and a file with evidence", param_hint="--metric")
    if folded is not None:
        models.check_folded(folded)
    strength = options.one_strength(c) if c else None
    loaded = None
    if model is not None:
        loaded = models.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, empty=on is None)
    steering = banks.read(bank, None if loaded is None else loaded.model, concept)
    count = len(steering.vectors.items())  # every one is read
    screen.say(f"whole: {bank}, {count} concept{'s' * (count != 1)}")
    if loaded is None:
        _check_evidence(bank, steering, None, strength)
        return
    steerer = Steerer(loaded.model, steering, c=strength)
    screen.say(f"fits: {model}, {', '.join(steerer.sites)}")
    if on is None:
        _check_evidence(bank, steering, loaded.model, strength)
        return
    batch = one_batch(on, loaded, chat=chat)
    plain = outputs(loaded.model, batch)
    with steerer:  # which raises if a site does not run
        steered = outputs(loaded.model, batch)
    pairs = list(zip(steered, plain, strict=True))
    if any(is_lost(one, other) for one, other in pairs):
        screen.complain("error", f"at c = {steerer.c} the outputs are no numbers any more")
        raise typer.Exit(1)
    moved = max((apart for one, other in pairs if (apart := distance(one, other)) != float("inf")), default=0.0)
    screen.say(f"runs: every site on {on}; the outputs move by up to {moved:.3g}")
    steerer.check(batch)  # which warns of a site that no answer depends on
    if folded is not None:
        same = models.folded(folded, loaded, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
        _check_folded(steerer, batch, folded, same)
    if engine is not None and model is not None:
        _check_engine(steerer, batch, model=model, bank=bank)
    again = partial(_again, loaded, on, metric, max_new_tokens, chat)
    _check_evidence(bank, steering, loaded.model, strength, again=again)


def _check_folded(steerer: Steerer, batch: Any, folded: str, same: nn.Module) -> None:
    if (failure := Proof(steerer, batch).failure(same)) is not None:
        kinds = [next((p.dtype for p in m.parameters()), None) for m in (steerer.model, same)]
        hint = "" if kinds[0] == kinds[1] else f"; the model is {kinds[0]}, the folded one {kinds[1]}: pass --dtype"
        screen.complain("error", f"{folded} is not the steered model: {failure}{hint}")
        raise typer.Exit(1)
    screen.say(f"folded: {folded} gives the steered model's outputs, within rounding")


def _check_engine(steerer: Steerer, batch: Any, *, model: str, bank: str) -> None:
    if not isinstance(batch, dict) or "input_ids" not in batch:
        raise typer.BadParameter("an engine answers texts, .txt or .jsonl", param_hint="--on")
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
    prompts = [row[real.bool()].tolist() for row, real in zip(batch["input_ids"], mask, strict=True)]
    found = compare(steerer, prompts, model=model, bank=bank)
    if found.failure is not None:
        screen.complain("error", f"vLLM does not answer what the steered model does: {found.failure}")
        raise typer.Exit(1)
    ties = "" if found.equal == found.prompts else f", and parts from it at ties, within {found.parted:.2g}"
    screen.say(
        f"served: vLLM gives the steered model's tokens for {found.equal} of {found.prompts} prompts{ties}, both in "
        f"{found.dtype}; log-probabilities differ by up to {found.furthest:.2g}, and where nothing is steered by "
        f"{found.plain:.2g}"
    )


def _check_evidence(
    bank: str,
    steering: Steering,
    model: nn.Module | None,
    strength: float | dict[str, float] | None,
    *,
    again: Callable[[Any, Evidence], list[Held]] | None = None,
) -> None:
    alone = strength is None and steering.is_plain and sealed.kind_of(bank) != "steering"  # vectors, and no strength
    given = steering.vectors if alone else steering if strength is None else replace(steering, c=strength)
    for known, own in evidences(given):
        found = [*known.compared(own, model), *(again(own, known) if again is not None else ())]
        for held in found:
            if not held.holds:
                screen.complain("error", f"no longer as recorded: {held.what} was {held.recorded}, and is {held.now}")
        if not all(held.holds for held in found):
            raise typer.Exit(1)
        screen.say(f"recorded: {len(found)} things hold: {', '.join(held.what for held in found)}")
        figures = ["effect", *(f"cost ({name})" for name in known.costs)]
        if rest := [name for name in figures if name not in [held.what for held in found]]:
            screen.say(
                f"not measured again: {', '.join(rest)}; that takes --on the data of then, an effect --metric too"
            )


def _again(
    loaded: Loaded, on: Path, metric: str | None, max_new_tokens: int, chat: bool, given: Any, known: Evidence
) -> list[Held]:
    inputs, _ = batches(on, loaded, batch_size=16, chat=chat)
    effect = None
    if metric is not None:
        effect = metric_of(metric, on, loaded, max_new_tokens=max_new_tokens, batch_size=16, chat=chat)
        if (own := name_of(effect)) != known.metric:
            raise typer.BadParameter(f"{own}: the effect was measured by {known.metric}", param_hint="--metric")
    return list(remeasured(loaded.model, given, known, retain=inputs, evaluate=effect))
