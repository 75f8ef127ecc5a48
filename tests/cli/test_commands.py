"""The commands, each as a user calls it, and against what the library itself gives."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actsteer import (
    Affine,
    AtSites,
    Clamp,
    ConceptErasure,
    KeepNorm,
    LowRank,
    MeanDifference,
    ProjectionAbove,
    Steerer,
    Steering,
    SteeringVector,
    VectorBank,
    collect,
    fit,
)
from actsteer.cli import screen
from actsteer.collecting.texts import text_batches
from tests.cli.test_main import shell

SITE = "model.layers.1"
REPENG = Path(__file__).parent.parent / "files/data/repeng.gguf"


def causal(folder, name="llama"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / name).eval()


def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder / "llama")


@pytest.fixture
def bank(folder):
    """Two concepts at one block of the llama."""
    model, generator = causal(folder), torch.Generator().manual_seed(3)
    for name in ("love", "calm"):
        v = SteeringVector({SITE: torch.randn(16, generator=generator)}, concept=name)
        v.save(folder / f"{name}.safetensors", model=model)
    both = VectorBank.load(folder / "[lc]*.safetensors")
    both.save(folder / "bank.safetensors")
    return both


# --- sites -------------------------------------------------------------------------------------------------------
def test_sites_of_a_directory_without_its_weights(run, folder):
    for weights in (folder / "llama").glob("*.safetensors"):
        weights.unlink()
    done = run("sites", "llama", "model.layers.*.mlp.**")
    assert done.code == 0
    assert done.lines[0] == ["site", "class", "features"]
    assert ["model.layers.2.mlp.down_proj", "Linear", "16"] in done.lines
    assert all(line[0].startswith("model.layers.") for line in done.lines[1:])


def test_sites_of_a_torch_model(run):
    for name in ("nets:build", "nets:built"):
        done = run("sites", name)
        assert done.lines == [["site", "class", "features"], ["0", "Linear", "8"], ["1", "ReLU"], ["2", "Linear", "3"]]
    assert run("sites", "nets:build", "0:in").lines[1] == ["0:in", "Linear", "4"]


def test_sites_leaves_out_what_is_never_called(run):
    done = run("sites", "llama")
    names = [line[0] for line in done.lines]
    assert "model.layers" not in names
    assert "model.layers.0" in names


def test_a_pattern_that_selects_nothing_names_what_is_close(run):
    done = run("sites", "llama", "model.layer.0")
    assert done.code == 1
    assert done.err.startswith("error: ")
    assert "'model.layers.0'" in done.err
    assert done.out == ""


# --- fit ---------------------------------------------------------------------------------------------------------
def test_fit_on_texts_is_fit(run, folder):
    done = run(
        "fit", "-m", "llama", "--positive", "love.txt", "--negative", "hate.txt", "--sites", SITE, "-o", "v.safetensors"
    )
    assert done.code == 0, done.err
    sides = [
        text_batches(tokenizer(folder), [line for line in (folder / name).read_text().splitlines() if line])
        for name in ("love.txt", "hate.txt")
    ]
    model = causal(folder)
    expected = fit(
        model, positive=sides[0], negative=sides[1], sites=SITE, estimator=MeanDifference(), positions="last"
    )
    found = SteeringVector.load(folder / "v.safetensors", model)
    assert found.equal(expected)
    assert found.concept == "love"
    assert found.metadata["estimator"] == "MeanDifference"
    assert ["love", SITE, "16", f"{float(expected.norm()):.4g}"] in done.lines


@pytest.mark.parametrize(
    ("options", "keywords"),
    [
        (["--positions", "all"], {"positions": "all"}),
        (["--positions", "0"], {"positions": 0}),
        (["--positions", "1:3"], {"positions": slice(1, 3)}),
        (["--batch-size", "1"], {"positions": "last"}),
    ],
)
@pytest.mark.filterwarnings("ignore:the vector is zero")  # of the first token of all texts
def test_positions_and_batches(run, folder, options, keywords):
    files = ["--positive", "love.txt", "--negative", "hate.txt"]
    assert run("fit", "-m", "llama", *files, "--sites", SITE, "-o", "v.safetensors", *options).code == 0
    sides = [
        text_batches(tokenizer(folder), [line for line in (folder / name).read_text().splitlines() if line])
        for name in ("love.txt", "hate.txt")
    ]
    expected = fit(causal(folder), positive=sides[0], negative=sides[1], sites=SITE, **keywords)
    assert SteeringVector.load(folder / "v.safetensors").allclose(expected, atol=1e-5)


def test_conversations_go_through_the_chat_template(run, folder):
    for name, word in (("a", "love"), ("b", "hate")):
        lines = [json.dumps([{"role": "user", "content": f"I {word} this"}]), json.dumps(f"very {word}")]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    files = ["--positive", "a.jsonl", "--negative", "b.jsonl", "--concept", "warm"]
    assert run("fit", "-m", "llama", *files, "--sites", SITE, "-o", "v.safetensors", "--chat").code == 0
    texts = [[f"day I {word} this", f"day very {word}"] for word in ("love", "hate")]
    sides = [text_batches(tokenizer(folder), own) for own in texts]
    expected = fit(causal(folder), positive=sides[0], negative=sides[1], sites=SITE, positions="last")
    found = SteeringVector.load(folder / "v.safetensors")
    assert found.allclose(expected, atol=1e-6)
    assert found.concept == "warm"


@pytest.mark.parametrize(
    "estimator",
    ["MeanDifference", "WhitenedMeanDifference", "PrincipalDirection", "RidgeDirection", "LogisticDirection"],
)
def test_fit_on_tensors_with_every_estimator(run, folder, estimator):
    import nets

    import actsteer

    files = ["--positive", "right.pt", "--negative", "left.pt", "--sites", "1", "--sites", "2"]
    done = run("fit", "-m", "nets:build", *files, "--estimator", estimator, "-o", "v.safetensors")
    assert done.code == 0, done.err
    sides = {"positive": torch.load("right.pt"), "negative": torch.load("left.pt")}
    expected = fit(nets.build(), **sides, sites=["1", "2"], estimator=getattr(actsteer, estimator)())
    assert SteeringVector.load(folder / "v.safetensors").allclose(expected, atol=1e-5)


@pytest.mark.parametrize("name", ["Signs", "ready"])
def test_fit_with_an_estimator_of_the_users(run, folder, name):
    import nets

    files = ["--positive", "right.pt", "--negative", "left.pt", "--sites", "1"]
    done = run("fit", "-m", "nets:build", *files, "--estimator", f"own.estimators:{name}", "-o", "v.safetensors")
    assert done.code == 0, done.err
    from own.estimators import Signs

    sides = {"positive": torch.load("right.pt"), "negative": torch.load("left.pt")}
    expected = fit(nets.build(), **sides, sites="1", estimator=Signs())
    found = SteeringVector.load(folder / "v.safetensors", nets.build())
    assert found.equal(expected) and found.concept == "right"
    assert found.metadata["estimator"] == "own.estimators:Signs"
    assert ["right", "own.estimators:Signs", "Sequential:67:"] in [
        [*line[:2], line[2][:14]] for line in run("show", "v.safetensors").lines if len(line) == 3
    ]


@pytest.mark.parametrize(
    ("name", "code", "why"),
    [
        ("Median", 2, "Median: expected MeanDifference, WhitenedMeanDifference, .*, or yours as module:Class"),
        ("own.estimators:Nothing", 2, "'own.estimators' has no 'Nothing'"),
        ("own.nothing:Signs", 2, "no module 'own.nothing' here or installed; expected module:Class"),
        ("own.estimators:Unready", 2, "expected an object with `reads`, one of 'means'"),
        ("own.estimators:Needs", 1, "own.estimators:Needs raised TypeError: .*'what'"),
        ("nets:number", 2, "expected an object with `reads`.*got int"),
    ],
)
def test_an_estimator_that_cannot_be_had_is_named_before_any_work(run, folder, monkeypatch, name, code, why):
    monkeypatch.setattr("actsteer.cli.models.load", lambda *_, **__: pytest.fail("it began to work"))
    files = ["--positive", "right.pt", "--negative", "left.pt", "--sites", "1"]
    done = run("fit", "-m", "nets:build", *files, "--estimator", name, "-o", "v.safetensors")
    assert done.code == code
    assert re.search(why, " ".join(done.err.split()))


def test_an_edit_is_written_too(run, folder):
    files = ["--positive", "right.pt", "--negative", "left.pt", "--sites", "1"]
    done = run("fit", "-m", "nets:build", *files, "--estimator", "own.estimators:erasure", "-o", "v.safetensors")
    assert done.code == 0, done.err
    assert "intervention: LowRank(rank=1, sites=('1',), concept='right')" in done.out
    import nets

    model, (right, left) = nets.build(), (torch.load(f"{side}.pt") for side in ("right", "left"))
    expected = fit(model, positive=right, negative=left, sites="1", estimator=ConceptErasure())
    with torch.no_grad(), Steerer(model, expected):
        steered = model(right)
    with torch.no_grad(), Steerer(model, LowRank.load("v.safetensors", model)):
        assert torch.allclose(model(right), steered, atol=1e-6)
    assert run("verify", "v.safetensors", "-m", "nets:build", "--on", "right.pt").code == 0
    done = run("fit", "-m", "nets:build", *files, "--estimator", "own.estimators:erasure", "-o", "v.gguf")
    assert done.code == 1 and "this format holds vectors alone" in done.err
    assert not (folder / "v.gguf").exists()


def test_inputs_by_name_and_in_safetensors(run, folder):
    for side in ("right", "left"):
        save_file({"input": torch.load(f"{side}.pt")}, f"{side}.safetensors")
        torch.save({"input": torch.load(f"{side}.pt")}, f"{side}_named.pt")
    for number, suffix in enumerate((".pt", ".safetensors", "_named.pt")):
        files = ["--positive", f"right{suffix}", "--negative", f"left{suffix}", "--concept", "right"]
        assert run("fit", "-m", "nets:build", *files, "--sites", "1", "-o", f"{number}.safetensors").code == 0
    one, two, three = (SteeringVector.load(folder / f"{number}.safetensors") for number in range(3))
    assert one.allclose(two)
    assert one.allclose(three)


def test_a_control_vector_at_once(run, folder):
    files = ["--positive", "love.txt", "--negative", "hate.txt", "--sites", SITE]
    assert run("fit", "-m", "llama", *files, "-o", "v.gguf").code == 0
    assert SteeringVector.load(folder / "v.gguf").sites == (SITE,)


def test_fit_says_what_is_wrong_before_any_work(run, folder, monkeypatch):
    monkeypatch.setattr("actsteer.cli.models.load", lambda *_, **__: pytest.fail("it began to work"))
    files = ["--positive", "love.txt", "--negative", "hate.txt", "--sites", SITE]
    done = run("fit", "-m", "llama", *files, "-o", "v.pt")
    assert done.code == 2
    assert "v.pt: expected a name with .safetensors or .gguf" in done.err
    done = run("fit", "-m", "llama", *files, "-o", "nowhere/v.gguf")
    assert done.code == 2
    assert "there is no folder nowhere" in done.err
    assert run("fit", "-m", "llama", *files, "-o", "nowhere/v.gguf", "--device", "nowhere").code == 2
    done = run("fit", "-m", "n:b", "--positive", "v.safetensors", *files[2:], "-o", "v.safetensors")
    assert done.code == 2  # there is no such file
    for name in ("generate", "fold", "verify", "show", "convert"):
        options = {
            "generate": ["-m", "llama", "-b", "none.gguf", "-c", "1", "I"],
            "fold": ["-m", "llama", "-b", "none.gguf", "-c", "1", "--verify-on", "love.txt", "-o", "new"],
            "verify": ["none.gguf", "-m", "llama"],
            "show": ["none.gguf", "-m", "llama"],
            "convert": ["none.gguf", "new.gguf", "-m", "llama"],
        }
        done = run(name, *options[name])
        assert done.code == 2
        assert "none.gguf: there is no such file" in done.err
    done = run("verify", "love.txt", "-m", "llama", "--on", "love.txt", "--folded", "none.safetensors")
    assert done.code == 2
    assert "none.safetensors: there is no such file" in done.err
    done = run("fit", "-m", "llama", *files, "-o", "v.gguf", "--positions", "some")
    assert done.code == 2
    assert "--positions" in done.err


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("none.txt", None, "does not exist"),
        ("a.csv", b"x", "expected texts, .txt or .jsonl, or tensors"),
        ("a.txt", b"\n \n", "one or more texts"),
        ("a.jsonl", b'"I"\n\n3\n', "line 3: expected a string, or messages"),
        ("a.jsonl", b'[{"role": "user"}]', "expected a string, or messages"),
        ("a.jsonl", b'[{"role": "user", "content": "I"}]', "which need --chat"),
        ("a.jsonl", b"{", "Expecting property name"),
        ("a.txt", b"\xff\xfe", "can't decode"),
        ("a.pt", b"nothing", "nothing is unpickled beside them"),
        ("a.safetensors", b"nothing", "a.safetensors"),
    ],
)
def test_examples_that_cannot_be_read(run, folder, name, content, why):
    if content is not None:
        (folder / name).write_bytes(content)
    done = run("fit", "-m", "llama", "--positive", name, "--negative", "hate.txt", "--sites", SITE, "-o", "v.gguf")
    assert done.code == 2
    assert why in done.err
    assert not (folder / "v.gguf").exists()


def test_examples_are_not_unpickled(run, folder):
    class Evil:
        def __reduce__(self):
            return open, (str(folder / "made"), "w")

    torch.save({"input": Evil()}, folder / "evil.pt")
    done = run(
        "fit", "-m", "nets:build", "--positive", "evil.pt", "--negative", "left.pt", "--sites", "1", "-o", "v.gguf"
    )
    assert done.code == 2
    assert "nothing is unpickled beside them" in done.err
    assert not (folder / "made").exists()


def test_texts_for_a_model_without_a_tokenizer(run):
    files = ["--positive", "love.txt", "--negative", "hate.txt", "--sites", "1"]
    done = run("fit", "-m", "nets:build", *files, "-o", "v.safetensors")
    assert done.code == 1
    assert "has no tokenizer, and texts need one; give tensors" in done.err


# --- show --------------------------------------------------------------------------------------------------------
def test_show_has_norms_and_interference(run, bank):
    done = run("show", "bank.safetensors")
    assert done.code == 0
    for concept, vector in bank.items():
        assert [concept, SITE, "16", f"{float(vector.norm()):.4g}"] in done.lines
    assert ["calm", "love", f"{float(bank['calm'].cosine(bank['love'])):+.3f}"] in done.lines


def test_show_a_pattern_and_one_concept(run, bank):
    assert run("show", "[lc]*.safetensors").out == run("show", "bank.safetensors").out
    done = run("show", "bank.safetensors", "--concept", "love")
    assert "calm" not in done.out
    assert "interference" not in done.out
    done = run("show", "bank.safetensors", "--concept", "lov")
    assert done.code == 1
    assert "'love'" in done.err


def test_show_the_strongest_of_many_pairs_first(run, folder):
    rows = torch.eye(8)
    rows[3] = rows[2] + 0.1 * rows[3]
    rows[7] = 0
    VectorBank({f"k{i}": SteeringVector({"1": row}) for i, row in enumerate(rows)}).save(folder / "many.safetensors")
    done = run("show", "many.safetensors")
    (start,) = (i for i, line in enumerate(done.lines) if line[:1] == ["interference"])
    assert done.lines[start + 1] == ["k2", "k3", "+0.995"]
    assert done.lines[-1] == ["and", "1", "pairs", "that", "interfere", "less"]
    assert "k7" not in " ".join(" ".join(line) for line in done.lines[start:])


def test_show_names_the_sites_for_a_model(run, folder):
    torch.save(torch.ones(3, 16), folder / "rows.pt")
    assert run("show", "rows.pt").code == 1
    done = run("show", "rows.pt", "--model", "llama")
    assert [line[1] for line in done.lines[1:4]] == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_a_damaged_file_is_refused(run, folder, bank):
    content = bytearray((folder / "bank.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "bank.safetensors").write_bytes(content)
    done = run("show", "bank.safetensors")
    assert done.code == 1
    assert "SHA-256" in done.err
    assert done.out == ""


# --- generate ----------------------------------------------------------------------------------------------------
def continued(folder, prompt, bank, c, **options):
    model, own = causal(folder), tokenizer(folder)
    ids = own(prompt, return_tensors="pt")
    with Steerer(model, bank, c=c, **options):
        out = model.generate(
            ids["input_ids"], attention_mask=ids["attention_mask"], max_new_tokens=5, do_sample=False, pad_token_id=2
        )
    return own.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def texts(done):
    """The lines that say something: prompts, strengths, and what was made of them."""
    return [line.strip() for line in done.out.splitlines() if line.strip()]


@pytest.mark.parametrize("options", [[], ["--positions", "prompt"]])
def test_generate_plain_and_then_at_every_strength(run, folder, bank, options):
    done = run(
        "generate",
        "-m",
        "llama",
        "-b",
        "bank.safetensors",
        "-c",
        "2",
        "-c",
        "-4",
        "I love",
        "this day",
        "--max-new-tokens",
        5,
        *options,
    )
    assert done.code == 0, done.err
    where = {"positions": options[-1]} if options else {}
    expected = []
    for prompt in ("I love", "this day"):
        expected.append(prompt)
        for c in (0.0, 2.0, -4.0):
            expected += [f"c = {c:g}", continued(folder, prompt, bank, c, **where)]
    assert texts(done) == expected
    assert len(set(expected[2:7:2])) > 1


def test_generate_with_a_strength_for_each_concept(run, folder, bank):
    done = run(
        "generate", "-m", "llama", "-b", "bank.safetensors", "-c", "love=3", "-c", "calm=-2", "I", "--max-new-tokens", 5
    )
    both = {"love": 3.0, "calm": -2.0}
    plain, steered = continued(folder, "I", bank, 0.0), continued(folder, "I", bank, both)
    assert texts(done) == ["I", "c = 0", plain, "c = love 3, calm -2", steered]
    done = run(
        "generate", "-m", "llama", "-b", "bank.safetensors", "--concept", "calm", "-c", "1", "I", "--max-new-tokens", 5
    )
    assert texts(done)[-1] == continued(folder, "I", bank.select("calm"), 1.0)


def test_what_is_made_is_printed_while_it_is_made(run, folder, bank, monkeypatch):
    whole = continued(folder, "I", bank, 0.0)
    own, parts = screen.write, []

    def write(text):
        own(text)
        parts.append(text)
        if len("".join(parts).split()) == 3:
            raise KeyboardInterrupt  # before the fourth word

    monkeypatch.setattr(screen, "write", write)
    done = run("generate", "-m", "llama", "-b", "bank.safetensors", "-c", "1", "I", "--max-new-tokens", 5)
    assert done.code == 130
    assert texts(done) == ["I", "c = 0", " ".join(whole.split()[:3])]
    assert len(whole.split()) > 3


@pytest.mark.parametrize("beams", [1, 2])
def test_what_is_printed_is_the_text_with_its_lines_and_without_what_controls(run, folder, bank, beams):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = [f"w{i}{ending}" for i, ending in enumerate(4 * ["\x1b[31m", "\n", "!\r", "é"])]
    odd = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({w: i for i, w in enumerate(words)}, words[0])))
    odd.save_pretrained(folder / "llama")
    model = causal(folder)
    model.generation_config.num_beams = beams
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder / "llama")
    done = run("generate", "-m", "llama", "-b", "bank.safetensors", "-c", "8", words[0], "--max-new-tokens", 12)
    assert done.code == 0, done.err
    ids = torch.tensor([[0]])
    expected = f"{words[0]}\n"
    for c in (0.0, 8.0):
        with Steerer(model, bank, c=c):
            made = model.generate(ids, attention_mask=ids + 1, max_new_tokens=12, do_sample=False)
        expected += f"c = {c:g}\n{odd.decode(made[0, 1:])}\n\n"
    assert done.out == expected.replace("\x1b", "\\x1b").replace("\r", "\\x0d")
    assert "\\x1b" in done.out


@pytest.mark.parametrize("beams", [1, 3])
def test_a_decoder_s_own_start_is_no_text(run, folder, beams):
    model = t5(folder)
    model.generation_config.num_beams = beams
    model.generation_config.decoder_start_token_id = model.config.decoder_start_token_id = 3  # a word like others
    model.save_pretrained(folder / "t5")
    v = SteeringVector({"encoder.block.0.layer.1.DenseReluDense.wi": torch.ones(24)})
    v.save(folder / "v.safetensors", model=model)
    done = run("generate", "-m", "t5", "-b", "v.safetensors", "-c", "2", "I love", "--max-new-tokens", 4)
    assert done.code == 0, done.err
    ids, expected = tokenizer(folder)("I love", return_tensors="pt")["input_ids"], ["I love"]
    for c in (0.0, 2.0):
        with Steerer(model, v, c=c):
            made = model.generate(ids, attention_mask=ids * 0 + 1, max_new_tokens=4, do_sample=False)
        expected += [f"c = {c:g}", tokenizer(folder).decode(made[0, 1:], skip_special_tokens=True)]
    assert texts(done) == [line for line in expected if line]


def test_generate_at_a_temperature_repeats_with_its_seed(run, bank):
    same = [
        "generate",
        "-m",
        "llama",
        "-b",
        "bank.safetensors",
        "-c",
        "1",
        "I",
        "--temperature",
        "2",
        "--max-new-tokens",
        8,
    ]
    one, two, other = run(*same, "--seed", 1), run(*same, "--seed", 1), run(*same, "--seed", 2)
    assert one.out == two.out != other.out


@pytest.mark.parametrize(
    ("options", "code", "why"),
    [
        (["-c", "much"], 2, "expected a number, or concept=number"),
        (["-c", "lov=1"], 1, "'love'"),
        (["-c", "nan"], 1, "nan"),
        (["-c", "1", "--concept", "hate"], 1, "no concept 'hate'"),
        ([], 2, "the file holds vectors alone, and no strength; give one"),
    ],
)
def test_generate_refuses_strengths_it_cannot_apply(run, bank, options, code, why):
    done = run("generate", "-m", "llama", "-b", "bank.safetensors", *options, "I")
    assert done.code == code
    assert why in done.err
    assert done.out == ""


def test_generate_with_a_model_that_does_not(run, folder):
    SteeringVector({"1": torch.ones(8)}).save(folder / "v.safetensors")
    done = run("generate", "-m", "nets:build", "-b", "v.safetensors", "-c", "1", "I")
    assert done.code == 1
    assert "generates no text" in done.err


def test_a_bank_of_another_model_is_refused_and_of_other_weights_warned_about(run, folder, bank):
    from tests.zoo import llama

    llama(vocab_size=16, hidden_size=32).float().save_pretrained(folder / "wide")
    tokenizer(folder).save_pretrained(folder / "wide")
    done = run("generate", "-m", "wide", "-b", "bank.safetensors", "-c", "1", "I")
    assert done.code == 1
    assert "was made for a LlamaForCausalLM" in done.err
    model = causal(folder)
    with torch.no_grad():
        model.lm_head.weight += 0.5
    model.save_pretrained(folder / "llama")
    done = run("generate", "-m", "llama", "-b", "bank.safetensors", "-c", "1", "I", "--max-new-tokens", 2)
    assert done.code == 0
    assert done.err.startswith("warning: ")
    assert "other weights" in done.err


# --- convert -----------------------------------------------------------------------------------------------------
def test_convert_there_and_back(run, folder, bank):
    assert run("convert", "love.safetensors", "love.gguf").code == 0
    assert run("convert", "love.gguf", "back.safetensors").code == 0
    back = SteeringVector.load(folder / "back.safetensors")
    assert back.equal(bank["love"])
    assert back.metadata == bank["love"].metadata


def test_convert_several_into_one_and_one_out_of_several(run, folder, bank):
    done = run("convert", "[lc]*.safetensors", "both.safetensors")
    assert done.out == "2 concepts written to both.safetensors: calm, love\n"
    assert VectorBank.load(folder / "both.safetensors")["love"].equal(bank["love"])
    done = run("convert", "both.safetensors", "one.gguf")
    assert done.code == 1
    assert "a GGUF file holds one vector" in done.err
    assert run("convert", "both.safetensors", "one.gguf", "--concept", "calm").code == 0
    assert SteeringVector.load(folder / "one.gguf").equal(bank["calm"])


def test_convert_with_offsets(run, folder):
    torch.save(torch.arange(4 * 16.0).reshape(4, 16), folder / "rows.pt")  # of hidden_states, the embeddings first
    assert run("convert", "rows.pt", "v.safetensors", "--model", "llama", "--source-offset", 1).code == 0
    v = SteeringVector.load(folder / "v.safetensors")
    assert v.sites == ("model.layers.0:in", "model.layers.0", "model.layers.1", "model.layers.2")
    v.select("model.layers.0").save(folder / "w.safetensors")
    assert run("convert", "w.safetensors", "w.gguf").code == 1
    assert run("convert", "w.safetensors", "w.gguf", "--target-offset", 1).code == 0
    done = run("convert", "w.safetensors", "x.safetensors", "--target-offset", 1)
    assert done.code == 2
    assert "only a .gguf numbers the blocks" in done.err


def test_convert_needs_a_model_that_names_the_blocks(run, folder):
    torch.save(torch.ones(3, 16), folder / "rows.pt")
    done = run("convert", "rows.pt", "v.safetensors")
    assert done.code == 1
    assert "model=" in done.err
    assert not (folder / "v.safetensors").exists()


def test_convert_writes_over_what_it_made_and_nothing_else(run, folder, bank):
    for target in ("love.gguf", "copy.safetensors"):
        for _ in range(2):  # once more when it is there
            assert run("convert", "love.safetensors", target).code == 0
        assert SteeringVector.load(folder / target).equal(bank["love"])
    others = {
        "weights.safetensors": lambda path: save_file({"weight": torch.ones(2)}, path),
        "stats.safetensors": collect(causal(folder), torch.tensor([[3]]), sites=SITE, progress=False).save,
        "lite.safetensors": lambda path: save_file({"layer1.v": torch.ones(16)}, path),
        "text.safetensors": lambda path: path.write_text("mine"),
        "text.gguf": lambda path: path.write_text("mine"),
        "theirs.gguf": lambda path: path.write_bytes(REPENG.read_bytes()),
        "empty.gguf": Path.touch,
    }
    for name, write in others.items():
        write(folder / name)
        before = (folder / name).read_bytes()
        done = run("convert", "love.safetensors", name)
        assert done.code == 2
        assert f"{name}: it is there already, and no bank of actsteer's; choose another name" in done.err
        assert (folder / name).read_bytes() == before
    for name in ("bank.safetensors", "calm.safetensors"):
        before = (folder / name).read_bytes()
        done = run("convert", "love.gguf", name)
        assert done.code == 2
        assert "it is there already, with " in done.err
        assert (folder / name).read_bytes() == before


def test_convert_what_peers_write(run, folder):
    (folder / "sycophancy").mkdir()
    torch.save(torch.arange(16.0), folder / "sycophancy/vec_layer_1_Llama-2-7b.pt")
    torch.save({-1: torch.arange(16.0)[None].numpy()}, folder / "repe.pt")
    for source, concept, site in (
        ("sycophancy/vec_layer_1_Llama-2-7b.pt", "sycophancy", "model.layers.1"),
        ("repe.pt", "repe", "model.layers.2"),
    ):
        assert run("convert", source, f"{concept}.safetensors", "-m", "llama").code == 0
        v = SteeringVector.load(folder / f"{concept}.safetensors")
        assert v.equal(SteeringVector({site: torch.arange(16.0)}))
        assert v.concept == concept


def test_convert_with_a_format_of_one_s_own(run, folder, bank):
    (folder / "csvs.py").write_text(
        "import torch\n"
        "from actsteer.files.lazy import Named\n"
        "SUFFIX = '.csv'\n"
        "def read(path):\n"
        "    lines = [line.split(',') for line in path.read_text().split()]\n"
        "    rows = {site: torch.tensor([float(number) for number in row]) for site, *row in lines}\n"
        "    return {path.stem: Named(rows, {'concept': path.stem})}\n"
        "def write(path, vectors):\n"
        "    (vector,) = vectors.values()\n"
        "    rows = (','.join([site, *map(repr, row.tolist())]) for site, row in vector.directions.items())\n"
        "    path.write_text('\\n'.join(rows))\n"
    )
    assert run("convert", "love.safetensors", "love.csv", "--format", "csvs").code == 0
    assert (folder / "love.csv").read_text().startswith(f"{SITE},")
    assert run("convert", "love.csv", "back.safetensors", "--format", "csvs").code == 0
    assert SteeringVector.load(folder / "back.safetensors").equal(bank["love"])
    for wrong, why in (
        (["love.csv", "new.safetensors"], "unknown format '.csv'"),
        (["love.csv", "new.safetensors", "--format", "absent"], "No module named 'absent'"),
        (["love.csv", "new.safetensors", "--format", "nets"], "a format needs SUFFIX, read, write"),
        (["love.safetensors", "new.safetensors", "--format", "csvs"], "its files end in .csv"),
        (["calm.safetensors", "love.csv", "--format", "csvs"], "it is there already"),
    ):
        done = run("convert", *wrong)
        assert done.code != 0
        assert why in done.err
        assert not (folder / "new.safetensors").exists()


# --- fold and verify ---------------------------------------------------------------------------------------------
def test_fold_a_llama_and_verify_it(run, folder, bank):
    done = run("fold", "-m", "llama", "-b", "bank.safetensors", "-c", "2", "--verify-on", "love.txt", "-o", "folded")
    assert done.code == 0, done.err
    assert done.out.startswith("proved on love.txt, written to folded\n")
    ids = torch.tensor([[3, 4, 6]])
    model = causal(folder)
    with torch.no_grad(), Steerer(model, bank, c=2.0):
        steered = model(ids).logits
    folded = causal(folder, "folded")
    assert torch.allclose(folded(ids).logits, steered, atol=1e-4)
    same = ["verify", "bank.safetensors", "-m", "llama", "--on", "love.txt", "--folded", "folded"]
    done = run(*same, "-c", "2")
    assert done.code == 0, done.err
    assert [line[0] for line in done.lines] == ["whole:", "fits:", "runs:", "folded:"]
    done = run(*same, "-c", "2.5")
    assert done.code == 1
    assert "is not the steered model" in done.err
    done = run(*same, "-c", "2", "--concept", "calm")
    assert done.code == 1


def test_fold_a_torch_model_into_its_weights(run, folder):
    v = SteeringVector({"1": torch.ones(8)}, concept="v")
    v.save(folder / "v.safetensors")
    common = ["-b", "v.safetensors", "-c", "0.5", "--verify-on", "right.pt"]
    assert run("fold", "-m", "nets:build", *common, "-o", "folded.safetensors").code == 0
    import nets

    model = nets.build()
    with Steerer(model, v, c=0.5):
        steered = model(torch.load("right.pt"))
    model.load_state_dict(load_file("folded.safetensors"))
    assert torch.allclose(model(torch.load("right.pt")), steered, atol=1e-5)
    same = ["verify", "v.safetensors", "-m", "nets:build", "--on", "right.pt", "--folded", "folded.safetensors"]
    assert run(*same, "-c", "0.5").code == 0
    assert run(*same, "-c", "0.6").code == 1


def test_fold_refuses_what_weights_cannot_carry(run, folder):
    from tests.zoo import llama

    llama(kind="Gemma2", vocab_size=16).float().save_pretrained(folder / "gemma")
    tokenizer(folder).save_pretrained(folder / "gemma")
    SteeringVector({SITE: torch.ones(16)}).save(folder / "v.safetensors")
    done = run("fold", "-m", "gemma", "-b", "v.safetensors", "-c", "2", "--verify-on", "love.txt", "-o", "folded")
    assert done.code == 1
    assert "post_feedforward_layernorm (Gemma2RMSNorm) stands between" in done.err
    assert not (folder / "folded").exists()


def test_fold_gives_a_tied_head_weights_of_its_own_if_asked(run, folder):
    from tests.zoo import llama

    model = llama(vocab_size=len(tokenizer(folder)), tie_word_embeddings=True).float()
    model.save_pretrained(folder / "tied")
    tokenizer(folder).save_pretrained(folder / "tied")
    v = SteeringVector({"model.embed_tokens": torch.ones(16)})
    v.save(folder / "v.safetensors")
    command = ["fold", "-m", "tied", "-b", "v.safetensors", "-c", "2", "--verify-on", "love.txt", "-o"]
    done = run(*command, "folded")
    assert done.code == 1 and "with untie=True lm_head would get weights of its own" in done.err
    assert run(*command, "folded", "--untie").code == 0
    ids = torch.tensor([[3, 4, 6]])
    with torch.no_grad(), Steerer(model, v, c=2.0):
        assert torch.allclose(causal(folder, "folded")(ids).logits, model(ids).logits, atol=1e-4)
    same = ["verify", "v.safetensors", "-m", "tied", "--on", "love.txt", "--folded", "folded"]
    assert run(*same, "-c", "2").code == 0
    v = SteeringVector({"1": torch.ones(8)})
    v.save(folder / "w.safetensors")
    files = ["-b", "w.safetensors", "-c", "1", "--verify-on", "right.pt", "-o", "w2.safetensors"]
    done = run("fold", "-m", "nets:build", *files, "--untie")
    assert done.code == 2 and "weights alone do not say that the head has its own" in done.err


def test_fold_writes_into_no_directory_that_holds_something(run, folder, bank):
    common = ["fold", "-m", "llama", "-b", "bank.safetensors", "--verify-on", "love.txt"]
    before = (folder / "llama/model.safetensors").read_bytes()
    for output in ("llama", "love.txt"):
        done = run(*common, "-c", "2", "-o", output)
        assert done.code == 2
        assert "it is there already" in done.err
    assert (folder / "llama/model.safetensors").read_bytes() == before
    done = run(*common, "-c", "2", "-c", "3", "-o", "folded")
    assert done.code == 2
    assert "expected one strength" in done.err


def test_verify_step_by_step(run, folder, bank):
    assert run("verify", "bank.safetensors").out == "whole: bank.safetensors, 2 concepts\n"
    for weights in (folder / "llama").glob("*.safetensors"):
        weights.rename(weights.with_suffix(".kept"))
    done = run("verify", "bank.safetensors", "-m", "llama")
    assert done.lines[1] == ["fits:", "llama,", SITE]
    done = run("verify", "bank.safetensors", "-m", "nets:build")
    assert done.code == 1
    assert "was made for a LlamaForCausalLM" in done.err
    assert run("verify", "bank.safetensors", "--on", "love.txt").code == 2
    assert run("verify", "bank.safetensors", "-m", "llama", "--folded", "x").code == 2


def test_verify_finds_an_edit_that_never_runs(run, folder):
    (folder / "idle.py").write_text(
        "from torch import nn\n\n\nclass Idle(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.used, self.idle = nn.Linear(4, 4), nn.Linear(4, 4)\n\n    def forward(self, x):\n"
        "        return self.used(x)\n"
    )
    SteeringVector({"idle": torch.ones(4)}).save(folder / "v.safetensors")
    done = run("verify", "v.safetensors", "-m", "idle:Idle", "--on", "right.pt")
    assert done.code == 1
    assert [line[0] for line in done.lines] == ["whole:", "fits:"]
    assert "the model ran, but these sites did not" in done.err


def test_verify_runs_a_steering_with_its_gates_at_every_site(run, folder):
    v = SteeringVector({"0": torch.ones(8), "1": torch.ones(8)}, metadata={"offset 0": "1", "offset 1": "-1"})
    Steering(v, gate=AtSites.soft(v)).save(folder / "gated.safetensors")
    done = run("verify", "gated.safetensors", "-m", "nets:build", "--on", "right.pt")
    assert done.code == 0 and [line[0] for line in done.lines[:3]] == ["whole:", "fits:", "runs:"]
    Steering(v, gate=AtSites.soft(v.select("0"))).save(folder / "less.safetensors")
    done = run("verify", "less.safetensors", "-m", "nets:build", "--on", "right.pt")
    assert done.code == 1 and "no gate for the steered site '1'" in done.err


SPARE = """
from torch import nn


