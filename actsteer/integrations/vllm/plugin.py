"""Plugin: what vLLM loads in each of its processes; it does nothing to an engine that is given no bank."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from actsteer.errors import UnsupportedModelError

_MARK = "_actsteer_wraps"
"""On a method of vLLM's that is wrapped already."""


def register() -> None:
    """Have vLLM take `additional_config={"actsteer": {"bank": ...}}`: the entry point of `vllm.general_plugins`.

    Where a name of vLLM's that is needed is missing, an engine that asks for a bank does not start.
    """
    from vllm.config import VllmConfig

    try:
        from vllm.exceptions import VLLMValidationError
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.engine.input_processor import InputProcessor
        from vllm.v1.engine.llm_engine import LLMEngine
        from vllm.v1.worker.gpu_worker import Worker

        _wrap(InputProcessor, "__init__", functools.partial(_opening, VLLMValidationError))
        _wrap(InputProcessor, "process_inputs", functools.partial(_admitting, VLLMValidationError))
        _wrap(InputProcessor, "assign_request_id", functools.partial(_handing_over, VLLMValidationError))
        _wrap(Worker, "load_model", _attaching)
        _wrap(Worker, "initialize_from_config", _tried)
        _wrap(LLMEngine, "collective_rpc", _replacing)
        _wrap(AsyncLLM, "collective_rpc", _replacing_later)
    except (ImportError, AttributeError) as error:
        _wrap(VllmConfig, "__post_init__", functools.partial(_refusing, error))
        return
    Worker.actsteer_replace_bank = lambda self, bank, digest=None: self.actsteer.replace(bank, digest=digest)


def _wrap(home: type, name: str, wrapper: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put a function around a method, once."""
    method = getattr(home, name)
    if not hasattr(method, _MARK):
        wrapped = functools.wraps(method)(wrapper(method))
        setattr(wrapped, _MARK, True)
        setattr(home, name, wrapped)


def _refusing(error: Exception, original: Callable[..., Any]) -> Callable[..., Any]:
    def made(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if isinstance(self.additional_config, dict) and "actsteer" in self.additional_config:
            raise UnsupportedModelError(f"this version of vLLM has not all that a bank needs: {error}")

    return made


def _opening(refused: type[Exception], original: Callable[..., Any]) -> Callable[..., Any]:
    """The front end reads the bank."""

    def made(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        from actsteer.integrations.vllm.front import Front

        self.actsteer = Front(vllm_config)
        original(self, vllm_config, *args, **kwargs)
        for home, name in (("chat_completion", "ChatCompletionRequest"), ("completion", "CompletionRequest")):
            _wrap_beams(home, name, refused)
        _wrap_scoring(refused)

    return made


def _admitting(refused: type[Exception], original: Callable[..., Any]) -> Callable[..., Any]:
    """The front end checks each request; what is wrong with it is a client's error, HTTP 400."""

    def processed(self: Any, *args: Any, **kwargs: Any) -> Any:
        from actsteer.integrations.vllm.front import Errors

        request = original(self, *args, **kwargs)
        try:
            self.actsteer.admit(request)
        except Errors as error:
            raise refused(f"actsteer: {error}") from None
        return request

    return processed


def _handing_over(refused: type[Exception], original: Callable[..., Any]) -> Callable[..., Any]:
    """The last thing that the front end does before the engine knows of a request, without a pause in between."""

    def assigned(self: Any, request: Any) -> None:
        from actsteer.integrations.vllm.front import Errors

        try:
            self.actsteer.confirm(request)
        except Errors as error:
            raise refused(f"actsteer: {error}") from None
        original(request)

    return assigned


def _attaching(original: Callable[..., Any]) -> Callable[..., Any]:
    """A worker puts the edits on its model, which is neither profiled nor compiled yet."""

    def loaded(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        from actsteer.integrations.vllm import banks

        if (bank := banks.of_config(self.vllm_config)) is not None:
            from actsteer.integrations.vllm.worker import Steered

            self.actsteer = Steered(self, bank)
        return result

    return loaded


def _tried(original: Callable[..., Any]) -> Callable[..., Any]:
    """vLLM has tried the model by now, where it does so at all."""

    def initialized(self: Any, *args: Any, **kwargs: Any) -> Any:
        if hasattr(self, "actsteer"):
            self.actsteer.check_fired()
        return original(self, *args, **kwargs)

    return initialized


def _replacing(original: Callable[..., Any]) -> Callable[..., Any]:
    """A call of the workers' method that takes another bank tells the front end too."""

    def called(self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        from actsteer.integrations.vllm.front import REPLACE

        if method != REPLACE:
            return original(self, method, timeout, args, kwargs)
        front, bank, new = _asked(self, args, kwargs)
        answers = original(self, method, timeout, (bank, new.digest), None)
        front.replaced(new)
        return answers

    return called


def _replacing_later(original: Callable[..., Any]) -> Callable[..., Any]:
    async def called(self: Any, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> Any:
        from actsteer.integrations.vllm.front import REPLACE

        if method != REPLACE:
            return await original(self, method, timeout, args, kwargs)
        front, bank, new = _asked(self, args, kwargs)
        answers = await original(self, method, timeout, (bank, new.digest), None)
        front.replaced(new)
        return answers

    return called


def _asked(engine: Any, args: Any, kwargs: Any) -> tuple[Any, Any, Any]:
    """The front end, the files, and what they hold; steered requests are refused from here on."""
    front, bank = engine.input_processor.actsteer, args[0] if args else (kwargs or {})["bank"]
    return front, bank, front.replacing(bank, unfinished=engine.output_processor.get_num_unfinished_requests())


def _wrap_beams(home: str, name: str, refused: type[Exception]) -> None:
    """Beam search leaves the extra arguments of a request out, so that its answer would not be steered."""
    import importlib

    request = getattr(importlib.import_module(f"vllm.entrypoints.openai.{home}.protocol"), name)

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        def made(self: Any, *args: Any, **kwargs: Any) -> Any:
            from actsteer.integrations.vllm.requests import said_in

            if said_in(self.vllm_xargs) is not None:
                raise refused(
                    "actsteer: vLLM's beam search drops vllm_xargs, and would answer unsteered; sample, or n=1"
                )
            return original(self, *args, **kwargs)

        return made

    _wrap(request, "to_beam_search_params", refusing)


def _wrap_scoring(refused: type[Exception]) -> None:
    """Generative scoring takes any field of a request, and has no use for vllm_xargs."""
    from vllm.entrypoints.generate.generative_scoring.serving import ServingGenerativeScoring

    def refusing(original: Callable[..., Any]) -> Callable[..., Any]:
        async def made(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            from actsteer.integrations.vllm.requests import said_in

            given = (request.model_extra or {}).get("vllm_xargs")
            if isinstance(given, dict) and said_in(given) is not None:
                raise refused("actsteer: vLLM's generative scoring drops vllm_xargs, and would answer unsteered")
            return await original(self, request, *args, **kwargs)

        return made

    _wrap(ServingGenerativeScoring, "create_generative_scoring", refusing)
