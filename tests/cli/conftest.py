"""A folder with a tiny language model, its tokenizer, texts and a torch model; and the installed command."""

import shutil
import signal
from importlib.metadata import entry_points

import pytest
import torch

from tests.zoo import llama

WORDS = ["<unk>", "<s>", "</s>", "I", "love", "hate", "this", "that", "day", "is", "good", "bad", "very", "the"]
WORDS += ["weather", "calm"]
NETS = '''
"""A torch model, as a user has it."""
import torch
from torch import nn


def build():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))


built = build()
number = 3
needs = None


def broken():
    import a_module_that_is_not_there


def asks(what):
    return built


def other():
    return nn.Sequential(nn.Linear(5, 2))


def without_biases():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(4, 2), nn.Linear(4, 2), nn.Identity()

    def forward(self, x=None, y=None):
        return self.c((0 if x is None else self.a(x)) + (0 if y is None else self.b(y)))
'''


ESTIMATORS = '''
"""Estimators, as a user has them."""
from actsteer import ConceptErasure, SteeringVector


class Signs:
    reads = "means"

    def __call__(self, *, positive, negative):
        return SteeringVector({site: (positive[site].mean - negative[site].mean).sign() for site in positive})


class Unready:
    def __call__(self, *, positive, negative):
        pass


ready, erasure = Signs(), ConceptErasure


class Needs(Signs):
    def __init__(self, what):
        pass
'''


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """A folder with everything, made once; nobody writes into it."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("models")
    own = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    own.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=own, unk_token="<unk>", eos_token="</s>")
    tokenizer.chat_template = "{% for m in messages %}day {{ m['content'] }}{% endfor %}"
    model = llama(vocab_size=len(WORDS)).float()
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    (folder / "love.txt").write_text("I love this day\n\nI love the weather very\nthis is good\n")
    (folder / "hate.txt").write_text("I hate this day\nI hate the weather\nthis is bad\n")
    (folder / "nets.py").write_text(NETS)
    (folder / "own").mkdir()
    (folder / "own" / "estimators.py").write_text(ESTIMATORS)
    generator = torch.Generator().manual_seed(0)
    torch.save(torch.randn(6, 4, generator=generator) + 1, folder / "right.pt")
    torch.save(torch.randn(6, 4, generator=generator) - 1, folder / "left.pt")
    return folder


@pytest.fixture
def folder(models, tmp_path, monkeypatch):
    """A copy of it, as the current folder."""
    shutil.copytree(models, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.syspath_prepend(tmp_path / "here")
    monkeypatch.setenv("COLUMNS", "300")
    return tmp_path / "here"


class Done:
    """What a command left behind: its exit code, and what it wrote."""

    def __init__(self, code, captured):
        self.code, self.out, self.err = code, captured.out, captured.err

    @property
    def lines(self):
        return [line.split() for line in self.out.splitlines()]


@pytest.fixture
def run(folder, monkeypatch, capsys):
    """The installed entry point, called with arguments as the shell would."""
    (script,) = entry_points(group="console_scripts", name="actsteer")

    def call(*arguments):
        monkeypatch.setattr("sys.argv", ["actsteer", *map(str, arguments)])
        monkeypatch.setattr("sys.path", [*__import__("sys").path])
        capsys.readouterr()
        handler = signal.getsignal(signal.SIGINT)
        try:
            script.load()()
            code = 0
        except SystemExit as left:
            code = left.code or 0
        finally:
            signal.signal(signal.SIGINT, handler)  # of pytest, which goes on
            __import__("sys").modules.pop("nets", None)
        return Done(code, capsys.readouterr())

    return call
