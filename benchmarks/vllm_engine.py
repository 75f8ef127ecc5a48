"""A steering's file served by vLLM: `python -m benchmarks.vllm_engine JOB.json ANSWERS.json`, by vLLM's own python."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_CI_ENV": "1",  # no warm-up
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
"""Of a small engine on the CPU, in one process."""


def main(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The greedy answers to all prompts at each strength, all of them in one batch."""
    os.environ.update(ENVIRONMENT)
    from vllm import LLM, SamplingParams

    from actsteer.integrations.vllm import steer

    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "skip_tokenizer_init": True}
    llm = LLM(job["model"], **options, additional_config={"actsteer": {"bank": job["steering"]}})
    usual = {"max_tokens": job["tokens"], "temperature": 0, "logprobs": 0, "detokenize": False, "ignore_eos": True}
    asked = [(c, {"prompt_token_ids": prompt}) for c in job["strengths"] for prompt in job["prompts"]]
    params = [SamplingParams(**usual, extra_args=steer(c)) for c, _ in asked]
    made = [own.outputs[0] for own in llm.generate([prompt for _, prompt in asked], params, use_tqdm=False)]
    return [
        {"tokens": list(own.token_ids), "logprobs": [next(iter(step.values())).logprob for step in own.logprobs]}
        for own in made
    ]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(main(json.loads(Path(sys.argv[1]).read_text()))))
