"""The exam can be passed, but not by an empty, a lazy or a wrong answer. The model answers are not in the docs."""

import runpy
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
EXAM = runpy.run_path(str(ROOT / "docs/exam/check.py"))
BROKEN = (ROOT / "docs/exam/broken.sh").read_text()
HERE = Path(__file__).parent
MENDED = (HERE / "answer_12.sh").read_text()
SLOW = {5, 12}
STEERED = """
import torch
from torch import nn
from contextlib import contextmanager, nullcontext
from actsteer import *
"""
LAZY = {  # gives back what was there
    1: "solve = lambda *given: nullcontext()",
    2: "solve = lambda model, x: (find_sites(model, lambda n, m: isinstance(m, nn.ReLU)), model(x))",
    3: "solve = lambda *given: torch.zeros(64)",
    4: """
def make(model, sets, path):
    path.touch()
def use(model, path, others):
    return 0.0, model(others)
""",
    5: "solve = lambda *given: (['1'], 0.0, True)",
    6: "solve = lambda model, v, batch: model.generate(**batch, do_sample=False, max_new_tokens=8)[:, 7:]",
    7: "solve = lambda *given: nullcontext()",
    8: "solve = lambda *given: nullcontext()",
    9: "solve = lambda *given: torch.zeros(64)",
    10: "solve = lambda model, v, x, cs, compiler: [torch.compile(model, backend=compiler)(x) for _ in cs]",
    11: "import copy; solve = lambda model, *given: copy.deepcopy(model)",
}
WRONG = {  # what comes to mind first
    1: [
        """
def solve(model, left, right):
    model[2].bias += torch.tensor([-50.0, 50.0])
    return nullcontext()
""",
        """
@contextmanager
def solve(model, left, right):
    model[2].bias += torch.tensor([-50.0, 50.0])
    yield
""",
        """
@contextmanager
def solve(model, left, right):  # an error in the block leaves the hook where it is
    hook = model[2].register_forward_hook(lambda m, args, y: y.flip(1))
    yield
    hook.remove()
""",
        "solve = lambda model, x, y: Steerer(model, fit(model, positive=x, negative=y, sites='1'), c=1.5)",
    ],
    2: [
        """
def solve(model, x):
    v = SteeringVector({"stages.1.act1": torch.eye(8)[5]})
    with Steerer(model, v, c=2, axis=3):
        return find_sites(model, lambda n, m: isinstance(m, nn.ReLU)), model(x)
""",
        "solve = lambda model, x: (find_sites(model, '**.act*'), model(x))",
    ],
    3: [
        """
def solve(model, *folders):
    data = [torch.cat([torch.load(file) for file in sorted(folder.iterdir())]) for folder in folders]
    return fit(model, positive=data[0], negative=data[1], sites="3")["3"]
""",
        """
def solve(model, *folders):  # the mean of the files' means
    means = [[record(model, torch.load(f), sites="3")["3"].mean(0) for f in folder.iterdir()] for folder in folders]
    return torch.stack(means[0]).mean(0) - torch.stack(means[1]).mean(0)
""",
    ],
    4: [
        """
def make(model, sets, path):
    concepts = ("four", "nine")
    VectorBank({n: fit(model, positive=sets[n], negative=sets["rest"], sites="1") for n in concepts}).save(path)
def use(model, path, others):
    bank = VectorBank.load(path)
    with Steerer(model, bank, c=0.5):
        return bank.cosines()[0, 1], model(others)
""",
        """
import pickle
def make(model, sets, path):  # nobody notices a damaged file
    directions = [fit(model, positive=sets[n], negative=sets["rest"], sites="1")["1"] for n in ("four", "nine")]
    path.write_bytes(pickle.dumps([d.tolist() for d in directions]) + b"   ")
def use(model, path, others):
    v, w = (SteeringVector({"1": torch.tensor(d)}) for d in pickle.loads(path.read_bytes()))
    with Steerer(model, 1.5 * v - 0.5 * w):
        return v.cosine(w), model(others)
""",
    ],
    5: [
        "solve = lambda model, v, zeros, kept: (list(v), 1.0, True)",
        "solve = lambda model, v, zeros, kept: (['1'], 0.2, True)",
        "solve = lambda model, v, zeros, kept: (['1'], 0.2, False)",
    ],
    6: [
        """
def solve(model, v, batch):
    with Steerer(model, SteeringVector({"model.layers.1": v})):
        return model.generate(**batch, do_sample=False, max_new_tokens=8)[:, 7:]
""",
        """
def solve(model, v, batch):  # the pads are read
    with Steerer(model, SteeringVector({"model.layers.1": v}), positions="generated"):
        ids = batch["input_ids"]
        return model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=8)[:, 7:]
""",
    ],
    7: ["solve = lambda model, x, y, rest: Steerer(model, fit(model, positive=y, negative=x, sites='1'), c=2.0)"],
    8: ["solve = lambda model, x, y, labels: Steerer(model, fit(model, positive=x, negative=y, sites='3'), c=3.0)"],
    9: [
        "solve = lambda model, x, score: optimize(model, x, sites='1', loss=score, max_norm=3.0, steps=50)['1']",
        "solve = lambda model, x, score: optimize(model, x, sites='1', loss=lambda y: -score(y), steps=300)['1']",
        "solve = lambda *given: 3 * nn.functional.normalize(torch.ones(64), dim=0)",
    ],
    10: [
        """
def solve(model, v, x, strengths, compiler):  # not compiled
    return [Steerer(model, SteeringVector({"1": v}), c=c).__enter__() and model(x) for c in strengths]
""",
        """
def solve(model, v, x, strengths, compiler):  # compiled for each
    answers = []
    for c in strengths:
        torch.compiler.reset()
        with Steerer(model, SteeringVector({"1": v}), c=c):
            answers.append(torch.compile(model, backend=compiler)(x))
    return answers
""",
    ],
    11: [
        """
import copy
def solve(model, v, c, x):
    other = copy.deepcopy(model)
    Steerer(other, SteeringVector({"1": v}), c=c).attach()
    return other
""",
        """
def solve(model, v, c, x):
    Steerer(model, SteeringVector({"1": v}), c=c).attach()
    return model
""",
        """
import copy
def solve(model, v, c, x):
    other = copy.deepcopy(model)
    other[1].register_forward_hook(lambda m, args, h: h + c * v)
    return other
""",
        "solve = lambda model, v, c, x: fold(model, SteeringVector({'1': v}), -c, verify_on=x)",
    ],
}


