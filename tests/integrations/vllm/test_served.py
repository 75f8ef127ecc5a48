"""A steering as an engine computes it, without vLLM: the forms of edits, the hooks on a fake model, and the passes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from actsteer import (
    Ablate,
    Add,
    Affine,
    And,
    AttachedError,
    BatchError,
    Chain,
    Clamp,
    CosineAbove,
    GateError,
    KeepNorm,
    LowRank,
    ModelMismatchError,
    Not,
    OutputError,
    ProbeAbove,
    ProjectionAbove,
    ShapeError,
    SiteNotFoundError,
    Soft,
    Steerer,
    Steering,
    SteeringNotApplied,
    SteeringVector,
    StrengthError,
    UnsupportedModelError,
    VectorBank,
)
from actsteer.integrations.vllm.banks import of_config
from actsteer.integrations.vllm.filling import Filler, Part
from actsteer.integrations.vllm.front import Front
from actsteer.integrations.vllm.hooks import Buffers, Hooks
from actsteer.integrations.vllm.requests import NAME
from actsteer.integrations.vllm.served import Served, served
from actsteer.integrations.vllm.sites import find
from actsteer.integrations.vllm.worker import check_modes
from tests.zoo import bits

D = 6


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class LlamaDecoderLayer(nn.Module):
    """A block as vLLM makes them: it takes and gives the residual stream in two parts."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.mlp = nn.Linear(D, D, bias=False)
        with torch.no_grad():
            self.mlp.weight.copy_(drawn(D, D, seed=seed) / 2)

    def forward(self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        residual = hidden_states if residual is None else hidden_states + residual
        return self.mlp(residual.tanh()), residual


class Theirs(nn.Module):
    """A model of vLLM's kind: all tokens in one row."""

    packed_modules_mapping = {"qkv_proj": ["q_proj", "k_proj", "v_proj"]}  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaDecoderLayer(seed) for seed in range(3))

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        residual = None
        for layer in self.layers:
            x, residual = layer(positions, x, residual)
        return x + residual


class Block(nn.Module):
    """The same block, as Hugging Face makes them."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.mlp = LlamaDecoderLayer(seed).mlp

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + self.mlp(hidden_states.tanh())


class Ours(nn.Module):
    """The same model, with rows of texts."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block(seed) for seed in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def bank() -> VectorBank:
    sites = ("layers.0", "layers.1.mlp", "layers.2:in")
    one = SteeringVector({site: drawn(D, seed=10 + place) for place, site in enumerate(sites)})
    return VectorBank({"one": one, "two": SteeringVector({"layers.0": drawn(D, seed=20)})})


def low_rank() -> LowRank:
    return LowRank({s: (drawn(2, D, seed=1) / 3, drawn(2, D, seed=2), drawn(2, seed=3)) for s in bank().sites})


def everywhere(edit: Any) -> dict[str, Any]:
    return {"one": edit}


EDITS: dict[str, Callable[[], Steering]] = {
    "Add": lambda: Steering(bank()),
    "Ablate": lambda: Steering(bank(), intervention=everywhere(Ablate())),
    "Ablate, around": lambda: Steering(bank(), intervention=everywhere(Ablate(around=drawn(D, seed=5)))),
    "Clamp": lambda: Steering(bank(), intervention=everywhere(Clamp(1.5))),
    "LowRank": lambda: Steering(bank(), intervention=everywhere(low_rank())),
    "Chain": lambda: Steering(bank(), intervention=everywhere(Chain(Ablate(), Add()))),
    "Affine": lambda: Steering(
        bank(), intervention=everywhere(Affine({s: (drawn(D, D, seed=4), drawn(D)) for s in bank().sites}))
    ),
}


def gate(kind: str, per: Any) -> Any:
    v = SteeringVector({"layers.0": drawn(D, seed=7)})
    probe = SteeringVector({"layers.0": drawn(D, seed=8)}, metadata={"offset layers.0": "0.2"})
    gates = {
        "projection": ProjectionAbove(v, 0.1, per=per),
        "cosine": CosineAbove(v, 0.1, per=per),
        "probe": ProbeAbove(probe, per=per),
        "soft": Soft(ProjectionAbove(v, 0.1, per=per), width=0.5),
    }
    gates["and not"] = And(gates["projection"], Not(gates["probe"]))
    return gates[kind]


class Engine:
    """The hooks and the passes on a fake model."""

    def __init__(self, steering: Steering, *, requests: int = 5, model: nn.Module | None = None) -> None:
        self.model = Theirs() if model is None else model
        self.served = served(steering)
        self.buffers = Buffers(self.served, tokens=64, requests=requests, device=torch.device("cpu"))
        self.hooks = Hooks(self.model, self.served, self.buffers)
        self.filler = Filler(self.served, self.buffers, check=self.hooks.check_fired)

    def begin(self, key: str, said: Any, prompt: int) -> None:
        """As the front end sends it."""
        wanted = self.served.asked({NAME: said})
        sent = None if wanted is None else {NAME: wanted.sent() | {"digest": self.served.digest}}
        self.filler.add(key, sent, prompt)

    def run(self, parts: list[tuple[str, int, Tensor]]) -> list[Tensor]:
        """One pass over the tokens of several requests."""
        self.filler.fill([Part(key, start, len(tokens)) for key, start, tokens in parts])
        out = self.model(torch.zeros(1), torch.cat([tokens for *_, tokens in parts]))
        return list(out.split([len(tokens) for *_, tokens in parts]))


