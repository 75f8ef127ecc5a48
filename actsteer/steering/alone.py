"""Alone: edits and gates by themselves in files; the methods `save` and `load` of their classes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from typing import TypeVar, cast

from torch import nn

from actsteer.errors import FileFormatError
from actsteer.files import sealed
from actsteer.steering.gates.gate import AnyGate
from actsteer.steering.interventions.intervention import Edit
from actsteer.vectors.bank import metadata_in

Kind = TypeVar("Kind")


def save_edit(self: Edit, path: str | PathLike[str], *, model: nn.Module | None = None) -> None:
    """Write the edit to a sealed `.safetensors` file, which is that of `Steering(edit)`; see `Steering.save`.

    Args:
        model: the model that the edit is for, which the file then names; without it, the metadata's.

    Raises:
        FileFormatError: it holds something that a file cannot hold, or the file is not called `.safetensors`.
        ModelMismatchError: it was made for a model of another architecture than `model`.
    """
    from actsteer.steering.steering import Steering  # which knows the classes of edits

    Steering(self).save(path, model=model)


def load_edit(
    kind: type[Kind], path: str | PathLike[str], model: nn.Module | None = None, *, kinds: Iterable[type] = ()
) -> Kind:
    """Read what `save` wrote; see `Steering.load`.

    Raises:
        FileFormatError: the file is corrupt, or holds anything but one edit of this class.
        ModelMismatchError: the file was made for a model of another architecture.
    """
    from actsteer.steering import saving
    from actsteer.steering.steering import Steering  # which knows the classes of edits

    steering = Steering.load(path, model, kinds=kinds)
    bank, edit = steering.vectors, steering.intervention
    if not isinstance(edit, kind) or len(bank) != 1 or not replace(steering, intervention=None).is_plain:
        raise FileFormatError(
            f"{path}: expected one {kind.__name__} and nothing else, got {steering!r}; open it with Steering.load(path)"
        )
    (metadata,) = metadata_in(bank).values()  # which names the model, if it was given when saving
    with saving.described_by(path):
        return cast("Kind", _described(cast("Edit", edit), metadata, sites=bank.sites))


def _described(edit: Edit, metadata: Mapping[str, str], *, sites: tuple[str, ...]) -> Edit:
    """The edit with this metadata, if it has these sites."""
    if edit.constant.sites != sites:
        raise ValueError(f"an edit at {edit.constant.sites} with vectors at {sites}")
    return edit.described(metadata)


def save_gate(self: AnyGate, path: str | PathLike[str]) -> None:
    """Write the gate to a sealed `.safetensors` file, with its directions and what is known of them.

    Raises:
        FileFormatError: it holds something that a file cannot hold, or the file is not called `.safetensors`.
    """
    from actsteer.steering import saving  # which knows the classes of gates

    target = sealed.checked(path, writing=True)
    with saving.named_in_errors(path):
        document, tensors = saving.encoded({"gate": self})
    sealed.write(target, tensors, {"kind": "gate", **document})


def load_gate(kind: type[Kind], path: str | PathLike[str], *, kinds: Iterable[type] = ()) -> Kind:
    """Read what `save` wrote; nothing in a file is executed or imported.

    Args:
        kinds: your own classes, of which it may be made.

    Raises:
        FileFormatError: the file is corrupt, or holds something else, or a class that is neither ours nor of `kinds`.
    """
    from actsteer.steering import saving  # which knows the classes of gates

    names = list(saving.known(kinds).values())
    tensors, document = sealed.read(sealed.checked(path), kind="gate")
    with saving.described_by(path):
        nodes = {name: node for name, node in document.items() if name not in ("format", "kind")}
        if list(nodes) != ["gate"]:
            raise ValueError(f"expected a gate alone, got {list(nodes)}")
        gate = saving.decoded(nodes, tensors, names)["gate"]
    if not isinstance(gate, kind):
        raise FileFormatError(f"{path}: expected a {kind.__name__}, got {gate!r}; load it with its class")
    return gate
