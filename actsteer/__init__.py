"""actsteer: steer any torch model by editing its activations while it runs, phi_l(x) + c · v.

model + data --collect--> Statistics --estimator--> SteeringVector --> VectorBank --> Steerer(model) --with--> forward
"""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from actsteer.public import *  # noqa: F403

__version__ = "0.2.0"

if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """A public name, or `__all__`; the first one that is asked for loads all, and torch with them (PEP 562)."""
        if name != "__all__" and name.startswith("_"):
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        public = {
            key: value
            for key, value in vars(import_module("actsteer.public")).items()
            if not key.startswith("_") and not isinstance(value, ModuleType)
        }
        globals().update(public, __all__=sorted(public))
        if name not in globals():
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        return globals()[name]

    def __dir__() -> list[str]:
        return sorted({*globals(), *__getattr__("__all__")})
