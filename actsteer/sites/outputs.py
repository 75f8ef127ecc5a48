"""Read the activation inside a module's output, and put an edited one back in its place."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from actsteer.errors import OutputError, ShapeError


def read_activation(output: Any, *, site: str) -> Tensor:
    """The activation in an output: the tensor itself, or the first member of a tuple or list.

    Raises:
        OutputError: another kind of output, or an activation that is not floating.
    """
    activation = output[0] if isinstance(output, tuple | list) and output else output
    if not isinstance(activation, Tensor):
        raise OutputError(
            f"site {site!r}: expected a tensor, or a tuple that begins with one, got {_described(output)}; "
            "choose a module inside it that returns a tensor"
        )
    if activation.is_nested:
        raise OutputError(
            f"site {site!r}: the activation is a nested tensor, which has no shape; set use_nested_tensor=False "
            "on the torch.nn.TransformerEncoder, or choose a module before it"
        )
    if not activation.is_floating_point():
        raise OutputError(f"site {site!r}: expected floating activations, got {activation.dtype}")
    return activation


def write_activation(output: Any, activation: Tensor) -> Any:
    """An output of the same type with the activation replaced; what came in is not changed."""
    if isinstance(output, Tensor):
        return activation
    if hasattr(output, "_fields"):  # a named tuple, torch's PackedSequence among them
        return output._replace(**{output._fields[0]: activation})
    return type(output)([activation, *output[1:]])


def _described(output: Any) -> str:
    """What kind of output it is and, of a tuple or list, what it begins with."""
    if isinstance(output, tuple | list):
        return f"a {type(output).__name__} of {', '.join(type(part).__name__ for part in output) or 'nothing'}"
    return f"a {type(output).__name__}"


def positive_axis(activation: Tensor, *, axis: int | None, size: int | None, site: str) -> int:
    """The feature axis counted from the front, once it is certain that the activation has `size` features there.

    Raises:
        ShapeError: another size there, or an axis that nobody can know.
    """
    shape = tuple(activation.shape)
    if axis is None and activation.ndim > 3:
        raise ShapeError(
            f"site {site!r}: the activation has shape {shape}, and its module does not tell which axis holds the "
            "features; choose a convolution, norm or linear module beside it"
        )
    chosen = -1 if axis is None else axis
    if not -len(shape) <= chosen < len(shape):
        raise ShapeError(f"site {site!r}: expected an activation with a feature axis {chosen}, got shape {shape}")
    if size not in (None, shape[chosen]):
        raise ShapeError(
            f"site {site!r}: the activation has {shape[chosen]} features (axis {chosen} of shape {shape}), the vector "
            f"{size}; was it fitted on another model?"
        )
    return chosen % len(shape)
