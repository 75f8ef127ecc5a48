"""Front: in the process that takes requests, each is checked, and its prefix cache kept apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, final

from actsteer.errors import ActsteerError, AttachedError, ModelMismatchError, UnsupportedModelError
from actsteer.integrations.vllm import banks
from actsteer.integrations.vllm.requests import NAME, said_in
from actsteer.integrations.vllm.served import Served

REPLACE = "actsteer_replace_bank"
"""The method of the workers that takes another bank, as `collective_rpc` calls it."""


@final
class Front:
    """What the front end knows of the bank.

    Args:
        vllm_config: of the engine.

    Raises:
        ValueError, FileFormatError, ModelMismatchError, UnsupportedModelError: when the engine starts.
    """

    def __init__(self, vllm_config: Any) -> None:
        self._config = vllm_config
        bank = banks.of_config(vllm_config)
        self._served = None if bank is None else self._checked(bank)
        self._coming: Served | None = None
        """What takes the place of `_served`, from when the workers are told to when they have done so."""
        self._count = 0
        """How many have: what ran beside one has left keys and values that are not read again."""

    def admit(self, request: Any) -> None:
        """Check what a request asks for, write it in one spelling, and salt its prefix cache.

        Raises:
            ValueError, TypeError, LookupError: it cannot be done; nothing has changed.
        """
        params, served = request.sampling_params, self._served
        if params is None:
            if said_in(request.pooling_params.extra_kwargs) is not None:
                raise UnsupportedModelError("a request that pools is not steered; generate, or fold the steering")
            return
        given = params.extra_args
        if not given:
            return
        if served is None:
            if said_in(given) is not None:
                raise UnsupportedModelError(
                    'this engine has no bank; start it with additional_config={"actsteer": {"bank": "my.safetensors"}}'
                )
            return
        wanted = served.asked(given)
        rest = {name: own for name, own in given.items() if name != NAME}
        if wanted is None:
            params.extra_args = rest or None
            return
        if request.resumable:
            raise UnsupportedModelError(
                "a request whose prompt goes on later cannot be steered: where its prompt ends is not known"
            )
        prompt = len(request.prompt_token_ids)
        wanted.check(prompt)
        served.check_sizes(wanted, self._config.model_config.dtype)
        params.extra_args = rest | {NAME: wanted.sent() | {"digest": served.digest}}
        request.cache_salt = wanted.salt(f"{served.digest} {self._count}", prompt, request.cache_salt)

    def confirm(self, request: Any) -> None:
        """When a request is handed to the engine, some time after it was checked: that the bank is still the same.

        Raises:
            AttachedError, ModelMismatchError: it is not, or may not be; the engine has not seen the request.
        """
        params = request.sampling_params
        sent = None if params is None or params.extra_args is None else params.extra_args.get(NAME)
        if sent is None:
            return
        if self._coming is not None:
            raise AttachedError(
                "the bank is being replaced; ask again. If that has failed, nothing is steered until it is replaced "
                "once more"
            )
        if self._served is None or not isinstance(sent, Mapping) or sent.get("digest") != self._served.digest:
            raise ModelMismatchError("the bank was replaced since this request was checked; ask again")

    def replacing(self, bank: str | Sequence[str], *, unfinished: int) -> Served:
        """Another bank is to take the place of the present one, which steers no request from now on.

        Raises:
            AttachedError: requests are running.
            UnsupportedModelError: it has another shape, or there is none to be replaced.
        """
        if self._served is None:
            raise UnsupportedModelError("this engine has no bank that could be replaced; start it with one")
        if getattr(self._config.parallel_config, "_api_process_count", 1) > 1:
            raise UnsupportedModelError(
                "several API servers take requests, and only this one would know the new bank; start the engine anew"
            )
        if unfinished:
            raise AttachedError(f"{unfinished} requests are running; replace the bank when there are none")
        new = self._checked(bank)
        check_fits(new, self._served)
        self._coming = new
        return new

    def replaced(self, new: Served) -> None:
        """The workers have it; another one may be on its way already."""
        self._count += 1  # before requests can be checked against the new one
        self._served = new
        if self._coming is new:
            self._coming = None

    def _checked(self, bank: str | Sequence[str]) -> Served:
        found = banks.load(bank)
        banks.check_model(found, self._config)
        return found


def check_fits(new: Served, present: Served) -> None:
    """That a bank can take the place of another one in a running engine.

    Raises:
        UnsupportedModelError: it has other sites, edits or gates, or another number of concepts.
    """
    if new.shape != present.shape:
        raise UnsupportedModelError(
            f"the bank has another shape than the present one ({len(new.concepts)} concepts at {len(new.stages)} "
            f"sites, and {len(present.concepts)} at {len(present.stages)}; or other sites, edits or gates); start the "
            "engine anew with it"
        )


Errors = (ActsteerError, ValueError, TypeError)
"""What a request that is wrong raises."""
