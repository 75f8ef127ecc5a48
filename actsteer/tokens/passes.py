"""Passes: what is known of a forward pass while it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor, nn

from actsteer.errors import PositionsError, StrengthError
from actsteer.sites.axes import sequence_first
from actsteer.sites.device import brought
from actsteer.sites.place import Place
from actsteer.sites.wrappers import unwrapped
from actsteer.tokens.current import Current
from actsteer.tokens.generation import Generation
from actsteer.tokens.inputs import (
    Mask,
    Signature,
    cache_in,
    encoder_of,
    first_tensor,
    has_masks,
    of_the_encoder,
    signature_of,
    tokens_of,
    unsure,
)
from actsteer.tokens.positions import Positions, all_or_none, chosen
from actsteer.tokens.tokens import Tokens
from actsteer.tokens.whose import Whose, whose

Amount = Tensor | Callable[[int], Tensor]
"""How much each token gets: (B, S), one per row and column; or () for each generation step, made by a callable."""


@final
class Pass:
    """One forward pass: its tokens, how much of each concept each of them gets, and what the gates decide in it.

    Args:
        tokens: where they stand; None if the inputs do not show it, and the activation's positions count.
        real: which of them are not pads, (B, S); None: all.
        doses: place of a concept -> (B, S) or (1, S), of those of which tokens get different amounts; or whether all of
            them, or none, get the whole.
        rows: the rows of the call; None if they cannot be told.
        named: the inputs by name.
        doubt: an argument that may say where pads are, and its name.
        generation: of which it is a part.
    """

    __slots__ = ("decisions", "doses", "doubt", "generation", "named", "real", "rows", "tokens")

    def __init__(
        self,
        tokens: Tokens | None = None,
        *,
        real: Tensor | None = None,
        doses: Mapping[int, Tensor | bool] | None = None,
        rows: int | None = None,
        named: Mapping[str, Any] | None = None,
        doubt: tuple[str, Tensor] | None = None,
        generation: Generation | None = None,
    ) -> None:
        self.tokens, self.real, self.doses, self.rows = tokens, real, doses or {}, rows
        self.named, self.doubt, self.generation = named, doubt, generation
        self.decisions: dict[int, Tensor] = {}

    def of_answers(self, named: Mapping[str, Any]) -> Pass:
        """The same for the tokens at which a head is to answer."""
        keep: Any = named.get("logits_to_keep")
        if self.tokens is None or keep is None or (isinstance(keep, int) and not keep):
            return self
        if not isinstance(keep, int):
            raise PositionsError("logits_to_keep: it is not known which tokens the head sees; pass a number")
        real = None if self.real is None else self.real[:, -keep:]
        doses = {place: own if isinstance(own, bool) else own[:, -keep:] for place, own in self.doses.items()}
        return Pass(
            self.tokens.last(keep),
            real=real,
            doses=doses,
            rows=self.rows,
            named=self.named,
            doubt=self.doubt,
            generation=self.generation,
        )


@final
class Passes:
    """The forward passes of a model, as sites see them whose tokens are told in the same way.

    Args:
        host: the module whose calls show the tokens: the model or, for its sites, the encoder in it.
        positions: place of a concept -> its positions, of those that are not steered at all of them.
        root: the passes of the model itself; None: these are.
        number: tells them from others of the same model.
        data: whether all that is fed is prompt, as where data is collected.
    """

    def __init__(
        self,
        host: nn.Module,
        positions: Mapping[int, Positions] | None = None,
        *,
        whose: Whose = Whose("call"),  # noqa: B008  (a value)
        root: Passes | None = None,
        number: int = 0,
        data: bool = False,
    ) -> None:
        self.host, self.positions, self.whose, self.number = host, positions or {}, whose, number
        self.root = self if root is None else root
        self.is_asked = False  # whether a gate, or values of tokens, ask for these at a site
        self.is_met = dict.fromkeys(self.positions, False)  # whether there may have been tokens at these positions
        self.modules: list[nn.Module] = []  # those of the sites
        self.is_used = data  # whether there are any, or may be
        self.current: Current[Pass] = Current()
        self.generation: Current[Generation] = Current() if root is None else root.generation
        self._data = data
        self._by_column: dict[int, Tensor] = {}  # (B, S)
        self._schedules: dict[int, Callable[[int], Tensor]] = {}
        self._first: dict[int, Tensor] = {}  # what a schedule says of step 0
        self._by_token: tuple[int, ...] = ()  # the concepts of which tokens of one row may get different amounts
        self._signature = signature_of(host)
        self._in_order = not sequence_first(unwrapped(host))
        self.sees_inputs = whose.kind != "none" and (whose.mask is not None or self._signature.tells)

    @torch.inference_mode(mode=False)
    def set_amounts(self, amounts: Mapping[int, Amount], active: Iterable[int]) -> None:
        """How much tokens get, from the next pass on, of the concepts that have an amount per token."""
        self._by_token = ()
        self._by_column = {place: own for place, own in amounts.items() if isinstance(own, Tensor)}
        self._schedules = {place: own for place, own in amounts.items() if not isinstance(own, Tensor)}
        self._first = {place: own(0) for place, own in self._schedules.items()}
        self._by_token = tuple(place for place in active if place in amounts or place in self.positions)

    def find_again(self, modules: Iterable[nn.Module]) -> None:
        """Modules of the model were replaced: the encoder perhaps, and those of sites, which are among these now."""
        if self.whose.kind == "encoder":
            self.host = encoder_of(self.root.host) or self.host
        self.modules = list(modules)

    @property
    def now(self) -> Pass | None:
        """The pass that runs in this context."""
        return self.current.get()

    @property
    def may_have_pads(self) -> bool:
        """Whether the pass that runs may have pads."""
        now = self.current.get()
        return now is not None and (now.real is not None or now.doubt is not None)

    def around(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A call of the host."""
        return self._within(self.begun(args, kwargs, self._signature), forward, args, kwargs)

    def around_part(self, module: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """A call of a module inside of the host that takes tokens too, and may be called by itself."""
        if self.current.get() is not None:
            return forward(*args, **kwargs)
        return self._within(self.begun(args, kwargs, signature_of(module)), forward, args, kwargs)

    def _within(self, now: Pass, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
        before = self.current.set(now)
        try:
            output = forward(*args, **kwargs)
        finally:
            self.current.reset(before)
        if now.generation is not None and not torch.compiler.is_compiling():
            self._remember(now.generation, now.named or {}, output)
        return output

    def begun(self, args: Sequence[Any], kwargs: Mapping[str, Any], signature: Signature) -> Pass:
        """The pass of a call, as its generation has told of it, or as its arguments do."""
        generation = self.generation.get()
        found: Pass | None = None if generation is None else generation.announced.get(self.number)
        if generation is not None and found is not None:
            generation.announced[self.number] = None
        elif not self.is_used:  # no site has these tokens
            return Pass(generation=generation)
        else:
            asks, first = bool(self._by_token) or self._data, args[0] if args else None
            if not (asks or self.is_asked) and (not self.sees_inputs or self._has_no_pads(args, kwargs, signature)):
                return Pass()
            if not (self.sees_inputs or asks) and isinstance(first, Tensor) and first.is_floating_point():
                return Pass(rows=len(first) if self._in_order and first.ndim and not first.is_nested else None)
            asks = asks or self.is_asked
            found = self._seen(signature.named(args, kwargs), generation, signature, asks=asks)
        return found.of_answers(signature.named(args, kwargs)) if self.whose.kind == "answers" else found

    def about(self, tokens: Tokens, generation: Generation | None = None, **known: Any) -> Pass:
        """The pass with these tokens."""
        real = tokens.real
        if real is not None and _is_true(real):
            real = None
        doses = {place: self._dose(place, tokens, generation, has_pads=real is not None) for place in self._by_token}
        return Pass(tokens, real=real, doses=doses, rows=tokens.rows, generation=generation, **known)

    def of_shape(self, rows: int, length: int, device: torch.device) -> Pass:
        """What holds for an activation of so many rows and positions, where the inputs do not show them."""
        now = self.now
        if now is not None and now.tokens is not None:
            return now
        self.check_runs()
        named = None if now is None else now.named
        generation = self.generation.get() if now is None else now.generation
        tokens = Tokens(rows, length, prompt=length, batch=named, may_go_on=generation is not None, device=device)
        return self.about(tokens, generation, named=named)

    def check_runs(self) -> None:
        """PositionsError if a part of a model is called by itself, so that what the model is given is not seen."""
        if self.sees_inputs and self.now is None:
            name = type(unwrapped(self.host)).__name__
            raise PositionsError(
                f"a part of the {name} was called, and not the {name} itself, so that its masks and its cache were not "
                "seen; call the whole, or make the Steerer on the part that is called"
            )

    def decide(self, gate: int, weights: Tensor, *, holds: bool) -> None:
        """A gate has decided: for this pass and the one around it or, if it holds, for the generation."""
        for now in (self.now, self.root.now):
            if now is not None:
                now.decisions[gate] = weights
        generation = self._generation
        if generation is not None and holds:
            generation.decisions[gate] = weights

    def decided(self, gate: int, *, before: bool = False) -> Tensor | None:
        """What a gate has decided in this pass, or for the generation; with `before`, in earlier passes alone."""
        own, root = self.now, self.root.now
        for now in () if before else (own, root):
            if now is not None and gate in now.decisions:
                return now.decisions[gate]
        generation = self._generation
        return None if generation is None else generation.decided(gate, None if own is None else own.rows)

    @property
    def _generation(self) -> Generation | None:
        now = self.now
        return self.generation.get() if now is None or now.generation is None else now.generation

    def _seen(self, named: dict[str, Any], generation: Generation | None, signature: Signature, *, asks: bool) -> Pass:
        kind = self.whose.kind
        if kind == "none":
            return Pass(named=named, generation=generation)
        prefix = signature.prefix(named)
        if kind in ("encoder", "memory"):
            named, prefix = of_the_encoder(named), ""
        tokens = tokens_of(named, prefix=prefix, mask=self.whose.mask, strict=asks, data=self._data)
        doubt = unsure(named) if self.whose.mask is None and (tokens is None or tokens.mask is None) else None
        if tokens is None:
            first = first_tensor(named.values()) if self._in_order else None
            rows = None if first is None or not first.ndim or first.is_nested else first.shape[0]
            return Pass(named=named, rows=rows, doubt=doubt, generation=generation)
        if generation is not None and kind == "memory":
            tokens = tokens.but(copies=generation.copies(tokens.rows))
        elif generation is not None and kind != "encoder":
            generation = self._text_of(generation, named, tokens)
            tokens = tokens if generation is None else generation.within(tokens)
        waits = tokens.mask is not None and tokens.mask.device.type != "cpu"  # to see how long a text is
        tokens.may_go_on = not self._data and (generation is not None or signature.may_go_on or waits)
        return self.about(tokens, generation, named=named, doubt=doubt)

    def _text_of(self, generation: Generation, named: Mapping[str, Any], tokens: Tokens) -> Generation | None:
        """The text of a pass of which its generation has not told: another one, if it tells of its own."""
        if torch.compiler.is_compiling() or not generation.announces:
            return generation
        _, cache = cache_in(named)
        if cache is not None and id(cache) in generation.others:
            return generation.others[id(cache)][1]
        return Generation() if isinstance(tokens.start, int) and tokens.start == 0 else None

    def _remember(self, text: Generation, named: Mapping[str, Any], output: Any) -> None:
        """Which cache holds what was computed of another text than the one that is generated."""
        outer = self.generation.get()
        if outer is None or outer is text or not outer.announces:
            return
        for where in (named, output if isinstance(output, Mapping) else {}):
            _, cache = cache_in(where)
            if cache is not None:
                outer.others[id(cache)] = (cache, text)

    def _has_no_pads(self, args: Sequence[Any], kwargs: Mapping[str, Any], signature: Signature) -> bool:
        """Whether that is plain to see, as it is in most passes."""
        if self.whose.mask is not None or len(args) > signature.unmasked:
            return False
        masks = has_masks(kwargs)
        return not masks or (len(masks) == 1 and masks[0] is kwargs.get("attention_mask") and _is_true(masks[0]))

    def _dose(self, place: int, tokens: Tokens, generation: Generation | None, *, has_pads: bool) -> Tensor | bool:
        positions = self.positions.get(place)
        is_whole = place not in self._by_column and place not in self._first and not has_pads
        known = None if positions is None else all_or_none(positions, tokens)
        if known is not False and place in self.is_met:
            self.is_met[place] = True
        alike = known if is_whole else None
        if alike is not None:
            return alike
        where = None if positions is None else chosen(positions, tokens)
        amounts = self._amounts(place, tokens, generation)
        if amounts is None:
            assert where is not None  # or it would not ask
            return where
        return amounts if where is None else torch.where(where, amounts, 0.0)

    def _amounts(self, place: int, tokens: Tokens, generation: Generation | None) -> Float[Tensor, "_ S"] | None:
        by_column, first = self._by_column.get(place), self._first.get(place)
        if by_column is not None:
            return brought(_columns_of(by_column, tokens), tokens.device)
        if first is None:
            return None
        if generation is None or self.whose.kind == "encoder":
            tokens.check_known()
            return brought(first, tokens.device).expand(1, tokens.length)
        schedule = self._schedules[place]  # a function, which compiled code must not see, or each is compiled anew
        amounts = torch.stack([first if step == 0 else schedule(step) for step in tokens.steps])
        return brought(amounts, tokens.device)[None]


def groups(
    host: nn.Module,
    places: Mapping[str, Place],
    said: Mapping[str, Mask | None],
    positions: Mapping[int, Positions] | None = None,
    *,
    data: bool = False,
) -> tuple[tuple[Passes, ...], dict[str, Passes]]:
    """The passes of a model, those of the model itself first, and site -> those that it is of."""
    encoder, root = encoder_of(host), Passes(host, positions, data=data)
    reads = encoder is not None or "encoder_hidden_states" in signature_of(host).names
    made, of_site = {root.whose: root}, {}
    for site, place in places.items():
        own = whose(place, encoder, said, reads=reads)
        if own not in made:
            at = encoder if own.kind == "encoder" and encoder is not None and not data else host
            made[own] = Passes(at, positions, whose=own, root=root, number=len(made), data=data)
        made[own].modules.append(place.module)
        made[own].is_used = True
        of_site[site] = made[own]
    return tuple(made.values()), of_site


def pass_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, mask: Mask | None = None) -> Pass:
    """What a call of a model says of its tokens."""
    return Passes(unwrapped(model), whose=Whose("call", mask), data=True).begun(args, kwargs, signature_of(model))


def real_of(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, mask: Mask | None = None
) -> Tensor | None:
    """Which tokens of a call are no pads, (B, S), of a decoder's if there is one; None: all, as far as can be told."""
    return pass_of(model, args, kwargs, mask=mask).real


def taps(passes: Iterable[Passes]) -> list[tuple[nn.Module, Callable[..., Any]]]:
    """What is to go around the calls of which modules, so that the passes begin and end."""
    found: list[tuple[nn.Module, Callable[..., Any]]] = []
    for own in passes:
        found.append((own.host, own.around))
        if own.whose.kind != "encoder":
            found += [(module, own.around_part) for module in own.host.modules() if _is_part(module, own)]
    return found


def _is_part(module: nn.Module, passes: Passes) -> bool:
    """Whether a module takes tokens, and has a site in it."""
    if module is passes.host or "input_ids" not in signature_of(module).names:
        return False
    inside = {id(inner) for inner in module.modules()}
    return any(id(own) in inside for own in passes.modules)


def _is_true(mask: Any) -> bool:
    """Whether all are tokens, as far as one can tell without waiting for another device."""
    if not isinstance(mask, Tensor) or mask.is_floating_point() or mask.ndim != 2:
        return False
    return mask.device.type == "cpu" and not torch.compiler.is_compiling() and bool(mask.all())


def _columns_of(strength: Float[Tensor, "B S"], tokens: Tokens) -> Float[Tensor, "B S"]:
    """The strengths of these tokens, from those of all columns."""
    rows, columns = strength.shape
    tokens.check_known()
    if (
        not isinstance(tokens.start, int)
        or tokens.start + tokens.length > columns
        or not tokens.copies
        or rows * tokens.copies != tokens.rows
    ):
        raise StrengthError(
            f"c has {rows} rows of {columns} positions, and the pass {tokens.rows} rows whose tokens go up to position "
            f"{tokens.start + tokens.length if isinstance(tokens.start, int) else '?'}; give a strength for each, or a "
            "callable of the generation step"
        )
    own = strength.repeat_interleave(tokens.copies, dim=0) if tokens.copies > 1 else strength
    return own[:, tokens.start : tokens.start + tokens.length]
