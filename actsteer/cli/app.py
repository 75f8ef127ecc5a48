"""app: the commands of `actsteer`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer

from actsteer.cli.collect import collect
from actsteer.cli.convert import convert
from actsteer.cli.fit import fit
from actsteer.cli.fold import fold
from actsteer.cli.generate import generate
from actsteer.cli.merge import merge
from actsteer.cli.show import show
from actsteer.cli.sites import sites
from actsteer.cli.verify import verify

_EXAMPLES: dict[Callable[..., None], list[str]] = {
    sites: ["actsteer sites ./llama 'model.layers.*.mlp'", "actsteer sites torchvision.models:resnet18 '*.conv1'"],
    fit: [
        "actsteer fit -m ./llama --positive calm.txt --negative angry.txt --sites model.layers.14 -o calm.safetensors",
        "actsteer fit -m nets:build --positive nines.pt --negative rest.pt --sites 're:relu.*' -o nine.safetensors",
    ],
    collect: [
        "actsteer collect -m ./llama --texts calm.txt --sites 'model.layers.*' -o calm-stats.safetensors",
        "actsteer collect -m ./llama --texts ./corpus --sites model.layers.14 --shard 2/8 -o part2.safetensors",
    ],
    merge: ["actsteer merge part*.safetensors -o all.safetensors"],
    show: ["actsteer show calm.safetensors", "actsteer show 'tones/*.safetensors'"],
    generate: [
        "actsteer generate -m ./llama -b calm.safetensors -c 2 'The meeting was'",
        "actsteer generate -m ./llama -b tone.safetensors -c calm=2 -c brief=-1 --chat 'How was the meeting?'",
    ],
    convert: [
        "actsteer convert calm.safetensors calm.gguf",
        "actsteer convert --model ./llama repeng.gguf calm.safetensors",
    ],
    fold: ["actsteer fold -m ./llama -b calm.safetensors -c 2 --verify-on prompts.txt -o ./calm-llama"],
    verify: [
        "actsteer verify calm.safetensors -m ./llama",
        "actsteer verify calm.safetensors -m ./llama --on prompts.txt -c 2 --folded ./calm-llama",
    ],
}

app = typer.Typer(
    name="actsteer",
    no_args_is_help=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command, examples in _EXAMPLES.items():
    app.command(epilog="\n\n".join(["**Examples**", *(f"`{example}`" for example in examples)]))(command)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(version("actsteer"))
        raise typer.Exit


@app.callback()
def actsteer(
    _: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Show it.")] = False,
) -> None:
    """Steer any torch model: find sites, fit vectors, look at them, try them, convert them, fold them into weights.

    MODEL is a Hugging Face directory or name, or module:factory for any torch model: an importable model, or what makes
    one without arguments.
    """
