"""vLLM answers what the hooked transformers model answers: `.ci/vllm` runs these, in an environment of vLLM's."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.vllm_engine import ENVIRONMENT
from tests.integrations.vllm.reference import FAMILIES

REFERENCE = os.environ.get("ACTSTEER_VLLM_REFERENCE")
"""The folder that `tests.integrations.vllm.reference` has written."""
pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vLLM"),
    pytest.mark.skipif(REFERENCE is None, reason="needs the answers of transformers, ACTSTEER_VLLM_REFERENCE"),
]
V2 = {"VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1"}
SEVERAL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
COMPILED = {"VLLM_CPU_CI_ENV": "0"}


def group(name: str) -> dict[str, Any]:
    assert REFERENCE is not None
    groups: dict[str, Any] = json.loads((Path(REFERENCE) / "groups.json").read_text())
    if name not in groups:
        pytest.skip(f"{name}: no such model was installed when the reference was written")
    return groups[name]


def done(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What an engine in a process of its own makes of a job."""
    given, made = folder / "job.json", folder / "answers.json"
    given.write_text(json.dumps(job))
    command = [sys.executable, "-m", "tests.integrations.vllm.engine", str(given), str(made)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=1500, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-6000:]
    found: dict[str, Any] = json.loads(made.read_text())
    return found


def serve(name: str, folder: Path, **job: Any) -> dict[str, Any]:
    """A group's requests at once, in order and then from the last to the first."""
    own = group(name)
    batches = [own["requests"], own["requests"][::-1]]
    options = own.get("engine", {}) | job.pop("engine", {})
    return done({"model": own["model"], "bank": own["bank"], "batches": batches, "engine": options} | job, folder)


def wrong(name: str, found: dict[str, Any]) -> list[str]:
    """The answers that are not those of the hooked model."""
    own = group(name)
    expected = [own["expected"], own["expected"][::-1]]
    requests = [own["requests"], own["requests"][::-1]]
    each = [
        (want, got, request)
        for batch, answers, asked in zip(expected, found["answers"], requests, strict=True)
        for want, got, request in zip(batch, answers, asked, strict=True)
    ]
    same = [(want, got) for want, got, _ in each if want["tokens"] == got["tokens"]]
    apart = max((furthest(want, got) for want, got in same), default=0.0)
    counts = f"{found['preempted']} preemptions, {found['cached']} tokens from the cache"
    print(f"{name}: {len(same)} of {len(each)} equal, log-probabilities within {apart:.2g}; {counts}")
    return [
        f"{request['c']} at {request['positions']}, prompt of {len(request['ids'])}"
        for want, got, request in each
        if want["tokens"] != got["tokens"] or furthest(want, got) > 1e-4
    ]


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True))


WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks": {"engine": {"max_num_batched_tokens": 24, "max_num_seqs": 8}},
    "chunks of one token": {"engine": {"long_prefill_token_threshold": 1}},
    "preempted": {"engine": {"num_gpu_blocks_override": 13}},
    "several processes": {"environment": SEVERAL},
    "tensor parallel": {"engine": {"tensor_parallel_size": 2}},
    "compiled": {"engine": {"enforce_eager": False}, "environment": COMPILED},
    "second model runner": {"environment": V2},
    "second model runner, preempted": {"environment": V2, "engine": {"num_gpu_blocks_override": 13}},
}


@pytest.mark.parametrize("way", WAYS)
def test_the_engine_answers_what_the_hooked_model_answers(way: str, tmp_path: Path) -> None:
    found = serve("adding", tmp_path, **WAYS[way])
    assert not wrong("adding", found)
    assert found["cached"] > 0  # else it would not matter whether the cache is salted
    if "preempted" in way:
        assert found["preempted"] > 0


def test_without_the_salt_answers_are_wrong(tmp_path: Path) -> None:
    assert wrong("adding", serve("adding", tmp_path, salted=False))  # else the tests above prove nothing