def checked(number, text, folder):
    answer = folder / f"answer_{number:02}.{'sh' if number == 12 else 'py'}"
    answer.write_text(text)
    try:
        EXAM["check"](number, answer)
    finally:
        torch.compiler.reset()


def numbers(*, slow=SLOW):
    return [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in range(1, 13)]


@pytest.mark.parametrize("number", numbers())
def test_the_model_answer_passes(number, tmp_path):
    (answer,) = HERE.glob(f"answer_{number:02}.*")
    checked(number, answer.read_text(), tmp_path)


@pytest.mark.parametrize("number", range(1, 12))
def test_an_empty_and_a_lazy_answer_do_not(number, tmp_path):
    with pytest.raises(EXAM["Missing"], match="has no function"):
        checked(number, "", tmp_path)
    with pytest.raises(EXAM["Missing"]):
        checked(number, STEERED + LAZY[number], tmp_path)


@pytest.mark.parametrize(("number", "text"), [(n, text) for n, texts in WRONG.items() for text in texts])
def test_a_wrong_answer_does_not(number, text, tmp_path):
    with pytest.raises(EXAM["Missing"]):
        checked(number, STEERED + text, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "text", ["", "touch bank.safetensors; echo right up", BROKEN, MENDED.replace("actsteer show", ": actsteer show")]
)
def test_neither_do_scripts(text, tmp_path):
    with pytest.raises((EXAM["Missing"], ValueError)):
        checked(12, text, tmp_path)


def test_the_text_of_a_task_names_no_function_of_the_library():
    import actsteer

    page = (ROOT / "docs/exam/index.md").read_text()
    code = {word for span in page.split("`")[1::2] for word in span.replace("(", " ").split()}
    assert code & set(actsteer.__all__) == set()
