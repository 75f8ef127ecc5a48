"""Engine: a job done by vLLM in a process of its own, for an engine leaves much behind.

`python -m tests.integrations.vllm.engine JOB.json ANSWERS.json`, in vLLM's environment.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from benchmarks.vllm_engine import ENVIRONMENT

TOKENS = 16


def main(job: dict[str, Any]) -> dict[str, Any]:
    """What the engine answered, and what it counted."""
    os.environ.update(ENVIRONMENT | job.get("environment", {}))
    if os.environ.get("TRITON_INTERPRET"):
        interpret_triton()
    if not job.get("salted", True):
        from actsteer.integrations.vllm.requests import Request

        Request.salt = lambda self, digest, prompt, given: given  # type: ignore[method-assign]
    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "block_size": 32, "seed": 0}
    options = usual | {"skip_tokenizer_init": True, "disable_log_stats": False} | job.get("engine", {})
    if job["bank"] is not None:
        options["additional_config"] = {"actsteer": {"bank": job["bank"]}}
    if job.get("meanwhile"):
        return asyncio.run(replaced_meanwhile(job, options))
    from vllm import LLM

    llm = LLM(job["model"], **options)
    found: dict[str, Any] = {"answers": [answered(llm, batch) for batch in job["batches"]]}
    if job.get("replace"):
        found["replaced"] = llm.collective_rpc("actsteer_replace_bank", args=(job["replace"],))
        found["answers"] += [answered(llm, batch) for batch in job["batches"]]
    counted = {own.name: getattr(own, "value", None) for own in llm.get_metrics()}
    names = {"preempted": "vllm:num_preemptions", "cached": "vllm:prefix_cache_hits"}
    return found | {name: counted.get(own) for name, own in names.items()}


def interpret_triton() -> None:
    """Triton's interpreter is no backend to vLLM, which asks for one where the second model runner is to run."""
    from triton.backends import backends

    driver = type("Driver", (), {"is_active": staticmethod(lambda: True)})
    backends["cpu"] = SimpleNamespace(driver=driver, compiler=None)


async def replaced_meanwhile(job: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """What requests are answered that come while a bank is replaced, and those that come then."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(AsyncEngineArgs(job["model"], **options))

    async def answer(number: int, request: dict[str, Any]) -> dict[str, Any]:
        prompt = {"prompt_token_ids": request["ids"]}
        try:
            made = [own async for own in engine.generate(prompt, params(request), str(number))]
        except VLLMValidationError as error:
            return {"error": str(error)}
        return {"tokens": list(made[-1].outputs[0].token_ids)}

    async def answers(start: int) -> list[dict[str, Any]]:
        return await asyncio.gather(*(answer(start + n, own) for n, own in enumerate(job["batches"][0])))

    found = {"before": await answers(0)}
    replacing = asyncio.create_task(engine.collective_rpc("actsteer_replace_bank", args=(job["replace"],)))
    await asyncio.sleep(0)
    found["meanwhile"] = await answers(1000)
    await replacing
    return found | {"after": await answers(2000), "errored": engine.errored}


def params(request: dict[str, Any]) -> Any:
    """What is asked for."""
    from vllm import SamplingParams

    said = {"c": request["c"], "positions": request["positions"]}
    extra = {"actsteer": json.dumps(said)} if request["c"] else request.get("extra_args")
    return SamplingParams(
        max_tokens=TOKENS, min_tokens=TOKENS, temperature=0, logprobs=0, detokenize=False, extra_args=extra
    )


def answered(llm: Any, requests: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to requests that come at once; of one that is refused, why."""
    from vllm.exceptions import VLLMValidationError
    from vllm.lora.request import LoRARequest

    prompts = [{"prompt_token_ids": request["ids"]} for request in requests]
    adapters = sorted({request["adapter"] for request in requests if request.get("adapter")})
    known = {path: LoRARequest(path, number, path) for number, path in enumerate(adapters, 1)}
    loras = [known.get(request.get("adapter", "")) for request in requests]
    try:
        outputs = llm.generate(
            prompts, [params(request) for request in requests], lora_request=loras if known else None, use_tqdm=False
        )
    except VLLMValidationError as error:
        return [{"error": f"{type(error).__name__}: {error}"}]
    return [
        {
            "tokens": list(own.outputs[0].token_ids),
            "logprobs": [float(next(iter(step.values())).logprob) for step in own.outputs[0].logprobs],
        }
        for own in outputs
    ]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
