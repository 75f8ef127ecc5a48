"""Banks: the steering that an engine's configuration names, and whether it is of the engine's model."""

from __future__ import annotations

import copy
import glob
import inspect
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from actsteer.errors import FileFormatError, ModelMismatchError, UnsupportedModelError, close_names
from actsteer.files import sealed
from actsteer.integrations.vllm.requests import NAME
from actsteer.integrations.vllm.served import Served, served
from actsteer.sites import fingerprint
from actsteer.sites.place import split_site
from actsteer.steering.plan import gates_of, interventions_of
from actsteer.steering.steering import Steering
from actsteer.vectors.bank import VectorBank

_KNOWN = ("bank", "compiled_for")


def of_config(vllm_config: Any) -> str | list[str] | None:
    """The files that `additional_config` names; None if it names none.

    Raises:
        ValueError: it says something else.
    """
    additional = vllm_config.additional_config
    given = additional.get(NAME) if isinstance(additional, Mapping) else None
    if given is None:
        return None
    if not isinstance(given, Mapping) or "bank" not in given:
        raise ValueError(f'additional_config: expected {{"{NAME}": {{"bank": "tone.safetensors"}}}}, got {given!r}')
    for name in given:
        if name not in _KNOWN:
            raise ValueError(f"additional_config[{NAME!r}]: no such option, {name!r}. {close_names(name, _KNOWN[:1])}")
    bank = given["bank"]
    each = [bank] if isinstance(bank, str | os.PathLike) else bank
    if not isinstance(each, list | tuple) or not each or not all(isinstance(own, str | os.PathLike) for own in each):
        raise ValueError(f'additional_config: expected "bank" to be a file, a pattern, or a list of them, got {bank!r}')
    return str(bank) if each is not bank else [str(own) for own in each]


def load(bank: str | Sequence[str]) -> Served:
    """The steering of a file, of all files that a pattern names, or of several, as an engine computes it.

    Raises:
        FileFormatError: two files have the same concept.
        ActsteerError: and what `Steering.load` and `served` raise.
    """
    named = [bank] if isinstance(bank, str) else bank
    each = [Steering.load(path) for own in named for path in _files(own)]
    return served(each[0] if len(each) == 1 else _joined(each))


def _files(path: str) -> list[str]:
    """The files of a pattern, where one of them is more than vectors; else what was given, which is read as one."""
    found = [path] if Path(path).exists() else sorted(glob.glob(path))  # noqa: PTH207
    return found if any(sealed.kind_of(own) == "steering" for own in found) else [path]


def _joined(each: Sequence[Steering]) -> Steering:
    vectors: dict[str, Any] = {}
    said: dict[str, dict[str, Any]] = {"c": {}, "intervention": {}, "gate": {}, "positions": {}}
    for own in each:
        bank = own.vectors
        if own.sites is not None:
            raise FileFormatError(f"{own!r} steers some of its sites alone; in a bank of several files, select them")
        if both := [concept for concept in bank if concept in vectors]:
            raise FileFormatError(f"the concept {both[0]!r} is in two files of the bank; rename one")
        vectors |= dict(bank.items())
        said["intervention"] |= dict(zip(bank.concepts, interventions_of(bank, own.intervention), strict=True))
        said["gate"] |= gates_of(bank, own.gate)
        for name, given in (("c", own.c), ("positions", own.positions)):
            if given is not None:
                said[name] |= given if isinstance(given, Mapping) else dict.fromkeys(bank.concepts, given)
    parts: Any = {name: own for name, own in said.items() if own}
    return Steering(VectorBank(vectors), **parts)


def check_model(steering: Served, vllm_config: Any) -> None:
    """That the vectors and the gates are of the model that the engine serves, by the names and shapes of its weights.

    Raises:
        ModelMismatchError: they are of another architecture.
    """
    config = vllm_config.model_config.hf_config
    kind = getattr(config, "model_type", None)
    for what, meant in steering.made_for:
        if (theirs := meant.get("model_type")) and kind and theirs != kind and theirs not in _inner_types(config):
            raise ModelMismatchError(f"{what} was made for a {theirs}, and the engine serves a {kind}")
    if (model := _empty(config)) is not None:
        with _logged():
            fingerprint.check_each(model, steering.made_for)
        check_alike(model, steering)


def check_alike(model: nn.Module, steering: Served) -> None:
    """That the modules of Hugging Face's model compute what vLLM's of the same names do.

    Raises:
        UnsupportedModelError: an embedding that scales, which vLLM does after it; an edit that reads the output of a
            module that adds the residual stream, which vLLM does behind it.
    """
    modules = dict(model.named_modules())
    for site in dict.fromkeys((*steering.stages, *(score.site for score in steering.scores))):
        name, side, _ = split_site(site)
        module = modules.get(name)
        if module is None or side == "in":
            continue
        if isinstance(module, nn.Embedding) and type(module) is not nn.Embedding:
            raise UnsupportedModelError(
                f"site {site!r}: {type(module).__name__} does more than look up, which vLLM does behind it, if at all; "
                "steer the first block's input"
            )
        if steering.reads(site) and "residual" in inspect.signature(module.forward).parameters:
            raise UnsupportedModelError(
                f"site {site!r}: {type(module).__name__} adds the residual stream, and vLLM's module does not, so that "
                "an edit or a gate that reads its output would read something else; steer the block"
            )


def _inner_types(config: Any) -> set[str]:
    """The types of the models inside, as the text model of a multimodal one."""
    return {str(own.model_type) for own in vars(config).values() if hasattr(own, "model_type")}


def _empty(config: Any) -> nn.Module | None:
    """The Hugging Face model without its weights; None if transformers cannot make it."""
    import transformers

    kind = getattr(transformers, next(iter(getattr(config, "architectures", None) or ()), ""), None)
    if kind is None:
        return None
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model: nn.Module = kind(copy.deepcopy(config))
    except Exception:  # of a config that is vLLM's own
        return None
    return model


@contextmanager
def _logged() -> Iterator[None]:
    """Warnings go to vLLM's log."""
    from vllm.logger import init_logger

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    for warning in caught:
        init_logger(f"vllm.{NAME}").warning("%s", warning.message)