class Spare(nn.Module):
    def __init__(self):
        super().__init__()
        self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        self.spare(x)
        return self.used(x)
"""


def test_verify_warns_of_an_edit_that_no_answer_depends_on(run, folder):
    (folder / "spare.py").write_text(SPARE)
    for site, warns in (("spare", True), ("used", False)):
        SteeringVector({site: torch.ones(4)}).save(folder / f"{site}.safetensors")
        done = run("verify", f"{site}.safetensors", "-m", "spare:Spare", "--on", "right.pt")
        assert done.code == 0
        assert ("warning: site 'spare': nothing that the model returns depends on it" in done.err) == warns


def test_generate_checks_the_reach_of_the_edits(run, folder, monkeypatch):
    seen = []
    monkeypatch.setattr(Steerer, "check", lambda self, inputs: seen.append((self.sites, set(inputs))))
    bank = VectorBank({"love": SteeringVector({"model.layers.1": torch.ones(16)})})
    bank.save(folder / "own.safetensors")
    done = run(
        "generate", "-m", "llama", "-b", "own.safetensors", "-c", "1", "-c", "2", "I", "we", "--max-new-tokens", 2
    )
    assert done.code == 0
    assert seen == [(("model.layers.1",), {"input_ids", "attention_mask"})]


# --- what a new user ran into ----------------------------------------------------------------------------------------
def test_a_fold_that_makes_infinities_is_refused(run, folder, bank):
    done = run("fold", "-m", "llama", "-b", "bank.safetensors", "-c", "1e39", "--verify-on", "love.txt", "-o", "big")
    assert done.code == 1
    assert "within the range of torch.float32" in done.err
    assert not (folder / "big").exists()
    done = run("verify", "bank.safetensors", "-m", "llama", "--on", "love.txt", "-c", "1e39")
    assert done.code == 1
    assert "within the range of torch.float32" in done.err


def test_a_model_without_a_tokenizer_is_folded_too(run, folder, bank):
    for file in (folder / "llama").glob("*token*"):
        file.unlink()
    torch.save({"input_ids": torch.tensor([[3, 4, 6]])}, folder / "ids.pt")
    command = ["fold", "-m", "llama", "-b", "bank.safetensors", "-c", "2", "-o", "folded"]
    done = run(*command, "--verify-on", "love.txt")
    assert done.code == 1
    assert "llama has no tokenizer" in done.err
    assert not (folder / "folded").exists()
    assert run(*command, "--verify-on", "ids.pt").code == 0
    assert sorted(path.name for path in (folder / "folded").iterdir())[:1] == ["config.json"]
    done = run("verify", "bank.safetensors", "-m", "llama", "-c", "2", "--on", "ids.pt", "--folded", "folded")
    assert done.code == 0


def test_a_fold_that_fails_to_be_saved_leaves_nothing(run, folder, bank, monkeypatch):
    from transformers import PreTrainedTokenizerFast

    def full(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", full)
    before = sorted(path.name for path in folder.iterdir())
    done = run("fold", "-m", "llama", "-b", "bank.safetensors", "-c", "2", "--verify-on", "love.txt", "-o", "folded")
    assert (done.code, done.err) == (1, "error: no space left\n")
    assert sorted(path.name for path in folder.iterdir()) == before


def test_new_biases_of_a_torch_model_are_named_and_verified(run, folder):
    SteeringVector({"0": torch.ones(8)}, concept="v").save(folder / "v.safetensors")
    common = ["-c", "2", "-m", "nets:without_biases"]
    done = run("fold", *common, "-b", "v.safetensors", "--verify-on", "right.pt", "-o", "folded.safetensors")
    assert "it has 1 new bias (0.bias); make the model with them before loading" in done.out
    done = run("verify", "v.safetensors", *common, "--on", "right.pt", "--folded", "folded.safetensors")
    assert done.code == 0, done.err


def test_a_single_named_tensor_is_the_argument_of_that_name(run, folder):
    import nets

    for side in ("right", "left"):
        save_file({"y": torch.load(f"{side}.pt")}, f"{side}.safetensors")
    files = ["--positive", "right.safetensors", "--negative", "left.safetensors"]
    assert run("fit", "-m", "nets:Two", *files, "--sites", "c", "-o", "v.safetensors").code == 0
    sides = {name: [{"y": torch.load(f"{side}.pt")}] for name, side in (("positive", "right"), ("negative", "left"))}
    assert SteeringVector.load(folder / "v.safetensors").allclose(fit(nets.Two(), **sides, sites="c"))


def test_brackets_and_control_characters_stay_text(run, folder):
    model = causal(folder)
    for concept in ("[/x]", "[bold]x[/bold]", "a\x1b[31mb\nc"):
        SteeringVector({SITE: torch.ones(16)}, concept=concept).save(folder / "odd.safetensors", model=model)
        shown = run("show", "odd.safetensors").out
        assert "\x1b" not in shown
        command = ["generate", "-m", "llama", "-b", "odd.safetensors", "-c", f"{concept}=1", "--max-new-tokens", 1]
        made = run(*command, "I [/y]").out
        assert "I [/y]" in made
        written = concept.replace("\x1b", "\\x1b").replace("\n", "\\x0a")
        assert written in shown
        assert f"c = {written} 1" in made


def test_lines_end_where_files_end_them(run, folder):
    texts = ["I love\u2028this", "day\x0bis good"]
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode())
    (folder / "b.jsonl").write_text("\n".join(json.dumps(text, ensure_ascii=False) for text in texts))
    for name in ("a.txt", "b.jsonl"):
        files = ["--positive", name, "--negative", "hate.txt", "--concept", "v"]
        assert run("fit", "-m", "llama", *files, "--sites", SITE, "-o", f"{name}.safetensors").code == 0
    sides = [text_batches(tokenizer(folder), own) for own in (texts, (folder / "hate.txt").read_text().splitlines())]
    expected = fit(causal(folder), positive=sides[0], negative=sides[1], sites=SITE, positions="last")
    for name in ("a.txt", "b.jsonl"):
        assert SteeringVector.load(folder / f"{name}.safetensors").equal(expected)


def test_nothing_that_is_read_is_written_over(run, folder, bank):
    content = (folder / "bank.safetensors").read_bytes()
    common = ["--verify-on", "right.pt", "-c", "1"]
    assert run("fold", "-m", "nets:build", "-b", "bank.safetensors", *common, "-o", "bank.safetensors").code == 2
    assert run("convert", "bank.safetensors", "bank.safetensors").code == 2
    save_file({"input": torch.load("right.pt")}, "right.safetensors")
    files = ["--positive", "right.safetensors", "--negative", "left.pt", "--sites", "1"]
    assert run("fit", "-m", "nets:build", *files, "-o", "right.safetensors").code == 2
    assert (folder / "bank.safetensors").read_bytes() == content


def t5(folder):
    """A folder with an encoder and decoder, and the model."""
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 16, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(**sizes, decoder_start_token_id=0, pad_token_id=2, eos_token_id=None)
    model = T5ForConditionalGeneration(config).eval()
    model.save_pretrained(folder / "t5")
    tokenizer(folder).save_pretrained(folder / "t5")
    return model


def test_an_encoder_and_decoder_from_fit_to_verify(run, folder):
    t5(folder)
    for site in ("encoder.block.0.layer.1.DenseReluDense.wi", "decoder.block.0"):
        files = ["--positive", "love.txt", "--negative", "hate.txt", "--sites", f"{site}{':out.0' * (site[0] == 'd')}"]
        done = run("fit", "-m", "t5", *files, "-o", "v.safetensors")
        assert done.code == 0, done.err
        assert run("generate", "-m", "t5", "-b", "v.safetensors", "-c", "2", "I", "--max-new-tokens", 2).code == 0
        done = run("verify", "v.safetensors", "-m", "t5", "--on", "love.txt", "-c", "2")
        assert done.code == 0, done.err


def test_options_that_would_be_ignored_are_refused(run, folder, bank):
    assert run("sites", "nets:build").code == 0
    files = ["--positive", "right.pt", "--negative", "left.pt", "--sites", "1", "-o", "v.safetensors"]
    assert run("fit", "-m", "nets:build", *files, "--dtype", "bfloat16").code == 2
    done = run("convert", "bank.safetensors", "new.safetensors", "--source-offset", 1)
    assert done.code == 1
    assert "it names its sites" in done.err
    done = run("generate", "-m", "llama", "-b", "bank.safetensors", "-c", "love=1", "-c", "love=2", "I")
    assert done.code == 2
    assert "'love' has a strength already" in done.err
    done = run("generate", "-m", "llama", "-b", "bank.safetensors", "-c", "1", "I", "--chat")
    assert done.code == 0


def test_sides_that_are_alike_are_warned_about(run):
    files = ["--positive", "right.pt", "--negative", "right.pt", "--sites", "1", "-o", "v.safetensors"]
    done = run("fit", "-m", "nets:build", *files)
    assert done.code == 0
    assert done.err == "warning: the vector is zero: both sides are alike at these sites\n"


def test_capitals_in_suffixes(run, folder):
    for old, new in (("love.txt", "LOVE.TXT"), ("right.pt", "RIGHT.PT"), ("left.pt", "LEFT.PT")):
        (folder / old).rename(folder / new)
    files = ["--positive", "RIGHT.PT", "--negative", "LEFT.PT", "--sites", "1"]
    assert run("fit", "-m", "nets:build", *files, "-o", "V.SAFETENSORS").code == 0
    files = ["--positive", "LOVE.TXT", "--negative", "hate.txt", "--sites", SITE]
    assert run("fit", "-m", "llama", *files, "-o", "w.safetensors").code == 0


@pytest.mark.slow
def test_a_narrow_screen_does_not_fold_names(folder):
    done = shell("sites", "llama", cwd=folder, COLUMNS="20")
    assert "model.layers.2.post_attention_layernorm  LlamaRMSNorm" in done.stdout
    assert max(map(len, done.stdout.splitlines())) > 60


def test_a_pattern_that_would_be_written_over_is_refused(run, folder, bank):
    (folder / "q").mkdir()
    for name in ("love", "calm"):
        (folder / f"{name}.safetensors").rename(folder / f"q/{name}.safetensors")
    content = (folder / "q/calm.safetensors").read_bytes()
    done = run("convert", "q/*.safetensors", "q/calm.safetensors")
    assert done.code == 2
    assert "it is read, and would be lost" in done.err
    assert (folder / "q/calm.safetensors").read_bytes() == content
    assert run("convert", "q/*.safetensors", "q/all.safetensors").code == 0


@pytest.mark.parametrize("where", ["empty", "link", "."])
def test_a_fold_goes_into_an_empty_directory(run, folder, bank, monkeypatch, where):
    (folder / "empty").mkdir()
    (folder / "link").symlink_to("empty")
    if where == ".":
        monkeypatch.chdir(folder / "empty")
    model, vectors, texts = (folder / name for name in ("llama", "bank.safetensors", "love.txt"))
    done = run("fold", "-m", model, "-b", vectors, "-c", "2", "--verify-on", texts, "-o", where)
    assert done.code == 0, done.err
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (folder / "empty").iterdir()
    }
    assert (folder / "link").is_symlink()
    assert not list(folder.glob(".actsteer-*"))


@pytest.mark.parametrize(
    ("name", "why"), [("./none", "no such file or directory"), ("nets.py", "expected a directory")]
)
def test_what_cannot_be_a_folded_model_is_refused_before_any_work(run, folder, bank, name, why):
    done = run("verify", "bank.safetensors", "-m", "llama", "--on", "love.txt", "--folded", name)
    assert done.code == 2
    assert why in done.err
    assert done.out == ""


def test_a_folded_model_of_another_dtype_asks_for_it(run, folder, bank):
    common = ["-m", "llama", "-c", "2", "--dtype", "bfloat16"]
    done = run("fold", *common, "-b", "bank.safetensors", "--verify-on", "love.txt", "-o", "half")
    assert done.code == 0, done.err
    same = ["verify", "bank.safetensors", "--on", "love.txt", "--folded", "half", *common]
    assert run(*same).code == 0
    done = run(*same[:-2])
    assert done.code == 1
    assert "pass --dtype" in done.err


def test_verify_takes_outputs_of_every_kind(run, folder):
    (folder / "kinds.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Kinds(nn.Module):\n    def __init__(self):\n"
        "        super().__init__()\n        torch.manual_seed(0)\n        self.l = nn.Linear(4, 3)\n\n"
        "    def forward(self, x):\n        y = self.l(x)\n        masked = y.clone()\n"
        "        masked[:, 0] = float('-inf')\n        return y, masked, y > 0, y[y > 0]\n"
    )
    SteeringVector({"l": torch.ones(3)}).save(folder / "v.safetensors")
    done = run("verify", "v.safetensors", "-m", "kinds:Kinds", "--on", "right.pt", "-c", "2")
    assert done.code == 0, done.err
    assert "the outputs move by up to 2" in done.out


def test_a_truncated_checkpoint_is_no_traceback(run, folder, bank):
    weights = folder / "llama/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    done = run("verify", "bank.safetensors", "-m", "llama", "--on", "love.txt")
    assert done.code == 2
    assert "llama: " in done.err
    assert "Traceback" not in done.err


def test_a_folder_is_no_file_of_vectors(run):
    done = run("show", "llama")
    assert done.code == 2
    assert "it is a folder; name a file in it" in " ".join(done.err.replace("│", " ").split())


# --- a whole steering --------------------------------------------------------------------------------------------
@pytest.fixture
def whole(folder, bank):
    """A file of all parts, and the steering that is in it."""
    steering = Steering(
        bank,
        c={"love": 40.0, "calm": -30.0},
        intervention={"calm": KeepNorm(Clamp(3.0))},
        gate={"love": ProjectionAbove(bank["calm"], -0.25, per="token")},
        positions="generated",
    )
    steering.save(folder / "whole.safetensors")
    return steering


def test_generate_as_a_file_says_and_as_the_flags_say(run, folder, whole):
    common = ["generate", "-m", "llama", "-b", "whole.safetensors", "I love", "--max-new-tokens", 5]
    plain = continued(folder, "I love", whole, 0.0)
    for flags, given in (
        ([], {"c": None}),
        (["-c", "2"], {"c": 2.0}),
        (["-c", "love=9", "--positions", "all"], {"c": {"love": 9.0}, "positions": "all"}),
    ):
        done = run(*common, *flags)
        assert done.code == 0, done.err
        shown = "love 40, calm -30" if not flags else "2" if len(flags) == 2 else "love 9"
        assert texts(done) == ["I love", "c = 0", plain, f"c = {shown}", continued(folder, "I love", whole, **given)]
    done = run(*common, "--concept", "calm")
    assert texts(done)[-2:] == ["c = calm -30", continued(folder, "I love", whole.select("calm"), None)]
    assert continued(folder, "I love", whole, None) != plain


def test_show_says_how_a_file_steers(run, whole):
    done = run("show", "whole.safetensors")
    assert done.code == 0, done.err
    for line in (
        "c of love: 40.0",
        "c of calm: -30.0",
        "intervention of calm: KeepNorm(intervention=Clamp(target=3.0))",
        f"gate of love: ProjectionAbove(site='{SITE}', threshold=-0.25, per='token')",
        "positions: generated",
    ):
        assert line in done.out.splitlines()
    assert "sites:" not in done.out
    assert "gate of love" not in run("show", "whole.safetensors", "--concept", "calm").out


def test_convert_keeps_a_steering_or_refuses(run, folder, whole):
    done = run("convert", "whole.safetensors", "again.safetensors")
    assert done.code == 0, done.err
    assert repr(Steering.load("again.safetensors")) == repr(whole)
    assert run("convert", "whole.safetensors", "again.safetensors").code == 0  # over its own
    assert run("convert", "love.safetensors", "again.safetensors").code == 2  # of other concepts
    done = run("convert", "whole.safetensors", "love.gguf", "--concept", "love")
    assert done.code == 1 and "this format holds vectors alone, and the steering has c, " in done.err
    assert not (folder / "love.gguf").exists()


def test_fold_and_verify_an_edit_at_the_strength_of_its_file(run, folder):
    import nets

    model, x = nets.build(), torch.load("right.pt")
    edit = Affine({"1": (torch.eye(8) / 2, torch.ones(8))}, concept="half")
    Steering(edit, c=0.5).save("edit.safetensors", model=model)
    common = ["-m", "nets:build", "-b", "edit.safetensors", "--verify-on", "right.pt"]
    assert run("fold", *common, "-o", "folded.safetensors").code == 0
    with torch.no_grad(), Steerer(model, edit, c=0.5):
        steered = model(x)
    model.load_state_dict(load_file("folded.safetensors"))
    assert torch.allclose(model(x), steered, atol=1e-5)
    same = ["verify", "edit.safetensors", "-m", "nets:build", "--on", "right.pt", "--folded", "folded.safetensors"]
    done = run(*same)
    assert done.code == 0, done.err
    assert run(*same, "-c", "0.6").code == 1
    Steering(edit, positions="last").save("edit.safetensors")
    done = run("fold", *common, "-o", "other.safetensors")
    assert done.code == 1 and "positions: weights steer every row and token alike" in done.err
    VectorBank({"half": edit.constant}).save("edit.safetensors")
    done = run("fold", *common, "-o", "other.safetensors")
    assert done.code == 2 and "the file holds vectors alone, and no strength" in done.err


# --- look --------------------------------------------------------------------------------------------------------
def test_look_writes_one_page_of_texts(run, folder):
    v = SteeringVector({"model.layers.1": torch.ones(16)}, concept="calm")
    v.save(folder / "calm.safetensors")
    options = ["--prompts", "love.txt", "-c", 20, "--max-new-tokens", 4, "-o", "look.html"]
    done = run("look", "-m", "llama", "-b", "calm.safetensors", *options)
    assert done.code == 0, done.err
    page = (folder / "look.html").read_text()
    assert page.count("<h3>Text ") == 3 and "calm" in page and ">weather<" in page
    assert done.lines[-1][0] == "look.html:"
    assert run("look", "-m", "llama", "-b", "calm.safetensors", "--chat", *options).code == 0
    assert ">day<" in (folder / "look.html").read_text()


def test_look_takes_tensors_and_images(run, folder):
    SteeringVector({"1": torch.ones(8)}, concept="nine").save(folder / "nine.safetensors")
    first = ["look", "-m", "nets:build", "-b", "nine.safetensors", "--prompts", "right.pt", "-o", "look.html"]
    assert run(*first).code == 0
    assert '<h2 id="inputs">Rows</h2>' in (folder / "look.html").read_text()
    assert run(*first, "--image-shape", "2x2").code == 0
    assert (folder / "look.html").read_text().count("<img ") == 6
    for wrong, why in (("2x", "expected HxW or CxHxW"), ("3x3", "image_shape: expected")):
        done = run(*first, "--image-shape", wrong)
        assert done.code != 0 and why in done.err


def test_look_checks_before_any_work(run, folder):
    SteeringVector({"1": torch.ones(8)}).save(folder / "nine.safetensors")
    first = ["look", "-m", "nets:build", "-b", "nine.safetensors", "--prompts", "right.pt"]
    assert "expected a name with .html" in run(*first, "-o", "look.pdf").err
    assert "expected one strength" in run(*first, "-o", "look.html", "-c", 1, "-c", 2).err
    assert run(*first, "-o", "look.html", "--positions", "nowhere").code == 2
    assert not (folder / "look.html").exists()
