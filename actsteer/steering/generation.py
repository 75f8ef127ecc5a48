"""Generation: where the prompt of a `generate` call ends, and which tokens each of its passes computes."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import get_ident
from typing import Any, final

import torch
from torch import Tensor, nn

from actsteer.sites.wrappers import named_modules
from actsteer.steering.generating import Generating
from actsteer.steering.inputs import cache_in, cached
from actsteer.steering.passes import Passes
from actsteer.steering.reader import GateReader
from actsteer.steering.tokens import Tokens

_GENERATE, _STREAM, _PREPARE = "generate", "generate_stream", "prepare_inputs_for_generation"
Around = Callable[[nn.Module, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]


def attach(
    model: nn.Module, passes: Sequence[Passes], readers: Sequence[GateReader], *, one_thread: bool
) -> Callable[[], None]:
    """Have every `generate` in the model tell the passes what it computes; returns what removes that again."""
    teller = _Teller(passes, readers, get_ident() if one_thread else None)
    around: dict[str, Around] = {_GENERATE: teller.generate, _STREAM: teller.stream, _PREPARE: teller.prepare}
    with ExitStack() as handles:
        hosts = dict.fromkeys((model, passes[0].host))  # a bridge hides its model
        for module in dict.fromkeys(module for host in hosts for _, module in named_modules(host)):
            if callable(getattr(type(module), _GENERATE, None)):
                for name, own in around.items():
                    if callable(getattr(module, name, None)):
                        handles.callback(_Watched(module, name, own).leave)
        return handles.pop_all().close
    raise AssertionError  # for the type checker, to whom an ExitStack might swallow an exception


@final
class _Teller:
    """Tells the passes, in the thread that generates."""

    def __init__(self, passes: Sequence[Passes], readers: Sequence[GateReader], thread: int | None) -> None:
        self._passes, self._readers, self._thread = passes, readers, thread

    def generate(self, module: nn.Module, previous: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A call of `generate`."""
        if self._thread not in (None, get_ident()):
            return previous(*args, **kwargs)
        with self._told(module, args, kwargs):
            return previous(*args, **kwargs)

    def stream(self, module: nn.Module, previous: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """The same for a generator."""
        if self._thread not in (None, get_ident()):
            yield from previous(*args, **kwargs)
            return
        with self._told(module, args, kwargs):
            yield from previous(*args, **kwargs)

    def prepare(self, module: nn.Module, previous: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """What transformers calls before each pass: tell of the tokens that the pass is about to compute."""
        inputs = previous(*args, **kwargs)
        generating = self._passes[0].generating.get()
        if generating is not None and (tokens := _tokens(module, args, kwargs, inputs)) is not None:
            self._passes[0].announce(generating.within(tokens))
        return inputs

    @contextmanager
    def _told(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[None]:
        outer = [passes.generating.get() for passes in self._passes]
        generating = _generating(module, args, kwargs)
        for passes in self._passes:
            passes.generating.set(generating)
        self._release()
        try:
            yield
        finally:
            for passes, own in zip(self._passes, outer, strict=True):
                passes.generating.set(own)
                passes.forget()
            self._release()

    def _release(self) -> None:
        for reader in self._readers:
            reader.release()


@final
class _Watched:
    """A module's method with something around it, on the instance."""

    def __init__(self, module: nn.Module, name: str, around: Around) -> None:
        self.module, self.name, self._around = module, name, around
        self._is_gone = False
        self._owned = name in module.__dict__  # whether what was there lay on the instance, where it is put back
        self._previous: Callable[..., Any] = getattr(module, name)
        self.__signature__ = inspect.signature(self._previous)  # transformers reads there what a model takes
        module.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_gone:
            return self._previous(*args, **kwargs)
        return self._around(self.module, self._previous, args, kwargs)

    def leave(self) -> None:
        """Put back what was there; a wrapper put around it since goes on calling this one, which then does nothing."""
        self._is_gone = True
        own = self.module.__dict__
        while isinstance(top := own.get(self.name), _Watched) and top._is_gone:  # Steerers leave in any order
            if top._owned:
                own[self.name] = top._previous
            else:
                del own[self.name]

    def __deepcopy__(self, memo: dict[int, Any]) -> _Copied:
        previous = copy.deepcopy(self._previous, memo) if self._owned else None
        return _Copied(copy.deepcopy(self.module, memo), self.name, previous)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Copied, (self.module, self.name, self._previous if self._owned else None)


@final
class _Copied:
    """What stands in a copy of the module: at the first call it leaves, and others like it."""

    def __init__(self, module: nn.Module, name: str, previous: Callable[..., Any] | None) -> None:
        self._module, self._name, self._previous = module, name, previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = self._module.__dict__
        for copied in [value for value in own.values() if isinstance(value, _Copied)]:
            del own[copied._name]
            if copied._previous is not None:
                own[copied._name] = copied._previous
        return getattr(self._module, self._name)(*args, **kwargs)


def _generating(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Generating:
    """What the arguments of `generate` tell; nothing, if it goes on from a cache."""
    first = args[0] if args else None
    given = [first, *(kwargs.get(name) for name in ("inputs", "input_ids", "input", "inputs_embeds"))]
    inputs = next((value for value in given if isinstance(value, Tensor) and value.ndim >= 2), None)
    rows = None if inputs is None else inputs.shape[0]
    mask = kwargs.get("attention_mask")
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        inputs, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    elif cache_in(kwargs)[1] is not None:
        inputs = mask = None
    prompt = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.ndim >= 2 else None
    known = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == prompt
    return Generating(rows=rows, prompt=prompt, mask=mask.bool() if known and isinstance(mask, Tensor) else None)


def _tokens(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Any) -> Tokens | None:
    """The tokens of the pass with these inputs, among all columns so far."""
    decodes = getattr(getattr(module, "config", None), "is_encoder_decoder", False)
    prefix = "decoder_" if decodes else ""
    fed = next((inputs[n] for n in (prefix + "input_ids", "inputs_embeds") if isinstance(inputs.get(n), Tensor)), None)
    if fed is None:
        return None
    rows, length = fed.shape[:2]
    ids = args[0] if args else kwargs.get("input_ids")
    mask = kwargs.get(prefix + "attention_mask")
    mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
    if mask is not None:
        total = mask.shape[1]
    elif kwargs.get("next_sequence_length") is not None and isinstance(ids, Tensor):
        total = ids.shape[1]
    else:
        seen = cached(cache_in(kwargs)[1])
        total = length + (int(seen) if seen is not None else 0)
    batch = None
    if isinstance(ids, Tensor) and ids.shape[1] == total:
        whole = torch.ones_like(ids) if mask is None else mask
        batch = {prefix + "input_ids": ids, prefix + "attention_mask": whole}
    mask = None if mask is None else mask.bool()
    return Tokens(rows, length, start=total - length, mask=mask, batch=batch, device=fed.device)