@pytest.mark.parametrize("what", ["adding", "editing"])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, what: str, tmp_path: Path) -> None:
    name = f"{what}-{family}"
    assert not wrong(name, serve(name, tmp_path))


@pytest.mark.parametrize("family", ["GPT2", "Phi3", "Llama"])
def test_sites_elsewhere(family: str, tmp_path: Path) -> None:
    name = f"elsewhere-{family}"
    assert not wrong(name, serve(name, tmp_path))


@pytest.mark.parametrize("runner", [{}, V2], ids=["first", "second"])
@pytest.mark.parametrize("per", ["token", "sequence", "last"])
def test_gates(per: str, runner: dict[str, str], tmp_path: Path) -> None:
    name = f"gated-{per}"
    assert not wrong(name, serve(name, tmp_path, environment=runner))


@pytest.mark.parametrize("runner", [{}, V2], ids=["first", "second"])
def test_a_decision_survives_preemption(runner: dict[str, str], tmp_path: Path) -> None:
    found = serve("gated-sequence", tmp_path, engine={"num_gpu_blocks_override": 13}, environment=runner)
    assert not wrong("gated-sequence", found)
    assert found["preempted"] > 0


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_folded_checkpoint_is_served_unchanged(family: str, tmp_path: Path) -> None:
    name = f"folded-{family}"
    assert not wrong(name, serve(name, tmp_path, environment={"VLLM_PLUGINS": ""}))


@pytest.mark.parametrize("family", ["Llama", "Qwen2"])
def test_adapters_are_served_side_by_side_without_the_plugin(family: str, tmp_path: Path) -> None:
    name = f"adapters-{family}"
    assert not wrong(name, serve(name, tmp_path, environment={"VLLM_PLUGINS": ""}))
    tokens = [answer["tokens"] for answer in group(name)["expected"]]
    adapted = {tuple(own) for own in tokens[:6]}, {tuple(own) for own in tokens[6:12]}
    assert not adapted[0] & adapted[1] and not (adapted[0] | adapted[1]) & {tuple(own) for own in tokens[12:]}


def test_a_bank_is_replaced_at_run_time(tmp_path: Path) -> None:
    own = group("adding")
    twice = own["bank"].replace("adding", "adding-twice")
    job = {"model": own["model"], "bank": own["bank"], "batches": [own["requests"]], "replace": twice}
    found = done(job, tmp_path)
    before, after = found["answers"]
    assert [answer["tokens"] for answer in before] == [answer["tokens"] for answer in own["expected"]]
    expected = group("adding-twice")["expected"]
    assert [answer["tokens"] for answer in after] == [answer["tokens"] for answer in expected]
    assert expected != own["expected"]


def test_a_request_that_comes_while_a_bank_is_replaced_is_refused_or_right_and_the_engine_lives(tmp_path: Path) -> None:
    own = group("adding")
    twice = own["bank"].replace("adding", "adding-twice")
    steered = [n for n, request in enumerate(own["requests"]) if any(request["c"].values())]
    job = {"model": own["model"], "bank": own["bank"], "replace": twice, "environment": SEVERAL, "meanwhile": True}
    found = done(job | {"batches": [[own["requests"][n] for n in steered]]}, tmp_path)
    before, after = ([group(name)["expected"][n]["tokens"] for n in steered] for name in ("adding", "adding-twice"))
    assert [answer.get("tokens") for answer in found["before"]] == before
    assert [answer.get("tokens") for answer in found["after"]] == after
    refused = [answer for answer in found["meanwhile"] if "replaced" in answer.get("error", "")]
    assert refused
    for answer, tokens in zip(found["meanwhile"], after, strict=True):
        assert answer in refused or answer["tokens"] == tokens
    assert not found["errored"]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "a concept": ({"c": {"polte": 1.0}}, "Close names: 'polite'"),
    "a strength": ({"c": {"polite": "much"}}, "expected a number"),
    "a strength that overflows": ({"c": {"polite": 3.4e38}}, "at most 1.15e+18 is served"),
    "a position that no text has": ({"c": {"polite": 1.0}, "positions": [10**30]}, "no text is as long"),
    "a slice that stands still": ({"c": {"polite": 1.0}, "positions": "::0"}, "forward"),
    "positions": ({"c": {"polite": 1.0}, "positions": "some"}, "expected all, last, prompt"),
    "a position": ({"c": {"polite": 1.0}, "positions": -40}, "40 are needed"),
    "JSON": ({"extra_args": {"actsteer": "{"}}, "expected JSON"),
    "a name": ({"extra_args": {"acsteer": "{}"}}, "did you mean 'actsteer'"),
    "another name": ({"extra_args": {"steering": "{}"}}, "did you mean 'actsteer'"),
}


