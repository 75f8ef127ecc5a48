"""Says whether an answer to a task of the exam does what it is to do, or what is missing.

python check.py 3 answer_03.py

It knows nothing of how the answer was found: what an answer should give is computed here with plain hooks of torch.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

import given  # noqa: E402  (it lies beside this file)


class Missing(Exception):  # noqa: N818  (it is what the message begins with)
    """What an answer lacks."""


def expect(is_so: bool, otherwise: str) -> None:
    """Missing unless it is so."""
    if not is_so:
        raise Missing(otherwise)


@contextlib.contextmanager
def adding(model: nn.Module, directions: Mapping[str, Tensor], c: float = 1.0, axis: int = -1) -> Iterator[None]:
    """Plain hooks that add c times a direction to what the modules of these names give."""

    def hook(direction: Tensor) -> Callable[..., Tensor]:
        return lambda module, args, h: (
            h + c * direction.to(h).view([-1 if i == axis % h.ndim else 1 for i in range(h.ndim)])
        )

    handles = [model.get_submodule(name).register_forward_hook(hook(v)) for name, v in directions.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def activations(model: nn.Module, x: Tensor, site: str) -> Tensor:
    """What the module of this name gives."""
    kept: list[Tensor] = []
    handle = model.get_submodule(site).register_forward_hook(lambda module, args, output: kept.append(output))
    model(x)
    handle.remove()
    return kept[0]


def between(model: nn.Module, x: Tensor, y: Tensor, site: str) -> Tensor:
    """From the mean of the activations on y to that on x."""
    return activations(model, x, site).double().mean(0) - activations(model, y, site).double().mean(0)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {name: value.clone() for name, value in model.state_dict().items()}


def expect_weights(model: nn.Module, before: Mapping[str, Tensor], when: str) -> None:
    """Missing if a weight has changed."""
    same = model.state_dict().keys() == before.keys() and all(
        torch.equal(model.state_dict()[n], before[n]) for n in before
    )
    expect(same, f"the weights of the network are not what they were {when}")


def entered(result: Any) -> Any:
    """What is to be used in a `with` block."""
    expect(
        hasattr(result, "__enter__") and hasattr(result, "__exit__"), "solve gives nothing that a `with` block takes"
    )
    return result


def called(model: nn.Module, x: Tensor, kind: int) -> float:
    """The share of the rows that are called this."""
    return float((model(x).argmax(dim=1) == kind).double().mean())


def check_01(solve: Callable[..., Any]) -> None:
    """An answer changes, and only inside the block."""
    model, (left, right), (others, _) = given.two_sides(7), given.sides(7), given.sides(8)
    plain, before = model(others), weights(model)
    steered = entered(solve(model, left, right))
    expect(torch.equal(model(others), plain), "the network is changed before the block begins")
    with contextlib.suppress(InterruptedError), steered:
        share = called(model, others, 1)
        expect_weights(model, before, "inside the block")
        raise InterruptedError
    expect(share >= 0.9, f"inside the block {share:.0%} of other points on the left are called right; 90% are to be")
    expect(
        torch.equal(model(others), plain),
        "after the block, which an error ended, the network answers otherwise than before",
    )
    expect_weights(model, before, "after the block")


def check_02(solve: Callable[..., Any]) -> None:
    """Places of a CNN, and one of its channels."""
    model, pictures = given.pictures(3)
    plain, before = model(pictures), weights(model)
    result = solve(model, pictures)
    expect(isinstance(result, tuple) and len(result) == 2, "solve does not give (places, answers)")
    places, answers = result
    truth = [name for name, module in model.named_modules() if isinstance(module, nn.ReLU)]
    expect(
        sorted(places) == sorted(truth), f"the places are {sorted(places)}; every ReLU is to be there, and nothing else"
    )
    with adding(model, {"stages.1.act1": 2 * torch.eye(8)[5]}, axis=1):
        goal = model(pictures)
    expect(not torch.allclose(answers, plain, atol=1e-4), "the answers are the unchanged network's")
    expect(
        torch.allclose(answers, goal, atol=1e-4), "the answers are not those with channel 5 two higher in every pixel"
    )
    expect(torch.equal(model(pictures), plain), "the network answers otherwise than before")
    expect_weights(model, before, "afterwards")


def check_03(solve: Callable[..., Any]) -> None:
    """A direction from files, of which few are in memory at a time."""
    model, alive, most, files = given.twelve_kinds(5), 0, 0, 0
    load = torch.load

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal alive, most, files
        loaded = load(*args, **kwargs)
        alive, files = alive + 1, files + 1
        most = max(most, alive)
        weakref.finalize(loaded, gone)
        return loaded

    def gone() -> None:
        nonlocal alive
        alive -= 1

    with tempfile.TemporaryDirectory() as temporary:
        x, kinds = given.rows(6)
        folders, sets = (Path(temporary) / "positive", Path(temporary) / "negative"), (x[kinds == 4], x[kinds != 4])
        for folder, data in zip(folders, sets, strict=True):
            folder.mkdir()
            for i, part in enumerate(data.split([7, 60, len(data) - 140, 11, 62])):
                torch.save(part.clone(), folder / f"{i}.pt")
        torch.load = counted
        try:
            v = solve(model, *folders)
        finally:
            torch.load = load
    expect(isinstance(v, Tensor) and v.shape == (64,), "solve does not give a tensor of 64 numbers")
    truth = between(model, *sets, "3")
    expect(files >= 10, f"{files} of the 10 files were read by torch.load")
    expect(most <= 3, f"{most} files were in memory at once; no more than 3 may be")
    expect(
        torch.allclose(v.double(), truth, atol=1e-4), "it is not the difference of the means, over rows, of both sets"
    )


def check_04(make: Callable[..., Any], use: Callable[..., Any]) -> None:
    """Two concepts in a file, and mixed."""
    model, (x, kinds) = given.twelve_kinds(2), given.rows(3)
    others = x[kinds == 0]
    sets = {"four": x[kinds == 4], "nine": x[kinds == 9], "rest": x[(kinds != 4) & (kinds != 9)]}
    v, w = (between(model, sets[name], sets["rest"], "1") for name in ("four", "nine"))
    with adding(model, {"1": 1.5 * v - 0.5 * w}):
        goal = model(others)
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "concepts.safetensors"
        make(model, sets, path)
        expect(path.is_file(), "make has written no file where it was to")
        sets.clear()
        again = copy.deepcopy(model)
        plain = again(others)
        result = use(again, path, others)
        expect(isinstance(result, tuple) and len(result) == 2, "use does not give (likeness, answers)")
        likeness, answers = result
        expect(
            abs(float(likeness) - float(v @ w / v.norm() / w.norm())) < 1e-3,
            f"the two are not alike by {float(likeness):.3f}",
        )
        expect(not torch.allclose(answers, plain, atol=1e-4), "the answers are the unchanged network's")
        expect(torch.allclose(answers, goal, atol=1e-3), "the answers are not those with 1.5 of four and -0.5 of nine")
        expect(torch.equal(again(others), plain), "the network answers otherwise than before")
        damaged = bytearray(path.read_bytes())
        damaged[-3] ^= 1
        path.write_bytes(bytes(damaged))
        try:
            use(again, path, others)
        except Exception:
            return
    raise Missing("a file in which a bit was turned over is used as if nothing had happened")


def check_05(solve: Callable[..., Any]) -> None:
    """Where, how strongly, and whether it is more than chance."""
    model, (x, kinds), (more, more_kinds) = given.twelve_kinds(1), given.rows(10), given.rows(11)
    zeros, kept = x[kinds == 0], x[(kinds != 0) & (kinds != 4)][::4]
    new, others = more[more_kinds == 0], more[(more_kinds != 0) & (more_kinds != 4)]
    real = {site: between(model, x[kinds == 4], x[kinds != 4], site).float() for site in ("1", "3")}
    draws = torch.Generator().manual_seed(2)
    chance = {s: nn.functional.normalize(torch.randn(64, generator=draws), dim=0) * v.norm() for s, v in real.items()}
    for directions, is_real in ((real, True), (chance, False)):
        result = solve(model, {**directions}, zeros, kept)
        name = "the mean difference" if is_real else "a random direction"
        expect(
            isinstance(result, tuple) and len(result) == 3,
            "solve does not give (places, strength, is_more_than_chance)",
        )
        places, c, verdict = result
        expect(bool(verdict) == is_real, f"of {name} it says that it is {'' if verdict else 'not '}more than chance")
        if is_real:
            plain = model(others).log_softmax(dim=1)
            with adding(model, {site: real[site] for site in places}, float(c)):
                gain = float(model(new).log_softmax(dim=1)[:, 4].mean())
                cost = float((plain.exp() * (plain - model(others).log_softmax(dim=1))).sum(dim=1).mean())
            expect(cost <= 0.3, f"it costs {cost:.2f} nats on other rows; 0.3 is the most, and 0.2 was the goal")
            gain -= float(model(new).log_softmax(dim=1)[:, 4].mean())
            expect(gain >= 5.0, f"the log probability of four rises by {gain:.2f} on other zeros; 5 is the least")


def check_06(solve: Callable[..., Any]) -> None:
    """The generated tokens alone, of padded prompts."""
    model, batch, v = given.language(4)

    def written(row: Tensor, start: int | None) -> list[int]:
        tokens, prompt = row[None], len(row)

        def hook(module: nn.Module, args: Any, h: Any) -> Any:
            kept = h.clone()
            if start is not None:
                kept[:, prompt + start :] += v
            return kept

        handle = model.model.layers[1].register_forward_hook(hook)
        for _ in range(8):
            tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1].argmax(-1)[None]], dim=1)
        handle.remove()
        return tokens[0, prompt:].tolist()

    prompts = [row[mask.bool()] for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    plain, goal, everywhere = ([written(row, start) for row in prompts] for start in (None, 0, -99))
    result = solve(model, v, {**batch})
    expect(
        isinstance(result, Tensor) and result.shape == (3, 8),
        "solve does not give the 8 new tokens of each of the 3 texts",
    )
    expect(result.tolist() != plain, "the tokens are the unchanged model's")
    expect(result.tolist() != everywhere, "the prompt's tokens are changed too")
    expect(
        result.tolist() == goal,
        "the tokens are not those of each prompt alone, unpadded, with the generated tokens changed",
    )
    expect([written(row, None) for row in prompts] == plain, "the model is not what it was")


def check_07(solve: Callable[..., Any]) -> None:
    """Where it should, and nowhere else."""
    model, (x, kinds), (more, more_kinds) = given.twelve_kinds(3), given.rows(3), given.rows(4)
    threes, fives, rest = x[kinds == 3], x[kinds == 5], x[kinds != 3]
    plain, wanted, before = model(more), more_kinds == 3, weights(model)
    with entered(solve(model, threes, fives, rest)):
        steered = model(more)
        expect_weights(model, before, "inside the block")
    share = float((steered[wanted].argmax(dim=1) == 5).double().mean())
    alone = float((steered == plain).all(dim=1)[~wanted].double().mean())
    expect(share >= 0.9, f"{share:.1%} of the threes are called fives; 90% are to be")
    expect(
        alone >= 0.95,
        f"{alone:.1%} of the other rows of the batch have exactly the answers that they had; 95% are to have",
    )
    expect(torch.equal(model(more), plain), "after the block the network answers otherwise than before")


def check_08(solve: Callable[..., Any]) -> None:
    """Something new, and what was known."""
    model, (x, kinds), (more, more_kinds) = given.twelve_kinds(6, never_saw=11), given.rows(6), given.rows(9)
    old, before, plain = more_kinds != 11, weights(model), model(more)
    known = float((plain.argmax(dim=1) == more_kinds)[old].double().mean())
    with entered(solve(model, x[kinds == 11], x[kinds != 11], kinds[kinds != 11])):
        right = model(more).argmax(dim=1) == more_kinds
        expect_weights(model, before, "inside the block")
    new, kept = float(right[~old].double().mean()), float(right[old].double().mean()) / known
    expect(new >= 0.85, f"{new:.0%} of the new kind are named; 85% are to be")
    expect(kept >= 0.95, f"of the old kinds it names {kept:.1%} as many as before; 95% is the least")
    expect(torch.equal(model(more), plain), "after the block the network answers otherwise than before")


def check_09(solve: Callable[..., Any]) -> None:
    """A score, and a length."""
    model, (x, _), (more, _) = given.twelve_kinds(1), given.rows(1), given.rows(2)

    def score(answers: Tensor) -> Tensor:
        return (answers[:, 2] - answers[:, 7].abs()).mean()

    plain = score(model(more))
    v = solve(model, x, score)
    expect(isinstance(v, Tensor) and v.shape == (64,), "solve does not give a tensor of 64 numbers")
    expect(float(v.norm()) <= 3.001, f"its length is {float(v.norm()):.2f}; 3 is the most")
    slope = torch.zeros(64, requires_grad=True)
    with adding(model, {"1": slope}):
        score(model(more)).backward()
    gains = []
    for direction in (v, 3 * nn.functional.normalize(slope.grad, dim=0)):  # the second: straight up the first slope
        with adding(model, {"1": direction.detach()}):
            gains.append(float(score(model(more)) - plain))
    expect(
        gains[0] >= 1.02 * gains[1],
        f"the score rises by {gains[0]:.2f}; it is to rise by 2% more than the {gains[1]:.2f} along its first slope",
    )


def check_10(solve: Callable[..., Any]) -> None:
    """Compiled once or twice, and steered at each strength."""
    model, (left, right) = given.two_sides(4), given.sides(4)
    v, strengths, compiled, ran = between(model, right, left, "1").float(), [0.0, 0.25, 0.5, 1.0, 2.0], 0, 0

    def compiler(graph: Any, inputs: Any) -> Callable[..., Any]:
        nonlocal compiled
        compiled += 1

        def run(*args: Any) -> Any:
            nonlocal ran
            ran += 1
            return graph.forward(*args)

        return run

    torch.compiler.reset()
    result = solve(model, v, left, [*strengths], compiler)
    torch.compiler.reset()
    expect(isinstance(result, list) and len(result) == 5, "solve does not give a list of the answers at each strength")
    for c, answers in zip(strengths, result, strict=True):
        with adding(model, {"1": v}, c):
            expect(torch.allclose(answers, model(left), atol=1e-4), f"the answers at strength {c} are others")
    expect(ran >= 5, f"compiled code ran {ran} times; at each of the 5 strengths it is to")
    expect(compiled <= 2, f"the compiler was called {compiled} times; twice is the most")


def check_11(solve: Callable[..., Any]) -> None:
    """A plain network with other weights."""
    model, (x, kinds), (more, _) = given.twelve_kinds(8), given.rows(8), given.rows(9)
    v, plain, before = between(model, x[kinds == 4], x[kinds != 4], "1").float(), model(more), weights(model)
    with adding(model, {"1": v}, 1.5):
        goal = model(more)
    other = solve(model, v, 1.5, x)
    expect(isinstance(other, nn.Module) and other is not model, "solve does not give another network")
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())
    plain_classes = all(type(m) is getattr(nn, type(m).__name__, None) for m in other.modules())
    expect(plain_classes and not hooked, "it has hooks, or modules that are not torch's")
    file = io.BytesIO()
    torch.save(other, file)
    expect(b"actsteer" not in file.getvalue(), "who loads it needs this library")
    expect(not torch.allclose(other(more), plain, atol=1e-4), "its answers are the unchanged network's")
    expect(torch.allclose(other(more), goal, atol=1e-3), "its answers are not those of the changed network")
    expect(torch.equal(model(more), plain), "the network that was given answers otherwise than before")
    expect_weights(model, before, "afterwards")


def check_12(script: Path) -> None:
    """The script, mended."""
    model, (left, right) = given.two_sides(), given.sides()
    up, down = right * torch.tensor([0.0, 1.0]), left * torch.tensor([0.0, 1.0])
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "parts").mkdir()
        shutil.copy(HERE / "given.py", folder)
        for name, data in {"left": left, "right": right, "up": up, "down": down}.items():
            torch.save(data, folder / f"{name}.pt")
        done = subprocess.run(["bash", script.resolve()], cwd=folder, capture_output=True, text=True, check=False)
        expect(done.returncode == 0, f"the script ends with an error: {done.stderr.strip()[-500:]}")
        expect((folder / "bank.safetensors").is_file(), "there is no bank.safetensors")
        show = ["actsteer", "show", "bank.safetensors"]
        shown = subprocess.run(show, cwd=folder, capture_output=True, text=True, check=False)
        from actsteer import VectorBank

        bank = {
            concept: {s: v[s] for s in v.sites} for concept, v in VectorBank.load(folder / "bank.safetensors").items()
        }
    expect(set(bank) == {"right", "up"}, f"the bank has {sorted(bank)}; it is to have right and up")
    for concept, sides in {"right": (right, left), "up": (up, down)}.items():
        expect(list(bank[concept]) == ["1"], f"{concept} is at {list(bank[concept])}, not behind the ReLU")
        same = torch.allclose(bank[concept]["1"].double(), between(model, *sides, "1"), atol=1e-4)
        expect(same, f"{concept} is not the difference of the means of its two files")
    expect(shown.stdout.strip() in done.stdout, "the script does not show both")
    expect("python" not in script.read_text(), "it is more than the command line")


def read(answer: Path) -> ModuleType:
    """The answer as a module."""
    spec = importlib.util.spec_from_file_location(answer.stem, answer)
    expect(spec is not None and spec.loader is not None, f"{answer} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(number: int, answer: Path) -> None:
    """Raise Missing unless the answer does what the task asks for."""
    checker = globals()[f"check_{number:02}"]
    expect(answer.is_file(), f"there is no {answer}")
    expect((answer.suffix == ".sh") is (number == 12), "task 12 takes a .sh, all others a .py")
    if number == 12:
        checker(answer)
        return
    names = ("make", "use") if number == 4 else ("solve",)
    module = read(answer)
    for name in names:
        expect(callable(getattr(module, name, None)), f"{answer.name} has no function {name}")
    checker(*(getattr(module, name) for name in names))


def main() -> None:
    """Say whether it passes, by the exit code too."""
    if len(sys.argv) != 3 or not sys.argv[1].isdecimal() or not 1 <= int(sys.argv[1]) <= 12:
        sys.exit("usage: python check.py NUMBER ANSWER, as in: python check.py 3 answer_03.py")
    try:
        check(int(sys.argv[1]), Path(sys.argv[2]))
    except Missing as missing:
        sys.exit(f"{sys.argv[1]}: missing: {missing}")
    print(f"{sys.argv[1]}: pass")


if __name__ == "__main__":
    main()