def hooked(steering: Steering, c: Any, x: Tensor, **options: Any) -> Tensor:
    with Steerer(Ours(), steering, c=c, **options) as steerer:
        return steerer.model(x[None])[0]


@pytest.mark.parametrize("name", EDITS)
def test_the_engine_computes_what_a_steerer_does_with_another_strength_in_every_request(name: str) -> None:
    steering = EDITS[name]()
    engine, texts = Engine(steering), [drawn(4 + n, D, seed=30 + n) for n in range(3)]
    asked = [{"one": 1.0}, {"one": -0.5, "two": 2.0}, {"one": 0.0}]
    for number, c in enumerate(asked):
        engine.begin(str(number), c, len(texts[number]))
    found = engine.run([(str(number), 0, own) for number, own in enumerate(texts)])
    for own, c, text in zip(found, asked, texts, strict=True):
        assert torch.allclose(own, hooked(steering, c, text), atol=1e-5)


@pytest.mark.parametrize("name", EDITS)
def test_what_is_not_steered_is_bit_for_bit_what_it_is_beside_what_is(name: str) -> None:
    engine, text = Engine(EDITS[name]()), drawn(5, D, seed=3)
    engine.begin("plain", {"one": 0.0}, 5)
    engine.begin("steered", {"one": 1.0, "two": 1.0}, 5)
    both = torch.cat([text, text])
    plain = Theirs()(torch.zeros(1), both)[:5]
    assert torch.equal(bits(engine.run([("plain", 0, text), ("steered", 0, text)])[0]), bits(plain))


@pytest.mark.parametrize("kind", ["projection", "cosine", "probe", "soft", "and not"])
@pytest.mark.parametrize("per", ["token", "sequence", "last"])
def test_gates_decide_as_those_of_a_steerer(kind: str, per: str) -> None:
    steering = Steering(bank(), gate={"one": gate(kind, per)})
    engine, texts = Engine(steering), [drawn(5, D, seed=40 + n) for n in range(4)]
    decided = []
    for number, text in enumerate(texts):
        engine.begin(str(number), {"one": 1.0, "two": 0.5}, len(text))
        decided.append(hooked(steering, {"one": 1.0, "two": 0.5}, text, token_axis=1))
    found = engine.run([(str(number), 0, text) for number, text in enumerate(texts)])
    assert all(torch.allclose(own, want, atol=1e-5) for own, want in zip(found, decided, strict=True))
    plain = [hooked(steering, {"two": 0.5}, text) for text in texts]
    alike = [torch.allclose(own, want, atol=1e-3) for own, want in zip(found, plain, strict=True)]
    assert kind == "soft" or not all(alike)  # some are let through


def test_a_decision_holds_for_the_sequence_and_when_its_slot_was_needed() -> None:
    steering = Steering(bank(), gate=gate("projection", "sequence"))
    engine, texts = Engine(steering, requests=3), [drawn(5, D, seed=40 + n) for n in range(8)]
    for number, text in enumerate(texts):
        engine.begin(str(number), {"one": 1.0}, 5)
        engine.run([(str(number), 0, text)])  # from the third on they take the slots of others
    token = drawn(1, D, seed=50)
    mine = [gate("projection", "sequence")(Ours().layers[0](text).mean(dim=0)[None]).item() for text in texts]
    assert set(mine) == {True, False}
    for number, fires in [*enumerate(mine), *reversed(list(enumerate(mine))), (0, mine[0]), (2, mine[2])]:
        (found,) = engine.run([(str(number), 5, token)])
        assert torch.allclose(found, hooked(Steering(bank()), {"one": float(fires)}, token), atol=1e-5)


def test_a_prompt_in_parts_has_no_decision() -> None:
    engine = Engine(Steering(bank(), gate=gate("projection", "sequence")))
    engine.begin("a", {"one": 1.0}, 5)
    with pytest.raises(RuntimeError, match="whole prompt"):
        engine.run([("a", 0, drawn(3, D))])


def test_a_gate_reads_before_what_it_decides() -> None:
    late = ProjectionAbove(SteeringVector({"layers.2": drawn(D)}), 0.0, per="token")
    engine = Engine(Steering(bank(), gate={"two": late}))
    engine.begin("a", {"two": 1.0}, 5)
    with pytest.raises(GateError, match="runs later"):
        engine.run([("a", 0, drawn(5, D))])


