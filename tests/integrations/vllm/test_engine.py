"""vLLM answers what the hooked transformers model answers: `.ci/vllm` runs these, in an environment of vLLM's."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

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
    return [
        f"{request['c']} at {request['positions']}, prompt of {len(request['ids'])}"
        for batch, answers, asked in zip(expected, found["answers"], requests, strict=True)
        for want, got, request in zip(batch, answers, asked, strict=True)
        if want["tokens"] != got["tokens"] or furthest(want, got) > 1e-4
    ]


def furthest(one: dict[str, Any], other: dict[str, Any]) -> float:
    return max(abs(a - b) for a, b in zip(one["logprobs"], other["logprobs"], strict=True))


WAYS: dict[str, dict[str, Any]] = {
    "at once": {},
    "chunks of one token": {"engine": {"max_num_batched_tokens": 8, "max_num_seqs": 8, "max_model_len": 256}},
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


@pytest.mark.parametrize("runner", [{}, V2], ids=["first", "second"])
@pytest.mark.parametrize("per", ["token", "sequence", "last"])
def test_gates(per: str, runner: dict[str, str], tmp_path: Path) -> None:
    name = f"gated-{per}"
    assert not wrong(name, serve(name, tmp_path, environment=runner))


def test_a_decision_survives_preemption(tmp_path: Path) -> None:
    found = serve("gated-sequence", tmp_path, engine={"num_gpu_blocks_override": 13})
    assert not wrong("gated-sequence", found)
    assert found["preempted"] > 0


@pytest.mark.parametrize("family", ["Llama", "GPT2"])
def test_a_folded_checkpoint_is_served_unchanged(family: str, tmp_path: Path) -> None:
    name = f"folded-{family}"
    assert not wrong(name, serve(name, tmp_path, environment={"VLLM_PLUGINS": ""}))


@pytest.mark.real
@pytest.mark.parametrize("way", ["at once", "compiled"])
def test_smollm2(way: str, tmp_path: Path) -> None:
    assert not wrong("smollm2", serve("smollm2", tmp_path, **WAYS[way]))
