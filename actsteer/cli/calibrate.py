"""calibrate: from a bank to a steering: at which sites and how strongly, with evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from actsteer.cli import banks, models, options, screen
from actsteer.cli.examples import batches
from actsteer.cli.metrics import metric as metric_of
from actsteer.cli.options import (
    BankPath,
    BatchSize,
    Chat,
    Concepts,
    Device,
    DtypeName,
    ModelName,
    OutPath,
    TrustRemoteCode,
)
from actsteer.tuning.calibrate import calibrate as calibrating


def calibrate(
    model: ModelName,
    bank: BankPath,
    retain: Annotated[
        Path, typer.Option(help="On what the model is to answer as before: texts, or inputs.", **options.READ)
    ],
    prompts: Annotated[Path, typer.Option(help="On what the effect is measured: texts, or inputs.", **options.READ)],
    metric: Annotated[
        str,
        typer.Option(
            help="module:function: the texts that the model writes after the prompts, in a list, or what it returns "
            "for inputs -> a number for each.",
            show_default=False,
        ),
    ],
    output: OutPath,
    budget: Annotated[float, typer.Option(min=0.0, help="How large the mean KL on --retain may be, in nats.")] = 0.05,
    p95: Annotated[float | None, typer.Option(min=0.0, help="How large its 95th percentile may be.")] = None,
    controls: Annotated[int, typer.Option(min=0, help="How many random directions go through the same search.")] = 99,
    dose: Annotated[
        list[float] | None,
        typer.Option(help="A coarse strength, in units of the activation's typical norm; repeatable."),
    ] = None,
    sites: Annotated[list[str] | None, typer.Option(help="These of the vectors' sites; repeatable.")] = None,
    positions: Annotated[
        list[str] | None,
        typer.Option(help="all, prompt, generated, last, an index, or start:stop; repeatable, each is tried."),
    ] = None,
    picture: Annotated[
        Path | None,
        typer.Option(help="Where to draw effect against cost, .png, .svg or .pdf; beside the output, unless given."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens are written after a prompt.")] = 32,
    batch_size: BatchSize = 16,
    seed: Annotated[int, typer.Option(help="Of the halves of the data and of the controls.")] = 0,
    concept: Concepts = None,
    chat: Chat = False,
    device: Device = None,
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Find the sites and the strength with the largest effect whose cost stays in the budget, and whether it is real.

    Writes the steering, with what was measured, if it does more than not steering and than every control; the exit code
    is 1 if nothing does. A command that was killed goes on when it is given again.
    """
    import torch

    options.check_output(output, ".safetensors", inputs=(bank, retain, prompts))
    banks.check_own(output, "bank")
    banks.check(bank)
    drawn = output.with_suffix(".png") if picture is None else picture
    options.check_output(drawn, ".png", ".svg", ".pdf", inputs=(bank, retain, prompts, output))
    if drawn.exists() and not output.exists() and picture is None:
        raise typer.BadParameter(f"{drawn}: it is there already; choose another name", param_hint="--picture")
    where = None if positions is None else [options.positions(own) for own in positions]
    loaded = models.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    steering = banks.read(bank, loaded.model, concept)
    effect = metric_of(metric, prompts, loaded, max_new_tokens=max_new_tokens, batch_size=batch_size, chat=chat)
    kept, _ = batches(retain, loaded, batch_size=batch_size, chat=chat)
    resume = output.with_name(f".{output.stem}.resume.safetensors")
    if resume.exists():
        screen.say(f"going on from {resume}")
    found = calibrating(
        loaded.model,
        steering,
        evaluate=effect,
        retain=kept,
        budget={"mean": budget} | ({} if p95 is None else {"p95": p95}),
        controls=controls,
        doses=dose,
        sites=sites,
        positions=where,
        batch_size=batch_size,
        checkpoint=resume,
        generator=torch.Generator().manual_seed(seed),
    )
    for line in str(found).split("\n"):
        screen.say(line)
    try:
        found.plot(drawn)
        screen.say(f"drawn to {drawn}")
    except ImportError as error:
        screen.complain("warning", str(error))
    if found.found:
        found.best.save(output, model=loaded.model)
        screen.say(f"written to {output}")
    resume.unlink(missing_ok=True)
    if not found.found:
        screen.complain("error", "nothing is written, for nothing that was tried is worth steering with")
        raise typer.Exit(1)
