"""Worker: in each process that computes, the hooks are put on the model, and the strengths written before each pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from actsteer.errors import AttachedError, UnsupportedModelError
from actsteer.integrations.vllm import banks
from actsteer.integrations.vllm.filling import Filler, Part
from actsteer.integrations.vllm.front import REPLACE, check_fits
from actsteer.integrations.vllm.hooks import Buffers, Hooks
from actsteer.integrations.vllm.requests import NAME
from actsteer.integrations.vllm.served import Served


@final
class Steered:
    """The steering of a worker's model.

    Args:
        worker: of vLLM, whose model is loaded and neither compiled nor captured.
        bank: the files.

    Raises:
        UnsupportedModelError: the engine runs in a way in which an answer could be wrong.
        SiteNotFoundError, FileFormatError: and nothing is attached.
    """

    def __init__(self, worker: Any, bank: str | Sequence[str]) -> None:
        config, runner = worker.vllm_config, worker.model_runner
        self._served = banks.load(bank)
        check_modes(config, self._served)
        scheduler, compilation = config.scheduler_config, config.compilation_config
        captured = compilation.max_cudagraph_capture_size or 0
        buffers = Buffers(
            self._served,
            tokens=max(scheduler.max_num_batched_tokens, captured, scheduler.max_num_seqs),
            requests=scheduler.max_num_seqs + 1,
            device=worker.device,
        )
        self._hooks = Hooks(runner.get_model(), self._served, buffers)
        self._filler = Filler(self._served, buffers, check=self._hooks.check_fired)
        if hasattr(runner, "_prepare_inputs"):
            _watch_first(runner, self._filler)
        elif hasattr(runner, "prepare_inputs"):
            _watch_second(runner, self._filler)
        else:
            raise UnsupportedModelError(f"{type(runner).__name__}: this model runner of vLLM is not known")
        config.additional_config = {**config.additional_config, NAME: {"bank": bank, "compiled_for": self._served.key}}
        from vllm.logger import init_logger

        init_logger(f"vllm.{NAME}").info(
            "actsteer: %s of %s, at %s", ", ".join(self._served.concepts), bank, ", ".join(self._hooks.sites)
        )

    def check_fired(self) -> None:
        """After vLLM has tried the model: that every site ran. See `Hooks.check_fired`."""
        self._hooks.check_fired()

    def replace(self, bank: str | Sequence[str], *, digest: str | None) -> str:
        """Another bank of the same shape; its digest.

        Args:
            digest: of what the front end has read.

        Raises:
            UnsupportedModelError: another shape, or the front end has not been asked.
            AttachedError: the file has changed since the front end read it; nothing has changed here.
        """
        if digest is None:
            raise UnsupportedModelError(
                f"{REPLACE} was called past the front end, which would go on to take requests for the old bank; call "
                "collective_rpc of the LLM or the AsyncLLM that takes the requests"
            )
        new = banks.load(bank)
        check_fits(new, self._served)
        if new.digest != digest:
            raise AttachedError(f"the file {bank} has changed while it was read; replace the bank once more")
        self._filler.replace(new)
        self._hooks.replace(new)
        self._served = new
        return new.digest


def check_modes(config: Any, served: Served) -> None:
    """That the engine runs in a way in which every answer is right.

    Raises:
        UnsupportedModelError: it does not, and why.
    """
    parallel, compilation, cache = config.parallel_config, config.compilation_config, config.cache_config
    inductor, passes = (getattr(compilation, name, None) for name in ("inductor_compile_config", "pass_config"))
    freezes = config.device_config.device_type == "cpu" and bool((inductor or {}).get("max_autotune"))
    others = "each process has other tokens of a pass"
    wrong: list[tuple[object, str]] = [
        (getattr(parallel, "use_ubatching", False), "dual-batch overlap: it cuts a pass in two"),
        (getattr(parallel, "prefill_context_parallel_size", 1) > 1, f"prefill context parallelism: {others}"),
        (getattr(parallel, "use_sequence_parallel_moe", False), f"sequence-parallel experts: {others}"),
        (getattr(passes, "enable_sp", False), f"the sequence-parallel pass: {others}"),
        (getattr(cache, "kv_sharing_fast_prefill", False), "fast prefill: some blocks have a part of a pass's tokens"),
        (freezes, "max_autotune on the CPU: it freezes what is to change"),
        (config.speculative_config, "speculative decoding: how many tokens hold is not known when a pass begins"),
        (getattr(config.model_config, "is_encoder_decoder", False), "an encoder: whose tokens a pass has is not known"),
        (getattr(config.model_config, "is_diffusion", False), "a diffusion model: it computes tokens several times"),
        (config.model_config.runner_type != "generate", "a model that pools: its requests ask for no steering"),
        (
            config.model_config.enable_prompt_embeds,
            "prompt embeddings (enable_prompt_embeds): the embedding then has a part of a pass's tokens",
        ),
        (
            config.kv_transfer_config,
            "a KV connector or KV offloading (kv_transfer_config): it may hand on keys and values of another steering",
        ),
    ]
    if served.decides_once:
        gate = "and a gate that decides once for a sequence, from its whole prompt; or gate per token"
        wrong += [
            (cache.enable_prefix_caching, f"prefix caching (enable_prefix_caching=False turns it off) {gate}"),
            (
                config.scheduler_config.enable_chunked_prefill,
                f"chunked prefill (enable_chunked_prefill=False turns it off) {gate}",
            ),
            (
                config.scheduler_config.long_prefill_token_threshold,
                f"long_prefill_token_threshold, which cuts prompts where chunked prefill is off, too, {gate}",
            ),
            (
                config.model_config.is_multimodal_model,
                f"a model that takes more than text, whose prompts are cut where the encoder's budget ends, {gate}",
            ),
        ]
    if found := [why for is_so, why in wrong if is_so]:
        raise UnsupportedModelError(f"a bank is not served with {found[0]}")


def _watch_first(runner: Any, filler: Filler) -> None:
    """vLLM's first model runner: after `_prepare_inputs` it is known which tokens of which request a pass has."""
    prepare: Callable[..., Any] = runner._prepare_inputs

    def prepared(*args: Any, **kwargs: Any) -> Any:
        result = prepare(*args, **kwargs)
        batch, bounds, requests = runner.input_batch, runner.query_start_loc.np, runner.requests
        filler.keep_only(requests)
        parts = []
        for row, key in enumerate(batch.req_ids):
            state = requests[key]
            extra_args = getattr(state.sampling_params, "extra_args", None)
            filler.add(key, extra_args, state.num_prompt_tokens, state=state)
            start = int(batch.num_computed_tokens_cpu[row])
            parts.append(Part(key, start, int(bounds[row + 1]) - int(bounds[row])))
        filler.fill(parts)
        return result

    runner._prepare_inputs = prepared


def _watch_second(runner: Any, filler: Filler) -> None:
    """vLLM's second model runner: requests are added and finished, and `prepare_inputs` gives the tokens of a pass."""
    prepare, add, finish = runner.prepare_inputs, runner.add_requests, runner.finish_requests

    def added(scheduled: Any) -> Any:
        result = add(scheduled)
        for new in scheduled.scheduled_new_reqs:
            filler.add(new.req_id, getattr(new.sampling_params, "extra_args", None), new.prompt_len)
        return result

    def finished(scheduled: Any) -> Any:
        filler.forget(list(scheduled.finished_req_ids))
        return finish(scheduled)

    def prepared(*args: Any, **kwargs: Any) -> Any:
        batch = prepare(*args, **kwargs)
        bounds, starts = batch.query_start_loc_np, batch.num_computed_tokens_np
        filler.fill(
            [
                Part(key, int(starts[row]), int(bounds[row + 1]) - int(bounds[row]))
                for row, key in enumerate(batch.req_ids)
            ]
        )
        return batch

    runner.prepare_inputs, runner.add_requests, runner.finish_requests = prepared, added, finished
