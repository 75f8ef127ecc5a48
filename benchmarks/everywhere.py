"""One file of a steering in every engine: `python -m benchmarks.everywhere [--out FILE.json] [--tiny]`.

Each engine loads the file and writes greedily. The reference is a Steerer on the transformers model.
"""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from actsteer import Steerer, Steering, SteeringVector, fold
from actsteer.integrations.vllm.comparing import greedy
from benchmarks.overhead import described
from reference.language import model as smollm2
from reference.stored import ModelMissingError

TOKENS = 16
STRENGTHS = (-1.0, 0.5, 1.0)
TEXTS = ("The weather today is", "Once upon a time there was", "To bake bread you need", "My advice to you is")


@dataclass(frozen=True)
class Fixture:
    """A Llama, prompts of token ids, and a steering of outputs of blocks, which lies in a file."""

    name: str
    model: Any
    prompts: list[list[int]]
    file: Path
    vllm_python: Path | None = None

    @property
    def folder(self) -> Path:
        """Where engines write what they need."""
        return self.file.parent

    @property
    def ids(self) -> Tensor:
        """The prompts, with room for the answers behind each."""
        made = torch.zeros(len(self.prompts), max(map(len, self.prompts)) + TOKENS, dtype=torch.long)
        for row, prompt in zip(made, self.prompts, strict=True):
            row[: len(prompt)] = torch.tensor(prompt)
        return made

    def vector(self, c: float) -> SteeringVector:
        """What the file adds with strength c."""
        bank = Steering.load(self.file).vectors
        return bank.combine(dict.fromkeys(bank, c))

    def folded(self, c: float) -> Any:
        """A copy of the model that carries the steering in its weights."""
        return fold(self.model, Steering.load(self.file), c, verify_on=self.ids)


@dataclass(frozen=True)
class Answer:
    """The tokens of a greedy answer, and the log-probability of each; of the reference, the margins too."""

    tokens: list[int]
    logprobs: list[float]
    margins: list[float] = field(default_factory=list)
    """To the next likely token: one below rounding is a tie, which each engine decides as it happens to round."""


@dataclass(frozen=True)
class Found:
    """How an engine answers: how many answers have the reference's tokens, and how far the log-probabilities are off.

    A log-probability is compared as long as all tokens before it, and its own, are the reference's. `lost` is the
    widest margin by which the reference preferred its own token where this engine first chose another.
    """

    engine: str
    equal: int = 0
    answers: int = 0
    furthest: float | None = None
    lost: float | None = None
    not_here: str | None = None


class NotHereError(Exception):
    """This engine is not installed; it says what would bring it."""


# --- the engines: each gives an answer to every prompt at every strength -------------------------------------------
def eager(own: Fixture) -> list[Answer]:
    """The reference."""
    return [answer for c in STRENGTHS for answer in _steered(own, c)]


def compiled(own: Fixture) -> list[Answer]:
    """Compiled once, before anything is attached; by dynamo alone, for inductor rounds in its own way."""
    forward = torch.compile(_Logits(own.model), backend="eager")
    recomputed(forward, own)
    return [answer for c in STRENGTHS for answer in _attached(own.model, Steering.load(own.file), c, forward, own)]


def buffer(own: Fixture) -> list[Answer]:
    """The backend that compiled and exported code reads."""
    return [answer for c in STRENGTHS for answer in _steered(own, c, backend="buffer")]


def folded(own: Fixture) -> list[Answer]:
    """In the weights."""
    return [answer for c in STRENGTHS for answer in generated(own.folded(c), own)]


def reloaded(own: Fixture) -> list[Answer]:
    """In the weights, through a checkpoint."""
    return [answer for c in STRENGTHS for answer in generated(_through_a_checkpoint(own, c), own)]


def bridge(own: Fixture) -> list[Answer]:
    """TransformerLens, at its own names of the same places."""
    _needs("transformer_lens")
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    model = copy.deepcopy(own.model)
    lens = build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)
    v = own.vector(1.0)
    here = SteeringVector({f"blocks.{site.rpartition('.')[2]}.hook_resid_post": v[site] for site in v.sites})
    return [answer for c in STRENGTHS for answer in _attached(lens, Steering(here), c, lens, own)]


def exported(own: Fixture) -> list[Answer]:
    """A program of the folded model."""
    return [
        answer
        for c in STRENGTHS
        for answer in recomputed(torch.export.export(_Logits(own.folded(c)), (own.ids,)).module(), own)
    ]


def onnx(own: Fixture) -> list[Answer]:
    """The folded model in onnxruntime."""
    _needs("onnxruntime", "onnxscript")
    return [answer for c in STRENGTHS for answer in recomputed(_onnx(own, c), own)]


