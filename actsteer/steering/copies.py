"""What a copy of an attached hook is: nothing. A copied or unpickled model is the plain one, and is not steered."""

from __future__ import annotations

from typing import Any, final

from torch import nn

from actsteer.steering.backends.mark import has_own_forward


@final
class Inert:
    """Stands where a hook was copied or unpickled with its module: does nothing, and leaves at the first call."""

    _shape = None  # so that a bound method of an edit, copied with this in its place, comes to `edit`

    def edit(self, module: nn.Module, value: Any) -> Any:
        """Called in the place of an edit."""
        self(module)
        return value

    def __call__(self, module: nn.Module, *_: Any) -> None:
        """Called as a hook."""
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            mine = [key for key, hook in hooks.items() if self in (hook, getattr(hook, "__self__", None))]
            for key in mine:
                del hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)
                module._forward_pre_hooks_with_kwargs.pop(key, None)
        if has_own_forward(module):  # the copy of a mark
            del module.__dict__["forward"]

    on_output = on_input = __call__


class Uncopied:
    """What is attached to a module and is not copied with it."""

    __slots__ = ()

    def __deepcopy__(self, memo: dict[int, Any]) -> Inert:
        return Inert()

    def __reduce__(self) -> tuple[type[Inert], tuple[()]]:
        return Inert, ()
