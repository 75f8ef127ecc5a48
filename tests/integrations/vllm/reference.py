"""Reference: the answers of hooked transformers models, for vLLM's environment to compare its own with.

`python -m tests.integrations.vllm.reference FOLDER`, in the project's environment, writes models, banks and a JSON of
groups: what an engine is given, what each request asks for, and which tokens it must answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

from actsteer import (
    Ablate,
    Add,
    And,
    Chain,
    Clamp,
    CosineAbove,
    LowRank,
    Not,
    ProbeAbove,
    ProjectionAbove,
    Soft,
    Steerer,
    Steering,
    SteeringVector,
    VectorBank,
    fold,
    residual_writers,
)
from actsteer.integrations.peft import to_peft
from actsteer.integrations.vllm.comparing import greedy
from actsteer.tokens.positions import from_text
from reference.language import model as smollm

SIZE, TOKENS, VOCABULARY = 128, 16, 256
_CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": SIZE,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "initializer_range": 0.2,  # so that greedy answers differ
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "tie_word_embeddings": False,
}
FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2", "Gemma3", "Olmo2", "GPT2")
"""Those whose blocks are known to the plugin."""
POSITIONS = (None, "all", "prompt", "generated", "last", 3, "2:", "1:12:3", [0, 4, 20], -1, "-4:")


def tiny(family: str) -> Any:
    """A random causal model of a family, in float32."""
    torch.manual_seed(0)
    if family == "GPT2":
        sizes = {"n_embd": SIZE, "n_layer": 4, "n_head": 4, "n_positions": 512, "vocab_size": VOCABULARY}
        config: Any = transformers.GPT2Config(**sizes, initializer_range=0.2, bos_token_id=None, eos_token_id=None)
        return transformers.GPT2LMHeadModel(config).eval()
    name = "Gemma3Text" if family == "Gemma3" else family
    tied = {"tie_word_embeddings": True} if family == "Gemma2" else {}  # as vLLM has it, whatever the config says
    config = getattr(transformers, f"{name}Config")(**_CONFIG | tied)
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def blocks(family: str) -> str:
    """The name of its list of blocks."""
    return "transformer.h" if family == "GPT2" else "model.layers"


def drawn(*shape: int, seed: int) -> Tensor:
    """Normal numbers, the same for the same seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt(length: int, seed: int) -> list[int]:
    """Tokens, drawn."""
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def requests(concepts: tuple[str, ...], count: int, *, longest: int = 90) -> list[dict[str, Any]]:
    """Mixed ones: every other prompt begins alike, and the strengths and positions differ."""
    shared = prompt(longest, seed=0)
    found: list[dict[str, Any]] = []
    for number in range(count):
        ids = shared[: 2 * longest // 3 + number % (longest // 3)] if number % 2 else prompt(5 + number, seed=number)
        one, other = concepts[number % len(concepts)], concepts[(number + 1) % len(concepts)]
        c: Any = [{one: 1.0}, {one: 0.5, other: -0.5}, {}, {one: [1.0, 0.5, 0.0, -1.0]}, {other: -1.0}, {one: 0.0}]
        found.append({"ids": ids, "c": c[number % 6], "positions": POSITIONS[number % len(POSITIONS)]})
    return [*found, *({"ids": shared, "c": {concepts[0]: own / 2}, "positions": None} for own in range(-3, 4))]


def answers(model: Any, steering: Steering, asked: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tokens that the hooked model answers, with their log-probabilities."""
    return [_answer(model, steering, request) for request in asked]


def _answer(model: Any, steering: Steering, request: Mapping[str, Any]) -> dict[str, Any]:
    c = {name: _schedule(own) for name, own in request["c"].items()}
    given = request["positions"]
    positions = from_text(given) if isinstance(given, str) else given
    options = {"intervention": steering.intervention, "gate": steering.gate, "positions": positions, "strict": False}
    with Steerer(model, steering.vectors, c=c, **options) if c else nullcontext():
        return greedy(model, request["ids"], TOKENS)[0]._asdict()


def _schedule(c: float | list[float]) -> Any:
    if not isinstance(c, list):
        return c
    steps: Callable[[int], float] = lambda step: c[min(step, len(c) - 1)]  # noqa: E731
    return steps


def adding(family: str) -> Steering:
    """Three concepts at three places."""
    at = blocks(family)
    places = {"polite": (f"{at}.1", f"{at}.2.mlp", f"{at}.3:in"), "brief": (f"{at}.1", f"{at}.2.mlp")}
    places["calm"] = (f"{at}.2.mlp", f"{at}.3:in")
    bank = {
        concept: SteeringVector({site: 3 * drawn(SIZE, seed=hash_of(concept, site)) for site in sites}, concept=concept)
        for concept, sites in places.items()
    }
    return Steering(VectorBank(bank))


def editing(family: str) -> Steering:
    """Edits that read the activation, among others that do not, at one site and at several."""
    at = blocks(family)
    bank = {
        "off": SteeringVector({f"{at}.1": drawn(SIZE, seed=1), f"{at}.3.mlp": drawn(SIZE, seed=2)}, concept="off"),
        "more": SteeringVector({f"{at}.1": 2 * drawn(SIZE, seed=3)}, concept="more"),
        "set": SteeringVector({f"{at}.1": drawn(SIZE, seed=4), f"{at}.2:in": drawn(SIZE, seed=5)}, concept="set"),
        "swap": SteeringVector({f"{at}.2.mlp": drawn(SIZE, seed=6)}, concept="swap"),
        "low": SteeringVector({f"{at}.2": torch.zeros(SIZE)}, concept="low"),
    }
    norm = f"{at}.3.ln_1" if family == "GPT2" else None if family == "Olmo2" else f"{at}.3.input_layernorm"
    if norm is not None:  # Olmo 2 has none before its attention
        bank["norm"] = SteeringVector({norm: drawn(SIZE, seed=10)}, concept="norm")
    parts = drawn(3, SIZE, seed=7) / 10, drawn(3, SIZE, seed=8), drawn(3, seed=9)
    each = {"off": Ablate(), "set": Clamp(2.0), "swap": Chain(Ablate(), Add()), "low": LowRank({f"{at}.2": parts})}
    each |= {"norm": Ablate()} if norm is not None else {}
    return Steering(VectorBank(bank), intervention=each)


def gated(*, per: Any) -> Steering:
    """Gates at the steered site and at an earlier one."""
    at = "model.layers"
    v = {n: SteeringVector({f"{at}.{b}": 3 * drawn(SIZE, seed=n + 1)}) for n, b in enumerate((1, 2, 3))}
    bank = {"one": v[0], "two": v[1], "three": v[2], "four": v[2]}
    read = [SteeringVector({f"{at}.{b}": drawn(SIZE, seed=50 + b)}) for b in (1, 1, 2)]
    probe = SteeringVector({f"{at}.1": drawn(SIZE, seed=60) / 20}, metadata={f"offset {at}.1": "0.1"})
    gates = {
        "one": ProjectionAbove(read[0], 0.1, per=per),
        "two": Soft(ProbeAbove(probe, per=per), width=0.7),
        "three": And(CosineAbove(read[1], 0.0, per=per), Not(ProjectionAbove(read[2], 0.3, per=per))),
    }
    return Steering(VectorBank(bank), gate=gates)


def elsewhere(family: str) -> Steering:
    """Sites that are no blocks, mlps or norms of them: embeddings, the last norm, linear layers, fused ones."""
    at = f"{blocks(family)}.1"
    sizes = {
        "GPT2": {
            "transformer.wte": SIZE,
            f"{at}.attn.c_attn": 3 * SIZE,
            f"{at}.mlp.c_fc": 4 * SIZE,
            f"{at}.attn": SIZE,
        },
        "Phi3": {f"{at}.self_attn.qkv_proj": 2 * SIZE, f"{at}.mlp.gate_up_proj": 512, f"{at}.self_attn": SIZE},
        "Llama": {"model.embed_tokens": SIZE, "model.norm": SIZE, f"{at}.mlp.down_proj": SIZE, f"{at}.self_attn": SIZE},
    }[family]
    bank = {site: SteeringVector({site: drawn(size, seed=hash_of(site))}, concept=site) for site, size in sizes.items()}
    reads = {"GPT2": f"{at}.mlp.c_proj:in", "Phi3": f"{at}.mlp.down_proj:in", "Llama": f"{at}.self_attn.o_proj:in"}
    size = {"GPT2": 4 * SIZE, "Phi3": 256, "Llama": SIZE}[family]
    bank["reads"] = SteeringVector({reads[family]: drawn(size, seed=7)}, concept="reads")
    return Steering(VectorBank(bank), intervention={"reads": Ablate()})


def adapted(family: str, model: Any) -> dict[str, Steering]:
    """What a LoRA adapter can be: a direction taken out of the stream, and low-rank edits."""
    at = blocks(family)
    writers = residual_writers(model)[family == "Qwen2" :]  # for which vLLM adapts no embedding
    sizes = {f"{at}.1.mlp.down_proj:in": 256, f"{at}.2.self_attn.k_proj:in": SIZE, f"{at}.2.self_attn.o_proj": SIZE}
    low = {
        site: (drawn(3, d, seed=hash_of(site)) / 16, drawn(3, d, seed=hash_of(site, "U")) / 4, torch.zeros(3))
        for site, d in sizes.items()
    }
    free = SteeringVector(dict.fromkeys(writers, drawn(SIZE, seed=1)), concept="free")
    return {"free": Steering(free, intervention=Ablate()), "low": Steering(LowRank(low, concept="low"))}


def hash_of(*words: str) -> int:
    """A small number that tells words apart."""
    return sum(ord(letter) * (place + 1) for place, letter in enumerate("|".join(words)))


def write(folder: Path) -> None:
    """Models, banks and groups.json."""
    groups: dict[str, Any] = {}

    def group(name: str, model: Any, steering: Steering, asked: list[dict[str, Any]], **options: Any) -> None:
        home = options.pop("home", folder / name)
        if not home.exists():
            model.save_pretrained(home)
        bank = folder / f"{name}.safetensors"
        steering.save(bank, model=model)
        expected = answers(model, steering, asked)
        groups[name] = {"model": str(home), "bank": str(bank), "requests": asked, "expected": expected} | options

    llama = tiny("Llama")
    steering = adding("Llama")
    concepts = steering.vectors.concepts
    group("adding", llama, steering, requests(concepts, 30))
    twice = VectorBank({name: 2 * own for name, own in steering.vectors.items()})
    group("adding-twice", llama, Steering(twice), requests(concepts, 30), home=folder / "adding")
    fused = SteeringVector({"model.layers.1.self_attn.q_proj": torch.ones(SIZE)}, concept="fused")
    fused.save(folder / "adding-fused.safetensors", model=llama)
    for name, family, site, size in (
        ("activation", "Llama", "model.layers.1.mlp.act_fn", 256),
        ("heads", "Qwen3", "model.layers.1.self_attn.q_norm", 32),
        ("scaled", "Gemma2", "model.embed_tokens", SIZE),
    ):
        SteeringVector({site: torch.ones(size)}, concept=name).save(
            folder / f"adding-{name}.safetensors", model=tiny(family)
        )
    for family in ("GPT2", "Phi3", "Llama"):
        steering = elsewhere(family)
        asked = requests(steering.vectors.concepts, 10, longest=40)
        group(f"elsewhere-{family}", tiny(family), steering, asked)
    for family in FAMILIES:
        model = tiny(family)
        steering = adding(family)
        group(f"adding-{family}", model, steering, requests(concepts, 11))
        steering = editing(family)
        group(
            f"editing-{family}",
            model,
            steering,
            requests(steering.vectors.concepts, 12),
            home=folder / f"adding-{family}",
        )
    for per in ("token", "sequence", "last"):
        steering = gated(per=per)
        once = {} if per == "token" else {"engine": {"enable_prefix_caching": False, "enable_chunked_prefill": False}}
        asked = requests(steering.vectors.concepts, 24)
        group(f"gated-{per}", llama, steering, asked, home=folder / "adding", **once)
    for family in ("Llama", "GPT2"):
        model = tiny(family)
        steering = adding(family)
        asked = [{"ids": prompt(9 + number, seed=number), "c": {}, "positions": None} for number in range(7)]
        example = torch.tensor([prompt(40, seed=99)])
        folded = fold(model, steering.vectors, 0.7, verify_on=example)
        folded.save_pretrained(folder / f"folded-{family}")
        hooked = [request | {"c": dict.fromkeys(steering.vectors.concepts, 0.7)} for request in asked]
        expected = answers(model, steering, hooked)
        home = str(folder / f"folded-{family}")
        groups[f"folded-{family}"] = {"model": home, "bank": None, "requests": asked, "expected": expected}
    for family in ("Llama", "Qwen2"):
        model, asked, expected = tiny(family), [], []
        plain = [{"ids": prompt(9 + number, seed=number), "c": {}, "positions": None} for number in range(6)]
        steerings = adapted(family, model)
        for name, steering in steerings.items():
            home = folder / f"adapter-{family}-{name}"
            to_peft(steering, None, model, verify_on=torch.tensor([prompt(40, seed=99)])).save(home)
            asked += [request | {"adapter": str(home)} for request in plain]
            expected += answers(model, steering, [request | {"c": {name: 1.0}} for request in plain])
        groups[f"adapters-{family}"] = {
            "model": str(folder / f"adding-{family}"),
            "bank": None,
            "requests": asked + plain,
            "expected": expected + answers(model, steering, plain),
            # vLLM 0.32 on a CPU gives the last place's adapter to requests that ask for none: leave that place empty
            "engine": {"enable_lora": True, "max_lora_rank": 8, "max_loras": len(steerings) + 1},
        }
    if smollm.packaged() is not None or smollm.cache().exists():
        model, _ = smollm.load()
        sites = [f"model.layers.{number}" for number in (5, 10, 15, 20)] + ["model.layers.12.mlp", "model.layers.25:in"]
        bank = {
            concept: SteeringVector({s: 2 * drawn(576, seed=hash_of(concept, s)) for s in sites}, concept=concept)
            for concept in ("polite", "brief", "calm")
        }
        steering = Steering(VectorBank(bank))
        group("smollm2", model, steering, requests(steering.vectors.concepts, 26, longest=60), home=smollm.folder())
    (folder / "groups.json").write_text(json.dumps(groups))


if __name__ == "__main__":
    torch.set_num_threads(1)
    target = Path(sys.argv[1])
    target.mkdir(parents=True, exist_ok=True)
    write(target)
