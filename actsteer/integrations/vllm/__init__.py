"""vLLM: a bank served by a stock engine, with another steering for every request.

llm = LLM(MODEL, additional_config={"actsteer": {"bank": "tone.safetensors"}})
llm.generate(["Hello"], SamplingParams(extra_args=steer({"polite": 1.5})))
"""

from actsteer.integrations.vllm.requests import steer

__all__ = ["steer"]
