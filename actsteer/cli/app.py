"""app: the commands of `actsteer`, each of which is imported when it runs."""

from __future__ import annotations

import ast
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

_EXAMPLES: dict[str, list[str]] = {  # command, a function in the file of its name -> how it is used
    "sites": [
        "actsteer sites ./llama --residual",
        "actsteer sites ./llama 'model.layers.*.mlp'",
        "actsteer sites torchvision.models:resnet18 '**.conv1'",
    ],
    "fit": [
        "actsteer fit -m ./llama --positive calm.txt --negative angry.txt --sites model.layers.14 -o calm.safetensors",
        "actsteer fit -m nets:build --positive nines.pt --negative rest.pt --sites 're:relu.*' -o nine.safetensors",
    ],
    "collect": [
        "actsteer collect -m ./llama --texts calm.txt --sites 'model.layers.*' -o calm-stats.safetensors",
        "actsteer collect -m ./llama --texts ./corpus --sites model.layers.14 --shard 2/8 -o part2.safetensors",
    ],
    "merge": ["actsteer merge part*.safetensors -o all.safetensors"],
    "show": ["actsteer show calm.safetensors", "actsteer show 'tones/*.safetensors'"],
    "calibrate": [
        "actsteer calibrate -m ./llama -b calm.safetensors --retain neutral.txt --prompts prompts.txt "
        "--metric scores:calmness -o calibrated.safetensors",
    ],
    "generate": [
        "actsteer generate -m ./llama -b calm.safetensors -c 2 'The meeting was'",
        "actsteer generate -m ./llama -b tone.safetensors -c calm=2 -c brief=-1 --chat 'How was the meeting?'",
    ],
    "look": [
        "actsteer look -m ./llama -b calm.safetensors -c 2 --prompts prompts.txt -o look.html",
        "actsteer look -m nets:build -b nine.safetensors --prompts digits.pt --image-shape 28x28 -o look.html",
    ],
    "play": [
        "actsteer play -m ./llama -b calm.safetensors",
        "actsteer play -m nets:build -b nine.safetensors --image 28x28 --mean 0.1307 --std 0.3081",
    ],
    "convert": [
        "actsteer convert calm.safetensors calm.gguf",
        "actsteer convert --model ./llama repeng.gguf calm.safetensors",
        "actsteer convert 'tones/*.safetensors' bank.safetensors",
    ],
    "fold": ["actsteer fold -m ./llama -b calm.safetensors -c 2 --verify-on prompts.txt -o ./calm-llama"],
    "verify": [
        "actsteer verify calm.safetensors -m ./llama",
        "actsteer verify calm.safetensors -m ./llama --on prompts.txt -c 2 --folded ./calm-llama",
        "actsteer verify calm.safetensors -m ./llama --on prompts.txt -c 2 --engine vllm",
    ],
    "explain": ["actsteer explain ShapeError", "actsteer explain"],
}


class _Commands(TyperGroup):
    """The commands, by name; the list of them takes each one's docstring from its file, which is not run for it."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order above."""
        return list(_EXAMPLES)

    def get_command(self, ctx: Any, cmd_name: str) -> TyperCommand | None:
        """A command for the list."""
        return TyperCommand(cmd_name, help=_docstring(cmd_name)) if cmd_name in _EXAMPLES else None

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The command that is to run."""
        name, found, rest = super().resolve_command(ctx, args)
        return name, None if found is None or name is None else _made(name), rest


def _made(name: str) -> Any:
    """The command, from its file."""
    only = typer.Typer(add_completion=False, **_LOOKS)
    epilog = "\n\n".join(["**Examples**", *(f"`{example}`" for example in _EXAMPLES[name])])
    only.command(name, epilog=epilog)(getattr(import_module(f"actsteer.cli.{name}"), name))
    return typer.main.get_command(only)


def _docstring(name: str) -> str:
    source = ast.parse(Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8"))
    own = next(node for node in source.body if isinstance(node, ast.FunctionDef) and node.name == name)
    return ast.get_docstring(own) or ""


_LOOKS: dict[str, Any] = {"rich_markup_mode": "markdown", "pretty_exceptions_enable": False}

app = typer.Typer(
    name="actsteer",
    cls=_Commands,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    **_LOOKS,
)


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