WHOLE = {"enable_prefix_caching": False, "enable_chunked_prefill": False}
CONNECTOR = {"kv_connector": "ExampleConnector", "kv_role": "kv_both"}


def test_what_is_wrong_with_a_request_is_refused_and_the_engine_lives(tmp_path: Path) -> None:
    own = group("adding")
    plain = {"ids": [5, 6, 7], "c": {}, "positions": None}
    batches = [[plain | wrong] for wrong, _ in WRONG.values()] + [own["requests"]]
    found = done({"model": own["model"], "bank": own["bank"], "batches": batches}, tmp_path)["answers"]
    for (_, message), ((answer,)) in zip(WRONG.values(), found[:-1], strict=True):
        assert message in answer["error"]
        assert "VLLMValidationError" in answer["error"]  # HTTP 400
    assert [answer["tokens"] for answer in found[-1]] == [answer["tokens"] for answer in own["expected"]]


@pytest.mark.parametrize(
    ("model", "bank", "engine", "message"),
    [
        ("adding", "editing-GPT2", {}, "was made for a gpt2"),
        ("adding", "adding-Qwen2", {}, "was made for a qwen2"),
        ("adding", "adding-fused", {}, "vLLM computes q_proj, k_proj, v_proj in one module"),
        ("adding", "adding-activation", {}, "SiluAndMul is no block"),
        ("adding-Qwen3", "adding-heads", {}, "RMSNorm is no block"),
        ("adding-Gemma2", "adding-scaled", {}, "does more than look up"),
        ("adding", "gated-sequence", {}, "prefix caching"),
        ("adding", "gated-sequence", {"enable_prefix_caching": False}, "chunked prefill"),
        ("adding", "gated-sequence", WHOLE | {"long_prefill_token_threshold": 32}, "which cuts prompts"),
        ("adding", "adding", {"runner": "pooling"}, "a model that pools"),
        ("adding", "adding", {"enable_prompt_embeds": True}, "prompt embeddings"),
        ("adding", "adding", {"kv_transfer_config": CONNECTOR}, "a KV connector"),
    ],
)
def test_what_cannot_be_served_stops_the_start(
    model: str, bank: str, engine: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = group("adding")["bank"].replace("adding", bank)
    with pytest.raises(AssertionError, match=message):
        done({"model": group(model)["model"], "bank": file, "batches": [], "engine": engine}, tmp_path)


@pytest.mark.real
@pytest.mark.parametrize("way", ["at once", "compiled"])
def test_smollm2(way: str, tmp_path: Path) -> None:
    assert not wrong("smollm2", serve("smollm2", tmp_path, **WAYS[way]))


@pytest.mark.real
def test_the_page_about_serving_runs_as_it_stands(tmp_path: Path) -> None:
    own = group("smollm2")
    page = (Path(__file__).parents[3] / "docs" / "howto" / "compile-sweep-serve.md").read_text()
    (block,) = re.findall(r"^```py\n(.*?)^```", page, flags=re.M | re.S)
    (tmp_path / "tone.safetensors").write_bytes(Path(own["bank"]).read_bytes())
    (tmp_path / "page.py").write_text(f"MODEL = {own['model']!r}\n{block}")
    spawned = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
    environment = os.environ | ENVIRONMENT | COMPILED | spawned
    ended = subprocess.run([sys.executable, "page.py"], cwd=tmp_path, env=environment, check=False, timeout=1500)
    assert ended.returncode == 0


@pytest.mark.real
def test_verify_compares_the_engine_with_the_hooked_model(tmp_path: Path) -> None:
    own = group("smollm2")
    (tmp_path / "prompts.txt").write_text("The weather today is\nOnce upon a time\n")
    options = ["-m", own["model"], "--on", "prompts.txt", "-c", "polite=1", "--engine", "vllm"]
    command = [str(Path(sys.executable).with_name("actsteer")), "verify", own["bank"], *options]
    for plugins, code in ((None, 0), ("", 1)):  # the second engine answers unsteered
        environment = os.environ | ENVIRONMENT | ({} if plugins is None else {"VLLM_PLUGINS": plugins})
        ended = subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=1500
        )
        assert ended.returncode == code, ended.stdout + ended.stderr
        assert code or "both in float32" in ended.stdout  # as its weights are, and not as vLLM would choose


