"""Mark: the module's own forward, put on the instance. It changes nothing but what compiled code guards on.

Compiled code takes no notice of hooks: what was compiled for another model of the same class, without hooks, would
serve this one too, if that one ran first. It does notice whether a module has a `forward` of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from threading import RLock
from weakref import WeakKeyDictionary

from torch import nn

one_at_a_time = RLock()  # two threads may steer one module, each for itself
_marks: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # module -> how many of its hooks want it marked


def mark(module: nn.Module) -> Callable[[], None]:
    """Mark the module, until the last who asked for it calls what is returned."""
    with one_at_a_time:
        _marks[module] = _marks.get(module, 0) + 1
        remark(module)

    def unmark() -> None:
        with one_at_a_time:
            _marks[module] -= 1
            if not _marks[module]:
                if is_marked(module):
                    del module.__dict__["forward"]
                del _marks[module]

    return unmark


def remark(module: nn.Module) -> None:
    """Put the mark back, if it is wanted and nothing else is there."""
    if module in _marks and "forward" not in module.__dict__:
        module.__dict__["forward"] = module.forward


def is_marked(module: nn.Module) -> bool:
    """Whether the module's `forward` is the mark, and not a patch or another wrapper."""
    return module in _marks and has_own_forward(module)


def has_own_forward(module: nn.Module) -> bool:
    """Whether the forward on the instance is that of the class."""
    present, own = module.__dict__.get("forward"), type(module).forward
    return present is not None and getattr(present, "__func__", present) is getattr(own, "__func__", own)