def llama_cpp(own: Fixture) -> list[Answer]:
    """A control vector beside the plain model, all in F32."""
    _needs("xllamacpp", "gguf")
    from benchmarks.llama_cpp import LlamaCpp, write_llama

    write_llama(own.model, own.folder / "model.gguf")
    engine, size = LlamaCpp(own.folder / "model.gguf"), own.model.config.vocab_size
    try:
        found = []
        for c in STRENGTHS:
            own.vector(c).save(own.folder / "steering.gguf", model=own.model)
            for prompt in own.prompts:
                ids, logprobs = list(prompt), list[float]()
                for _ in range(TOKENS):
                    logits = engine.logits(ids, size, own.folder / "steering.gguf").log_softmax(-1)
                    ids.append(int(logits.argmax()))
                    logprobs.append(float(logits[ids[-1]]))
                found.append(Answer(ids[len(prompt) :], logprobs))
        return found
    finally:
        engine.close()


def vllm(own: Fixture) -> list[Answer]:
    """All prompts and strengths in one batch of a stock engine, by the plugin."""
    if own.vllm_python is None:
        raise NotHereError("give --vllm-python, of an environment that has vLLM and actsteer")
    own.model.save_pretrained(own.folder / "model")
    job, made = own.folder / "job.json", own.folder / "answers.json"
    given = {"model": str(own.folder / "model"), "steering": str(own.file), "tokens": TOKENS}
    job.write_text(json.dumps(given | {"prompts": own.prompts, "strengths": STRENGTHS}))
    command = [str(own.vllm_python), "-m", "benchmarks.vllm_engine", str(job), str(made)]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    if ended.returncode:
        raise RuntimeError(f"vLLM: {own.vllm_python} ended with {ended.returncode}\n{ended.stderr[-3000:]}")
    return [Answer(**answer) for answer in json.loads(made.read_text())]


ENGINES: dict[str, Callable[[Fixture], list[Answer]]] = {
    "Steerer, eager": eager,
    "Steerer, torch.compile(backend='eager')": compiled,
    "Steerer, buffer": buffer,
    "fold": folded,
    "fold, saved and from_pretrained": reloaded,
    "TransformerBridge": bridge,
    "fold, torch.export": exported,
    "fold, ONNX": onnx,
    "llama.cpp, control vector": llama_cpp,
    "vLLM": vllm,
}
"""Name -> what answers; the first is the reference."""


def main(
    out: Annotated[Path | None, typer.Option(help="Write the results to this JSON file too.")] = None,
    tiny: Annotated[bool, typer.Option("--tiny", help="The tiny Llama alone.")] = False,
    vllm_python: Annotated[Path | None, typer.Option(help="The python of an environment with vLLM.")] = None,
) -> None:
    """Compare the greedy answers of every engine with those of a Steerer: tokens, and log-probabilities."""
    found: dict[str, list[Found]] = {}
    for make in (tiny_llama,) if tiny else (tiny_llama, smollm):
        with make(vllm_python) as own:
            if own is None:
                Console().print(f"SmolLM2 is not here: {smollm2.INSTALL}")
                continue
            found[own.name] = compare(own)
            Console(width=150).print(table(found[own.name], title=f"{own.name}: {moved(own)}"))
    if out is not None:
        command = (
            "python -m benchmarks.everywhere" + " --tiny" * tiny + " --vllm-python ..." * (vllm_python is not None)
        )
        rows = {name: [asdict(row) for row in own] for name, own in found.items()}
        out.write_text(json.dumps(described(command) | {"models": rows}, indent=2) + "\n")