def test_buffers_are_zero_behind_the_last_token_and_written_once_when_all_is_steady() -> None:
    engine, text = Engine(Steering(bank())), drawn(6, D)
    engine.begin("a", {"c": {"one": 1.0}, "positions": "generated"}, 6)
    engine.run([("a", 0, text)])
    assert not engine.buffers.strengths.any()
    engine.run([("a", 6, text[:1])])
    assert engine.buffers.strengths[:, 0].tolist() == [1.0] + [0.0] * 63
    engine.buffers.strengths[0, 0] = 7.0
    engine.run([("a", 7, text[:1])])
    assert engine.buffers.strengths[0, 0] == 7.0  # nothing had to be written
    engine.begin("b", {"two": 2.0}, 1)
    engine.run([("b", 0, text[:1])])
    assert engine.buffers.strengths[0].tolist() == [0.0, 2.0]  # another request of as many tokens
    engine.run([("b", 1, text), ("a", 8, text[:1])])
    assert engine.buffers.strengths[:7].tolist() == [[0.0, 2.0]] * 6 + [[1.0, 0.0]]
    engine.run([("a", 9, text[:1])])
    assert not engine.buffers.strengths[1:].any()


def test_another_bank_of_the_same_shape_takes_its_place_and_no_request_is_steered_by_both() -> None:
    engine, text = Engine(Steering(bank())), drawn(4, D)
    other = Steering(VectorBank({"three": 2 * bank()["one"], "four": bank()["two"]}))
    new = served(other)
    assert new.shape == engine.served.shape
    assert new.digest != engine.served.digest
    engine.begin("a", {"one": 1.0}, 4)
    engine.run([("a", 0, text)])
    engine.filler.replace(new)
    engine.hooks.replace(new)
    plain = Theirs()(torch.zeros(1), text)
    assert torch.equal(engine.run([("a", 4, text)])[0], plain)  # nobody waits for it, and the engine goes on
    engine.begin("late", {"one": 1.0}, 4)
    assert torch.equal(engine.run([("late", 0, text)])[0], plain)
    with pytest.raises(ModelMismatchError, match="another bank"):
        engine.filler.add("stray", {NAME: {"digest": "unheard of"}}, 4)
    engine.served = new
    engine.begin("b", {"three": 0.5}, 4)
    assert torch.allclose(engine.run([("b", 0, text)])[0], hooked(Steering(bank()), {"one": 1.0}, text), atol=1e-5)
    assert served(Steering(bank(), intervention=everywhere(Ablate()))).shape != new.shape


