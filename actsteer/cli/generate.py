"""generate: a prompt's continuations, plain and then steered, as they are made."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Annotated, Any

import torch
import typer

from actsteer.cli import banks, models, options, screen
from actsteer.cli.options import BankPath, Chat, Concepts, Device, DtypeName, ModelName, StrengthTexts, TrustRemoteCode
from actsteer.collecting.texts import input_device, pad_of, text_batches
from actsteer.errors import ActsteerError, UnsupportedModelError
from actsteer.steering.steerer import Steerer
from actsteer.steering.strength import Strengths


def generate(
    prompts: Annotated[list[str], typer.Argument(help="What the model is to go on with.", show_default=False)],
    model: ModelName,
    bank: BankPath,
    c: StrengthTexts = None,
    concept: Concepts = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="How many tokens at most.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="For a temperature above 0.")] = 0,
    positions: Annotated[
        str | None,
        typer.Option(help="all, prompt, generated, last, an index, or start:stop. Or those of the file."),
    ] = None,
    chat: Chat = False,
    device: Device = None,
    dtype: DtypeName = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Generate text with c = 0, the model as it is, and then at every strength asked for, or at that of the file.

    A text is printed while it is made, under its strength.
    """
    banks.check(bank)
    strengths = banks.strengths(bank, c)
    where = None if positions is None else options.positions(positions)
    loaded = models.load(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if not hasattr(loaded.model, "generate"):
        raise UnsupportedModelError(f"{model}: {type(loaded.model).__name__} generates no text; give a language model")
    steering = banks.read(bank, loaded.model, concept)
    tokenizer = loaded.tokenizer()
    every = [Steerer(loaded.model, steering, c=own, positions=where) for own in strengths]  # before any work
    for number, prompt in enumerate(prompts):
        (batch,) = text_batches(tokenizer, [prompt], chat=chat, device=input_device(loaded.model))
        if not number and every and not getattr(loaded.model.config, "is_encoder_decoder", False):
            with suppress(ActsteerError):  # which the generation itself will raise
                every[0].check(batch)  # and this warns where nothing would come of it
        screen.head(prompt)
        for steerer in (None, *every):
            screen.head(f"c = {_shown(0.0 if steerer is None else steerer.c)}")
            torch.manual_seed(seed)
            with ExitStack() as stack:
                if steerer is not None:
                    stack.enter_context(steerer)
                _continue(loaded.model, tokenizer, batch, max_new_tokens, temperature)
            screen.say("")


def _continue(model: Any, tokenizer: Any, batch: Any, length: int, temperature: float) -> None:
    from transformers import TextStreamer

    class Printed(TextStreamer):
        """What prints a text word by word, as all else is printed here."""

        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            screen.write(text + "\n" * stream_end)

    drawn = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    plain = {} if temperature else {"temperature": None, "top_p": None, "top_k": None}
    has_beams = (model.generation_config.num_beams or 1) > 1  # of which none is the text before the end
    streamer = None if has_beams else Printed(tokenizer, skip_prompt=True, skip_special_tokens=True)
    ids = model.generate(
        **batch, **drawn, **plain, max_new_tokens=length, pad_token_id=pad_of(tokenizer), streamer=streamer
    )
    if has_beams:
        start = 1 if model.config.is_encoder_decoder else batch["input_ids"].shape[1]
        screen.write(tokenizer.decode(ids[0, start:], skip_special_tokens=True) + "\n")


def _shown(c: Strengths) -> str:
    if isinstance(c, Mapping):
        return ", ".join(f"{name} {_shown(own)}" for name, own in c.items())
    return f"{c:g}" if isinstance(c, int | float) else str(c.tolist() if isinstance(c, torch.Tensor) else c)
