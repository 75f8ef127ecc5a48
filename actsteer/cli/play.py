"""play: a page on which a steering is tried, in a browser."""

from __future__ import annotations

from typing import Annotated

import typer

from actsteer.cli import banks, models, options, screen
from actsteer.cli.options import BankPath, Chat, Concepts, Device, DtypeName, ModelName, StrengthTexts, TrustRemoteCode
from actsteer.files import sealed
from actsteer.looking.play import play as serve


def play(
    model: ModelName,
    bank: BankPath,
    c: StrengthTexts = None,
    concept: Concepts = None,
    image: Annotated[
        str | None,
        typer.Option(help="Of a classifier: the height and width of its images, 28x28; 1x28x28 with their channel."),
    ] = None,
    mean: Annotated[float, typer.Option(help="What is taken off the pixels, which are from 0 to 1.")] = 0.0,
    std: Annotated[float, typer.Option(help="What they are divided by then.")] = 1.0,
    chat: Chat = False,
    host: Annotated[
        str, typer.Option(help="Who may see it: this machine alone, or with 0.0.0.0 everyone.")
    ] = "127.0.0.1",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Where; else the first free one from 7860 on.")
    ] = None,
    device: Device = None,
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Serve a page with a slider per concept, and a model's answers without the steering and with it.

    A language model writes both side by side; of a classifier of small images, see --image, it shows the classes of
    what is drawn. The sliders begin at -c, at the file's strengths, or, of vectors alone, at 0. Ctrl-C ends it.
    """
    banks.check(bank)
    size = None if image is None else options.size(image)
    start = options.one_strength(c) if c else None
    if start is None and sealed.kind_of(bank) != "steering":
        start = 0.0
    loaded = models.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    steering = banks.read(bank, loaded.model, concept)
    is_text = size is None and hasattr(loaded.model, "generate")
    tokenizer = loaded.tokenizer() if is_text else None
    with serve(
        loaded.model,
        steering,
        tokenizer=tokenizer,
        c=start,
        image=size,
        mean=mean,
        std=std,
        chat=chat,
        host=host,
        port=port,
    ) as page:
        screen.say(f"{page.url}  (Ctrl-C ends it)")
        page.wait()