@pytest.mark.parametrize(
    ("steering", "error", "message"),
    [
        (lambda: Steering(bank(), intervention=KeepNorm(Add())), UnsupportedModelError, "not of the form"),
        (lambda: Steering(bank(), intervention=Ablate(one_sided=True)), UnsupportedModelError, "not of the form"),
        (lambda: Steering(bank(), intervention=Add(relative=True)), UnsupportedModelError, "not of the form"),
        (lambda: Steering(bank(), c=torch.ones(3)), StrengthError, "one row"),
        (lambda: Steering(bank(), gate=lambda_gate()), UnsupportedModelError, "what is served"),
    ],
)
def test_what_cannot_be_served_is_refused(steering: Callable[[], Steering], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        served(steering())


def lambda_gate() -> Any:
    class Mine:
        site, per = "layers.0", "token"

        def __call__(self, rows: Tensor) -> Tensor:
            return rows[:, 0] > 0

    return Mine()


def test_sites_that_vllm_has_otherwise_are_refused_before_anything_is_attached() -> None:
    model = Theirs()
    fused = Steering(SteeringVector({"layers.0": drawn(D), "layers.0.q_proj": drawn(D)}))
    with pytest.raises(SiteNotFoundError, match="computes q_proj, k_proj, v_proj in one module, qkv_proj"):
        Engine(fused, model=model)
    with pytest.raises(SiteNotFoundError, match="Close names"):
        Engine(Steering(SteeringVector({"layers.7": drawn(D)})), model=model)
    assert not list(model.buffers())
    assert not model.layers[0]._forward_hooks


def test_an_edit_that_reads_a_stream_in_parts_that_are_not_known_is_refused() -> None:
    stranger = type("CohereDecoderLayer", (nn.Module,), {"forward": LlamaDecoderLayer.forward})
    model = Theirs()
    model.layers[0] = stranger()
    with pytest.raises(UnsupportedModelError, match="in two parts"):
        Engine(EDITS["Ablate"](), model=model)
    Engine(Steering(bank()), model=Theirs())


class RMSNorm(nn.Module):
    """A norm as vLLM has them: it adds what it is given of the stream, and gives that too."""

    def forward_native(self, x: Tensor, residual: Tensor | None = None) -> Any:
        stream = x if residual is None else x + residual
        normed = stream / stream.norm(dim=-1, keepdim=True)
        return normed if residual is None else (normed, stream)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward_native(*args, **kwargs)


class Normed(nn.Module):
    """A model that norms a stream in two parts, and gives the normed and the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = RMSNorm()

    def forward(self, positions: Tensor, x: Tensor) -> Tensor:
        normed, stream = self.norm(x / 2, x / 2)
        return torch.cat([normed, stream], dim=1)


def test_a_norms_output_is_edited_and_not_the_stream_beside_it_and_its_input_is_refused() -> None:
    v, x = drawn(D, seed=5), drawn(4, D)
    engine = Engine(Steering(SteeringVector({"norm": v}, concept="v"), intervention=Ablate()), model=Normed())
    engine.begin("a", {"v": 1.0}, 4)
    normed, stream = engine.run([("a", 0, x)])[0].split(D, dim=1)
    plain = x / x.norm(dim=1, keepdim=True)
    assert torch.allclose(normed, Ablate()(plain, v, torch.tensor(1.0)), atol=1e-6)
    assert torch.equal(stream, x)
    with pytest.raises(UnsupportedModelError, match="would change the stream beside it"):
        Engine(Steering(SteeringVector({"norm:in": v})), model=Normed())


def test_what_gives_two_tensors_is_not_read() -> None:
    class LinearBase(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, x

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = LinearBase()

        def forward(self, positions: Tensor, x: Tensor) -> Tensor:
            return self.linear(x)[0]

    v = SteeringVector({"linear": drawn(D)}, concept="v")
    adding = Engine(Steering(v), model=Model())
    adding.begin("a", {"v": 2.0}, 1)
    assert torch.allclose(adding.run([("a", 0, torch.zeros(1, D))])[0], 2 * v["linear"][None])
    reading = Engine(Steering(v, intervention=Ablate()), model=Model())
    reading.begin("a", {"v": 2.0}, 1)
    with pytest.raises(OutputError, match="two tensors"):
        reading.run([("a", 0, torch.zeros(1, D))])


def test_names_are_those_of_hugging_face_and_another_process_may_have_the_module() -> None:
    class PPMissingLayer(nn.Identity):
        pass

    model = nn.ModuleDict({"language_model": Theirs()})
    model.hf_to_vllm_mapper = SimpleNamespace(map_name=lambda name: name.replace("model.text.", "language_model."))
    assert find(model, "model.text.layers.1.mlp", reads=True).place.name == "language_model.layers.1.mlp"
    model["language_model"].layers[2] = PPMissingLayer()
    assert find(model, "language_model.layers.2.mlp", reads=True) is None


def test_modules_that_vllm_runs_past_their_hooks_are_refused() -> None:
    model = Theirs()
    model.lm_head = type("ParallelLMHead", (nn.Linear,), {})(D, D)
    with pytest.raises(UnsupportedModelError, match="does not call this ParallelLMHead"):
        Engine(Steering(SteeringVector({"lm_head": drawn(D)})), model=model)


def test_features_on_another_axis_are_refused() -> None:
    v = SteeringVector({"layers.0": drawn(D)}, metadata={"axis layers.0": "1"})
    with pytest.raises(UnsupportedModelError, match="lie on axis 1"):
        served(Steering(v))


def test_parts_of_the_features_are_refused() -> None:
    part, whole = SteeringVector({"layers.0[0:2]": drawn(2)}), SteeringVector({"layers.0": drawn(D)})
    gate = ProjectionAbove(SteeringVector({"layers.0[0:2]": drawn(2)}), 0.0)
    for steering in (Steering(part), Steering(whole, gate=gate), Steering(VectorBank({"p": part, "w": whole}))):
        with pytest.raises(UnsupportedModelError, match=r"site 'layers.0\[0:2\]': whole activations are served"):
            served(steering)
    assert served(Steering(VectorBank({"p": part, "w": whole}), sites="layers.0")).stages.keys() == {"layers.0"}


def test_gated_concepts_at_other_sites_have_another_shape() -> None:
    one, other = (
        VectorBank({"a": SteeringVector(a), "b": SteeringVector(b)})
        for a, b in (
            ({"layers.0": drawn(D), "layers.1": drawn(D)}, {"layers.0": drawn(D)}),
            ({"layers.0": drawn(D)}, {"layers.0": drawn(D), "layers.1": drawn(D)}),
        )
    )
    assert served(Steering(one)).shape == served(Steering(other)).shape
    own = {"a": gate("projection", "token")}
    assert served(Steering(one, gate=own)).shape != served(Steering(other, gate=own)).shape


def test_a_vector_of_another_size_raises_when_the_model_runs() -> None:
    engine = Engine(Steering(SteeringVector({"layers.0": drawn(D + 1)})))
    engine.filler.add("a", None, 2)
    with pytest.raises(ShapeError, match="6 features, the vector 7"):
        engine.run([("a", 0, drawn(2, D))])


def test_a_site_that_does_not_run_is_noticed() -> None:
    model = Theirs()
    model.spare = nn.Linear(D, D)
    engine = Engine(Steering(SteeringVector({"layers.0": drawn(D), "spare": drawn(D)})), model=model)
    engine.hooks.check_fired()  # nothing has run: compiled code from a cache
    engine.filler.add("a", None, 2)
    engine.run([("a", 0, drawn(2, D))])
    with pytest.raises(SteeringNotApplied, match="spare"):
        engine.run([("a", 2, drawn(1, D))])


def config(**changed: Any) -> Any:
    parallel = SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1)
    compilation = SimpleNamespace(
        inductor_compile_config={}, pass_config=SimpleNamespace(enable_sp=False), max_cudagraph_capture_size=None
    )
    usual: dict[str, Any] = {
        "parallel_config": parallel,
        "compilation_config": compilation,
        "speculative_config": None,
        "model_config": model_config(),
        "kv_transfer_config": None,
        "device_config": SimpleNamespace(device_type="cpu"),
        "cache_config": SimpleNamespace(enable_prefix_caching=True),
        "scheduler_config": scheduler_config(),
        "additional_config": {},
    }
    return SimpleNamespace(**usual | changed)


def model_config(**changed: Any) -> Any:
    usual = {"is_encoder_decoder": False, "runner_type": "generate", "enable_prompt_embeds": False}
    return SimpleNamespace(**usual | {"is_multimodal_model": False, "dtype": torch.float32} | changed)


def scheduler_config(**changed: Any) -> Any:
    usual = {"enable_chunked_prefill": True, "long_prefill_token_threshold": 0}
    return SimpleNamespace(**usual | {"max_num_batched_tokens": 64, "max_num_seqs": 4} | changed)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"parallel_config": SimpleNamespace(use_ubatching=True)}, "dual-batch overlap"),
        ({"parallel_config": SimpleNamespace(prefill_context_parallel_size=2)}, "prefill context"),
        ({"compilation_config": SimpleNamespace(pass_config=SimpleNamespace(enable_sp=True))}, "sequence-parallel"),
        ({"compilation_config": SimpleNamespace(inductor_compile_config={"max_autotune": True})}, "max_autotune"),
        ({"speculative_config": object()}, "speculative decoding"),
        ({"cache_config": SimpleNamespace(kv_sharing_fast_prefill=True)}, "fast prefill"),
        ({"parallel_config": SimpleNamespace(use_sequence_parallel_moe=True)}, "sequence-parallel experts"),
        ({"model_config": model_config(is_encoder_decoder=True)}, "an encoder"),
        ({"model_config": model_config(is_diffusion=True)}, "a diffusion model"),
        ({"model_config": model_config(runner_type="pooling")}, "a model that pools"),
        ({"model_config": model_config(enable_prompt_embeds=True)}, "prompt embeddings"),
        ({"kv_transfer_config": object()}, "a KV connector"),
    ],
)
def test_ways_of_running_in_which_an_answer_could_be_wrong_are_refused(changed: Any, message: str) -> None:
    check_modes(config(), served(Steering(bank())))
    with pytest.raises(UnsupportedModelError, match=message):
        check_modes(config(**changed), served(Steering(bank())))


def test_a_decision_for_a_sequence_needs_prompts_that_are_computed_whole() -> None:
    steering = served(Steering(bank(), gate=gate("projection", "last")))
    with pytest.raises(UnsupportedModelError, match="prefix caching"):
        check_modes(config(), steering)
    off: Any = {"cache_config": SimpleNamespace(enable_prefix_caching=False)}
    with pytest.raises(UnsupportedModelError, match="chunked prefill"):
        check_modes(config(**off), steering)
    off["scheduler_config"] = scheduler_config(enable_chunked_prefill=False)
    check_modes(config(**off), steering)
    cut = scheduler_config(enable_chunked_prefill=False, long_prefill_token_threshold=32)
    with pytest.raises(UnsupportedModelError, match="long_prefill_token_threshold"):
        check_modes(config(**off | {"scheduler_config": cut}), steering)
    with pytest.raises(UnsupportedModelError, match="more than text"):
        check_modes(config(**off, model_config=model_config(is_multimodal_model=True)), steering)
    check_modes(config(model_config=model_config(is_multimodal_model=True)), served(Steering(bank())))


class Worker:
    """As vLLM's, with a runner of the first or of the second kind."""

    def __init__(self, runner: Any) -> None:
        self.vllm_config, self.model_runner, self.device = config(), runner, torch.device("cpu")


def first_runner(model: nn.Module) -> Any:
    runner = SimpleNamespace(get_model=lambda: model, requests={})
    runner.input_batch = SimpleNamespace(req_ids=[], num_computed_tokens_cpu=np.zeros(4, dtype=np.int32))
    runner.query_start_loc = SimpleNamespace(np=np.zeros(5, dtype=np.int32))
    runner._prepare_inputs = lambda scheduled: "prepared"
    return runner


def second_runner(model: nn.Module) -> Any:
    runner = SimpleNamespace(get_model=lambda: model)
    runner.add_requests = lambda scheduled: None
    runner.finish_requests = lambda scheduled: None
    runner.prepare_inputs = lambda batch: batch
    return runner


def sent(own: Served, said: Any) -> Any:
    wanted = own.asked({NAME: said})
    assert wanted is not None
    return {NAME: wanted.sent() | {"digest": own.digest}}


@pytest.mark.parametrize("kind", [first_runner, second_runner])
def test_both_of_vllms_runners_are_wired(kind: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "bank.safetensors"
    bank().save(path)
    log = SimpleNamespace(init_logger=lambda name: SimpleNamespace(info=lambda *args: None))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.logger", log)
    from actsteer.integrations.vllm.worker import Steered

    model, own = Theirs(), served(Steering(bank()))
    runner = kind(model)
    worker = Worker(runner)
    Steered(worker, str(path))
    assert worker.vllm_config.additional_config[NAME]["compiled_for"] == own.key
    text, params = drawn(5, D), SimpleNamespace(extra_args=sent(own, {"c": {"one": 1.0}, "positions": "2:"}))
    for start, stop in ((0, 3), (3, 5)):  # in two chunks
        if kind is first_runner:
            runner.requests = {"a": SimpleNamespace(sampling_params=params, num_prompt_tokens=5)}
            runner.input_batch.req_ids = ["a"]
            runner.input_batch.num_computed_tokens_cpu[0] = start
            runner.query_start_loc.np[1] = stop - start
            assert runner._prepare_inputs(None) == "prepared"
        else:
            new = [SimpleNamespace(req_id="a", sampling_params=params, prompt_len=5)]
            runner.add_requests(SimpleNamespace(scheduled_new_reqs=new if start == 0 else []))
            runner.prepare_inputs(
                SimpleNamespace(
                    req_ids=["a"],
                    query_start_loc_np=np.array([0, stop - start]),
                    num_computed_tokens_np=np.array([start]),
                )
            )
        found = model(torch.zeros(1), text[start:stop])
        want = hooked(Steering(bank()), {"one": 1.0}, text, positions=slice(2, None), token_axis=1)[start:stop]
        assert torch.allclose(found, want, atol=1e-5)
    again = SimpleNamespace(extra_args=sent(own, {"c": {"one": -1.0}}))  # another request of the same name
    if kind is first_runner:
        runner.requests, runner.input_batch.req_ids = {}, []
        runner._prepare_inputs(None)
        runner.requests = {"a": SimpleNamespace(sampling_params=again, num_prompt_tokens=5)}
        runner.input_batch.req_ids = ["a"]
        runner.input_batch.num_computed_tokens_cpu[0], runner.query_start_loc.np[1] = 0, 5
        runner._prepare_inputs(None)
    else:
        runner.finish_requests(SimpleNamespace(finished_req_ids={"a"}))
        new = [SimpleNamespace(req_id="a", sampling_params=again, prompt_len=5)]
        runner.add_requests(SimpleNamespace(scheduled_new_reqs=new))
        bounds, starts = np.array([0, 5]), np.array([0])
        runner.prepare_inputs(SimpleNamespace(req_ids=["a"], query_start_loc_np=bounds, num_computed_tokens_np=starts))
    want = hooked(Steering(bank()), {"one": -1.0}, text)
    assert torch.allclose(model(torch.zeros(1), text), want, atol=1e-5)


def test_another_request_of_the_same_name_is_steered_as_it_asks_and_decided_anew() -> None:
    plain = Engine(Steering(bank()))
    text = drawn(5, D, seed=3)
    for c in (1.0, -1.0, 0.0, 2.0):  # each ends before the next begins, and the engine says nothing of it
        said = sent(plain.served, {"c": {"one": c}}) if c else None
        plain.filler.add("a", said, 5, state=object())
        assert torch.allclose(plain.run([("a", 0, text)])[0], hooked(Steering(bank()), {"one": c}, text), atol=1e-5)
    for c in (1.0, -1.0):  # nothing is kept by which it could be told
        plain.filler.add("c", sent(plain.served, {"c": {"one": c}}), 5)
        assert torch.allclose(plain.run([("c", 0, text)])[0], hooked(Steering(bank()), {"one": c}, text), atol=1e-5)
    one = [drawn(1, D, seed=n) for n in (1, 2)]
    for c, token in zip((1.0, -1.0), one, strict=True):  # passes of one token each
        plain.filler.add("b", sent(plain.served, {"c": {"one": c}}), 1, state=object())
        assert torch.allclose(plain.run([("b", 0, token)])[0], hooked(Steering(bank()), {"one": c}, token), atol=1e-5)
    gated = Steering(bank(), gate={"one": gate("projection", "sequence")})
    engine = Engine(gated)
    for seed in range(40, 44):
        text = drawn(5, D, seed=seed)
        engine.filler.add("a", sent(engine.served, {"c": {"one": 1.0}}), 5, state=object())
        want = hooked(gated, {"one": 1.0}, text, token_axis=1)
        assert torch.allclose(engine.run([("a", 0, text)])[0], want, atol=1e-5)


def test_a_request_that_comes_back_keeps_its_decision() -> None:
    engine = Engine(Steering(bank(), gate=gate("projection", "sequence")))
    said = sent(engine.served, {"c": {"one": 1.0}})
    engine.filler.add("a", said, 5)
    engine.run([("a", 0, drawn(5, D))])
    engine.filler.add("a", dict(said), 5)
    engine.run([("a", 0, drawn(3, D))])  # a part of its prompt, which would else not do


def test_workers_take_a_bank_that_the_front_end_has_read_alone(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path, other = tmp_path / "bank.safetensors", tmp_path / "other.safetensors"
    bank().save(path)
    twice = VectorBank({name: 2 * own for name, own in bank().items()})
    twice.save(other)
    own = worker_of(Theirs(), path, monkeypatch)
    with pytest.raises(UnsupportedModelError, match="past the front end"):
        own.replace(str(other), digest=None)
    with pytest.raises(AttachedError, match="has changed while"):
        own.replace(str(other), digest=served(Steering(bank())).digest)
    assert own.replace(str(other), digest=served(Steering(twice)).digest) == served(Steering(twice)).digest


def worker_of(model: nn.Module, path: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    log = SimpleNamespace(init_logger=lambda name: SimpleNamespace(info=lambda *args: None))
    monkeypatch.setitem(sys.modules, "vllm", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "vllm.logger", log)
    from actsteer.integrations.vllm.worker import Steered

    return Steered(Worker(first_runner(model)), str(path))


@pytest.mark.parametrize("bank", [None, 5, [], [5], {"a": 1}, ["a", None]])
def test_a_bank_is_a_file_or_several(bank: Any) -> None:
    with pytest.raises(ValueError, match='expected "bank" to be a file, a pattern, or a list of them'):
        of_config(SimpleNamespace(additional_config={NAME: {"bank": bank}}))
    both = SimpleNamespace(additional_config={NAME: {"bank": ["a", Path("b")]}})
    assert of_config(both) == ["a", "b"]
    assert of_config(SimpleNamespace(additional_config={NAME: {"bank": Path("a")}})) == "a"


def front(path: Any, *, servers: int = 1, dtype: torch.dtype = torch.float32, **additional: Any) -> Front:
    given = {} if path is None else {NAME: {"bank": str(path)} | additional}
    parallel = SimpleNamespace(_api_process_count=servers)
    model = model_config(hf_config=SimpleNamespace(model_type="mine"), dtype=dtype)
    return Front(SimpleNamespace(additional_config=given, parallel_config=parallel, model_config=model))


def request(extra_args: Any, *, salt: str | None = None, resumable: bool = False) -> Any:
    return SimpleNamespace(
        sampling_params=SimpleNamespace(extra_args=extra_args),
        pooling_params=None,
        prompt_token_ids=[1, 2, 3],
        cache_salt=salt,
        resumable=resumable,
    )


def test_the_front_end_checks_and_salts(tmp_path: Any) -> None:
    path = tmp_path / "bank.safetensors"
    bank().save(path)
    own, given = front(path), {NAME: '{"one": 1.5}', "other": 1}
    wanted = request(given)
    own.admit(wanted)
    extra = wanted.sampling_params.extra_args
    assert extra["other"] == 1
    assert extra[NAME]["c"] == {"one": [1.5]}
    assert wanted.cache_salt.startswith("actsteer-")
    assert given == {NAME: '{"one": 1.5}', "other": 1}  # the caller's is as it was
    with pytest.raises(BatchError, match="4 are needed"):
        own.admit(request({NAME: {"c": {"one": 1.0}, "positions": -4}}))
    plain = request({NAME: {"one": 0.0}}, salt="mine")
    own.admit(plain)
    assert plain.sampling_params.extra_args is None
    assert plain.cache_salt == "mine"
    with pytest.raises(UnsupportedModelError, match="goes on later"):
        own.admit(request(given, resumable=True))


def test_an_engine_without_a_bank_answers_no_request_for_one(tmp_path: Any) -> None:
    own = front(None)
    own.admit(request(None))
    own.admit(request({"other": 1}))
    with pytest.raises(UnsupportedModelError, match="no bank"):
        own.admit(request({NAME: {"one": 1.0}}))
    with pytest.raises(ValueError, match="no such option, 'bnk'"):
        front(tmp_path / "x.safetensors", bnk=1)


def test_a_bank_of_another_kind_of_model_does_not_start(tmp_path: Any) -> None:
    v = SteeringVector({"layers.0": drawn(D)}, metadata={"model_type": "gpt2"})
    v.save(tmp_path / "v.safetensors")
    with pytest.raises(ModelMismatchError, match="made for a gpt2, and the engine serves a mine"):
        front(tmp_path / "v.safetensors")


def test_the_front_end_learns_of_another_bank(tmp_path: Any) -> None:
    bank().save(tmp_path / "one.safetensors")
    twice = VectorBank({name: 2 * own for name, own in bank().items()})
    twice.save(tmp_path / "two.safetensors")
    own = front(tmp_path / "one.safetensors")
    before, after = request({NAME: {"one": 1.0}}), request({NAME: {"one": 1.0}})
    own.admit(before)
    with pytest.raises(AttachedError, match="running"):
        own.replacing(str(tmp_path / "two.safetensors"), unfinished=1)
    with pytest.raises(UnsupportedModelError, match="several API servers"):
        front(tmp_path / "one.safetensors", servers=2).replacing("two", unfinished=0)
    own.replaced(own.replacing(str(tmp_path / "two.safetensors"), unfinished=0))
    own.admit(after)
    assert before.cache_salt != after.cache_salt
    own.replaced(own.replacing(str(tmp_path / "one.safetensors"), unfinished=0))
    again = request({NAME: {"one": 1.0}})
    own.admit(again)
    assert again.cache_salt != before.cache_salt  # what ran beside a replacement has written under that salt
    with pytest.raises(UnsupportedModelError, match="no bank that could"):
        front(None).replacing("x", unfinished=0)


def test_no_steered_request_reaches_the_engine_while_a_bank_is_replaced_nor_one_that_was_checked_before(
    tmp_path: Any,
) -> None:
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    bank().save(one)
    VectorBank({name: 2 * own for name, own in bank().items()}).save(two)
    own, steered, plain = front(one), request({NAME: {"one": 1.0}}), request(None)
    own.admit(steered)
    own.confirm(steered)
    first = own.replacing(str(two), unfinished=0)
    with pytest.raises(AttachedError, match="is being replaced"):
        own.confirm(steered)
    own.confirm(plain)
    second = own.replacing(str(one), unfinished=0)  # before the first is done
    own.replaced(first)
    with pytest.raises(AttachedError, match="is being replaced"):
        own.confirm(steered)
    own.replaced(second)
    own.confirm(steered)
    own.replaced(own.replacing(str(two), unfinished=0))
    with pytest.raises(ModelMismatchError, match="was replaced since"):
        own.confirm(steered)
    for strange in ("{}", {"one": 1.0}):
        with pytest.raises(ModelMismatchError):
            own.confirm(request({NAME: strange}))  # which no front end has checked


def test_a_request_that_pools_is_not_taken_for_a_steered_one(tmp_path: Any) -> None:
    bank().save(tmp_path / "one.safetensors")
    for own in (front(tmp_path / "one.safetensors"), front(None)):
        asking = request(None)
        asking.sampling_params, asking.pooling_params = None, SimpleNamespace(extra_kwargs={NAME: {"one": 1.0}})
        with pytest.raises(UnsupportedModelError, match="pools"):
            own.admit(asking)
        asking.pooling_params.extra_kwargs = None
        own.admit(asking)


@pytest.mark.parametrize("name", ["Add", "Ablate", "LowRank", "Affine"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_strength_by_which_numbers_overflow_is_refused(name: str, dtype: torch.dtype, tmp_path: Any) -> None:
    EDITS[name]().save(tmp_path / "bank.safetensors")
    own = front(tmp_path / "bank.safetensors", dtype=dtype)
    for c in (1.0, -10.0, [0.0, 10.0]):
        own.admit(request({NAME: {"c": {"one": c, "two": 1.0}}}))
    for c in (1e38, -1e30, [0.0, 3e20, 0.0], torch.finfo(dtype).max / 10 if dtype is torch.float16 else 1e19):
        with pytest.raises(StrengthError, match=f"in {dtype} at most"):
            own.admit(request({NAME: {"c": {"one": c}}}))


def test_strengths_add_up_over_sites_and_concepts() -> None:
    v = SteeringVector({f"layers.{number}": torch.full((D,), 100.0) for number in range(3)})
    own = served(Steering(VectorBank({"a": v, "b": -v})))
    limit = torch.finfo(torch.float16).max / 16
    for c, fits in (({"a": limit / 301}, True), ({"a": limit / 299}, False), (dict.fromkeys("ab", limit / 299), False)):
        wanted = own.asked({NAME: c})
        assert wanted is not None
        if fits:
            own.check_sizes(wanted, torch.float16)
        else:
            with pytest.raises(StrengthError, match="summed over the sites"):
                own.check_sizes(wanted, torch.float16)


def test_several_files_make_one_bank(tmp_path: Any) -> None:
    for name in bank():
        edit = {"intervention": Ablate()} if name == "two" else {}
        Steering(bank().select(name), **edit).save(tmp_path / f"{name}.safetensors")
    from actsteer.integrations.vllm.banks import load

    several = load([str(tmp_path / "one.safetensors"), str(tmp_path / "two.safetensors")])
    assert (
        several.digest == served(Steering(bank(), c=dict.fromkeys(bank(), 1.0), intervention={"two": Ablate()})).digest
    )
    assert load(str(tmp_path / "*.safetensors")).digest == several.digest  # though one of them is more than vectors
    gated = Steering(bank().select("two"), gate=gate("projection", "token"))
    gated.save(tmp_path / "two.safetensors")
    own = load(str(tmp_path / "*.safetensors"))
    assert (list(own.gates), own.scores[0].site) == ([1], "layers.0")
    Steering(bank().select("two"), sites="layers.0").save(tmp_path / "two.safetensors")
    with pytest.raises(ValueError, match="steers some of its sites alone"):
        load(str(tmp_path / "*.safetensors"))
    with pytest.raises(ValueError, match="in two files"):
        load([str(tmp_path / "one.safetensors")] * 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_graphs_read_what_is_in_the_buffers() -> None:
    model = Theirs().cuda()
    own = served(EDITS["Ablate"]())
    buffers = Buffers(own, tokens=8, requests=3, device=torch.device("cuda"))
    Hooks(model, own, buffers)
    x, positions = torch.randn(8, D, device="cuda"), torch.zeros(1, device="cuda")
    model(positions, x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = model(positions, x)
    for strength in (0.0, 1.0, -0.5):
        buffers.strengths[:, 0] = strength
        graph.replay()
        assert torch.allclose(out, model(positions, x), atol=1e-5)