@contextmanager
def tiny_llama(vllm_python: Path | None = None) -> Iterator[Fixture]:
    """Four blocks with random weights, and random prompts."""
    sizes: dict[str, Any] = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}
    heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    special: dict[str, Any] = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = LlamaConfig(**sizes, **heads, **special, initializer_range=0.2, tie_word_embeddings=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: nn.Module = LlamaForCausalLM(config)
        prompts = [torch.randint(0, 256, (length,)).tolist() for length in (3, 5, 9, 14)]
    with _made("tiny Llama", model.eval(), prompts, blocks=(1, 2), norm=20.0, vllm_python=vllm_python) as own:
        yield own


@contextmanager
def smollm(vllm_python: Path | None = None) -> Iterator[Fixture | None]:
    """SmolLM2-135M-Instruct; None where it is not installed."""
    try:
        model, tokenizer = smollm2.load()
    except ModelMissingError:
        yield None
        return
    model.generation_config.eos_token_id = None  # no answer ends early
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    with _made("SmolLM2-135M", model, prompts, blocks=(10, 20), norm=20.0, vllm_python=vllm_python) as own:
        yield own


def compare(own: Fixture) -> list[Found]:
    """A row for each engine, in order."""
    reference, *_ = ENGINES.values()
    expected = reference(own)
    found = []
    for name, engine in ENGINES.items():
        try:
            found.append(_found(name, expected, expected if engine is reference else engine(own)))
        except NotHereError as error:
            found.append(Found(name, not_here=str(error)))
    return found


def moved(own: Fixture) -> str:
    """How many answers the steering changes: what cannot be told from unsteered proves nothing.

    Raises:
        AssertionError: none.
    """
    plain = generated(own.model, own) * len(STRENGTHS)
    steered = eager(own)
    count = sum(one.tokens != other.tokens for one, other in zip(plain, steered, strict=True))
    if not count:
        raise AssertionError(f"{own.name}: the steering changes no answer, so there is nothing to compare")
    return f"{len(steered)} answers of {TOKENS} tokens, {count} of them other than unsteered"


def table(found: list[Found], *, title: str) -> Table:
    """One row per engine."""
    made = Table(title=title)
    for column in ("", "answers with equal tokens", "largest difference of log-probabilities", "widest margin lost"):
        made.add_column(column, justify="right" if column else "left")
    for row in found:
        if row.not_here is not None:
            made.add_row(row.engine, "not here", row.not_here)
        else:
            off, lost = ("" if number is None else f"{number:.1e}" for number in (row.furthest, row.lost))
            made.add_row(row.engine, f"{row.equal} of {row.answers}", off, lost)
    return made


# --- how an answer is written --------------------------------------------------------------------------------------
def generated(model: Any, own: Fixture) -> list[Answer]:
    """The answers that `generate` writes, with its cache."""
    found = []
    for prompt in own.prompts:
        answer, logprobs = greedy(model, prompt, TOKENS)
        likeliest = logprobs.topk(2).values
        found.append(Answer(answer.tokens, answer.logprobs, (likeliest[:, 0] - likeliest[:, 1]).tolist()))
    return found


@torch.no_grad()
def recomputed(forward: Callable[[Tensor], Tensor], own: Fixture) -> list[Answer]:
    """The answers of what gives logits for tokens of one shape; what lies behind a text does not change them."""
    ids, lengths, rows = own.ids, torch.tensor([len(prompt) for prompt in own.prompts]), torch.arange(len(own.prompts))
    logprobs = torch.empty(len(rows), TOKENS)
    for step in range(TOKENS):
        last = forward(ids)[rows, lengths + step - 1].log_softmax(-1)
        logprobs[:, step], ids[rows, lengths + step] = last.max(-1)
    texts = zip(ids, lengths, logprobs, strict=True)
    return [Answer(text[length : length + TOKENS].tolist(), each.tolist()) for text, length, each in texts]


class _Logits(nn.Module):
    """Tokens in, logits out, nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.model(ids, use_cache=False).logits
        return logits


def _steered(own: Fixture, c: float, **options: Any) -> list[Answer]:
    with Steerer(own.model, Steering.load(own.file), c=c, **options):
        return generated(own.model, own)


def _attached(model: nn.Module, steering: Steering, c: float, forward: Any, own: Fixture) -> list[Answer]:
    with Steerer(model, steering, c=c):
        return recomputed(forward, own)


def _through_a_checkpoint(own: Fixture, c: float) -> Any:
    own.folded(c).save_pretrained(own.folder / "folded")
    model: Any = AutoModelForCausalLM.from_pretrained(own.folder / "folded", local_files_only=True)
    return model.eval()


def _onnx(own: Fixture, c: float) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    file = own.folder / "folded.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own
        torch.onnx.export(_Logits(own.folded(c)), (own.ids,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file)
    (name,) = (given.name for given in session.get_inputs())
    return lambda ids: torch.from_numpy(session.run(None, {name: ids.numpy()})[0])


def _found(name: str, expected: list[Answer], got: list[Answer]) -> Found:
    off: list[float] = []
    lost: list[float] = []
    for one, other in zip(expected, got, strict=True):
        for step in range(TOKENS):
            if one.tokens[step] != other.tokens[step]:
                lost.append(one.margins[step])
                break
            off.append(abs(one.logprobs[step] - other.logprobs[step]))
    return Found(name, len(expected) - len(lost), len(expected), max(off, default=None), max(lost, default=None))


@contextmanager
def _made(
    name: str, model: Any, prompts: list[list[int]], *, blocks: tuple[int, ...], norm: float, vllm_python: Path | None
) -> Iterator[Fixture]:
    generator = torch.Generator().manual_seed(0)
    drawn = {f"model.layers.{n}": torch.randn(model.config.hidden_size, generator=generator) for n in blocks}
    v = SteeringVector({site: norm * direction / direction.norm() for site, direction in drawn.items()})
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "steering.safetensors"
        Steering(v).save(file, model=model)
        yield Fixture(name, model, prompts, file, vllm_python)


def _needs(*packages: str) -> None:
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise NotHereError(f"needs {package}")


if __name__ == "__main__":
    typer.run(main)