@pytest.mark.real
def test_the_server_answers_clients_at_once_and_says_what_is_wrong(tmp_path: Path) -> None:
    own = group("smollm2")
    port = free_port()
    given = json.dumps({"actsteer": {"bank": own["bank"]}})
    options = ["--model", own["model"], "--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *options, "--additional-config", given]
    environment = os.environ | ENVIRONMENT | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen([*command, "--port", str(port)], env=environment, stdout=log, stderr=log)
        try:
            wait_for(port, server)
            asked = [(request, expected) for request, expected in zip(own["requests"], own["expected"], strict=True)]
            with ThreadPoolExecutor(8) as clients:
                found = list(clients.map(lambda pair: completed(port, own["model"], pair[0]), asked))
            for (request, expected), (status, answer) in zip(asked, found, strict=True):
                assert status == 200
                assert answer["choices"][0]["token_ids"] == expected["tokens"], request
            plain = {"ids": [5, 6, 7], "positions": None}
            for wrong, more, message in (
                ({"c": {"polte": 1.0}}, {}, "Close names: 'polite'"),
                ({"c": {"polite": 1.0}}, {"use_beam_search": True, "n": 2}, "beam search"),
                ({"c": {"polite": 1.0}, "positions": "some"}, {}, "expected all, last, prompt"),
            ):
                status, answer = completed(port, own["model"], plain | wrong, **more)
                assert status == 400
                assert message in json.dumps(answer)
            scored = {"model": own["model"], "query": [5, 6], "items": [[7]], "label_token_ids": [8, 9]}
            assert posted(port, "/generative_scoring", scored)[0] == 200
            said = {"vllm_xargs": {"actsteer": '{"c": {"polite": 1.0}}'}}
            status, answer = posted(port, "/generative_scoring", scored | said)
            assert (status, "would answer unsteered" in json.dumps(answer)) == (400, True)
        finally:
            server.terminate()
            server.wait(60)


def free_port() -> int:
    with socket.socket() as own:
        own.bind(("localhost", 0))
        return int(own.getsockname()[1])


def wait_for(port: int, server: subprocess.Popen[bytes]) -> None:
    while server.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5):
            return
        time.sleep(1)
    raise AssertionError(f"the server ended with {server.returncode}")


def completed(port: int, model: str, request: dict[str, Any], **more: Any) -> tuple[int, Any]:
    """What the server makes of one of a group's requests."""
    said = json.dumps({"c": request["c"], "positions": request["positions"]})
    usual = {"model": model, "max_tokens": 16, "min_tokens": 16, "temperature": 0, "return_token_ids": True}
    return posted(port, "/v1/completions", usual | {"prompt": request["ids"], "vllm_xargs": {"actsteer": said}} | more)


def posted(port: int, path: str, body: dict[str, Any]) -> tuple[int, Any]:
    """The status and the answer to one request over HTTP."""
    sent = urllib.request.Request(
        f"http://localhost:{port}{path}",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(sent, timeout=600) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)
