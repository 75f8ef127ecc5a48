"""Generate: what goes around `generate`; it makes the generation, and tells of the tokens of each of its passes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn

from actsteer.errors import PositionsError
from actsteer.sites.wrappers import named_modules
from actsteer.tokens.generation import Generation
from actsteer.tokens.inputs import as_mask, cache_in, cached, signature_of
from actsteer.tokens.passes import Passes
from actsteer.tokens.tokens import Tokens

Method = Callable[..., Any]
Around = Callable[[nn.Module, Method, tuple[Any, ...], dict[str, Any]], Any]


def taps(model: nn.Module, passes: Sequence[Passes]) -> list[tuple[nn.Module, str, Around]]:
    """What is to go around which methods of which modules, so that every `generate` in the model is known."""
    teller = _Teller(passes)
    around: dict[str, Around] = {
        "generate": teller.generate,
        "generate_stream": teller.generate,
        "prepare_inputs_for_generation": teller.prepare,
    }
    hosts = dict.fromkeys((model, passes[0].host))  # a bridge hides its model
    modules = dict.fromkeys(module for host in hosts for _, module in named_modules(host))
    return [
        (module, name, callback)
        for module in modules
        if callable(getattr(type(module), "generate", None))
        for name, callback in around.items()
        if callable(getattr(module, name, None))
    ]


@final
class _Teller:
    """Makes a generation of each call, current while it runs, and tells of its passes beforehand."""

    def __init__(self, passes: Sequence[Passes]) -> None:
        self._passes, self._current = passes, passes[0].generation
        self._needs_inputs = any(callable(asked) for own in passes for asked in own.positions.values())

    def generate(self, module: nn.Module, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of `generate`, or of one that gives its tokens one by one."""
        generation = _generation(module, args, kwargs, self._current.get())
        before = self._current.set(generation)
        try:
            found = method(*args, **kwargs)
        finally:
            self._current.reset(before)
        return self._stream(found, generation) if inspect.isgenerator(found) else found

    def prepare(self, module: nn.Module, method: Method, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What transformers calls before each pass: tell of the tokens that the pass is about to compute."""
        inputs = method(*args, **kwargs)
        generation = self._current.get()
        if generation is None or (tokens := self._tokens(module, args, kwargs, inputs, generation)) is None:
            return inputs
        if kwargs.get("is_first_iteration") and tokens.start == 0:
            generation.begin_window(tokens.rows)
        generation.announces = True
        for passes in self._passes:
            kind, mask = passes.whose
            if kind not in ("call", "answers"):
                continue
            here = tokens
            if mask is not None:
                said = kwargs.get(mask) if isinstance(mask, str) else mask(inputs)
                here = tokens.but(mask=None if said is None else as_mask(said, "mask"))
            generation.announced[passes.number] = passes.about(
                generation.within(here), generation, named=inputs if isinstance(inputs, dict) else None
            )
        return inputs

    def _tokens(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], inputs: Any, generation: Generation
    ) -> Tokens | None:
        """The tokens of the pass with these inputs, among all columns so far."""
        prefix = signature_of(module).prefix(inputs)
        fed = next(
            (inputs[n] for n in (prefix + "input_ids", "inputs_embeds") if isinstance(inputs.get(n), Tensor)), None
        )
        if fed is None:
            return None
        rows, length = fed.shape[:2]
        ids = args[0] if args else kwargs.get("input_ids")
        mask = kwargs.get(prefix + "attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if mask is not None:
            total = mask.shape[1]
        elif kwargs.get("next_sequence_length") is not None and isinstance(ids, Tensor):
            embeds = kwargs.get("inputs_embeds")
            if kwargs.get("is_first_iteration") and isinstance(embeds, Tensor) and not ids.shape[1]:
                generation.embedded = embeds.shape[1]
            total = generation.embedded + ids.shape[1]
        else:
            seen = cached(cache_in(kwargs)[1])
            total = length + (int(seen) if seen is not None else 0)
        if total < length:
            raise PositionsError(f"a pass of {length} tokens in a text of {total}; where they stand is not known")
        batch = None
        if self._needs_inputs and isinstance(ids, Tensor) and ids.shape[1] == total:
            whole = torch.ones_like(ids) if mask is None else mask
            batch = {prefix + "input_ids": ids, prefix + "attention_mask": whole}
        mask = None if mask is None else mask.bool()
        return Tokens(rows, length, start=total - length, mask=mask, batch=batch, device=fed.device)

    def _stream(self, inner: Any, generation: Generation) -> Generator[Any, None, Any]:
        """A generator of whose generation no other frame knows."""
        try:
            while True:
                before = self._current.set(generation)
                try:
                    item = next(inner)
                except StopIteration as end:
                    return end.value
                finally:
                    self._current.reset(before)
                yield item
        finally:
            inner.close()


def _generation(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], parent: Generation | None
) -> Generation:
    """What the arguments of `generate` tell; nothing of the prompt, if it goes on from a cache."""
    first = args[0] if args else None
    given = [first, *(kwargs.get(name) for name in ("inputs", "input_ids", "input", "inputs_embeds"))]
    inputs = next((value for value in given if isinstance(value, Tensor) and value.ndim >= 2), None)
    rows = None if inputs is None else inputs.shape[0]
    mask = kwargs.get("attention_mask")
    if signature_of(module).prefix(kwargs):
        inputs, mask = kwargs.get("decoder_input_ids"), kwargs.get("decoder_attention_mask")
    elif cache_in(kwargs)[1] is not None:
        inputs = mask = None
    prompt = inputs.shape[1] if isinstance(inputs, Tensor) and inputs.ndim >= 2 else None
    known = isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == prompt
    mask = mask.bool() if known and isinstance(mask, Tensor) else None
    return Generation(rows=rows, prompt=prompt, mask=mask, parent=parent)
