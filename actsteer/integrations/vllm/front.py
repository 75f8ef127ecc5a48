"""Front: in the process that takes requests, each is checked, and its prefix cache kept apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from actsteer.errors import ActsteerError, AttachedError, UnsupportedModelError
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
        self._digest = None if self._served is None else self._served.digest

    def admit(self, request: Any) -> None:
        """Check what a request asks for, write it in one spelling, and salt its prefix cache.

        Raises:
            ValueError, TypeError, LookupError: it cannot be done; nothing has changed.
        """
        params = request.sampling_params
        given = None if params is None else params.extra_args
        if not given:
            return
        if self._served is None:
            if said_in(given) is not None:
                raise UnsupportedModelError(
                    'this engine has no bank; start it with additional_config={"actsteer": {"bank": "my.safetensors"}}'
                )
            return
        wanted = self._served.asked(given)
        rest = {name: own for name, own in given.items() if name != NAME}
        if wanted is None:
            params.extra_args = rest or None
            return
        if request.resumable:
            raise UnsupportedModelError(
                "a request whose prompt goes on later cannot be steered: where its prompt ends is not known"
            )
        ids = request.prompt_token_ids
        prompt = len(ids) if ids is not None else len(request.prompt_embeds)
        wanted.check(prompt)
        params.extra_args = rest | {NAME: wanted.sent() | {"digest": self._digest}}
        assert self._digest is not None
        request.cache_salt = wanted.salt(self._digest, prompt, request.cache_salt)

    def replacing(self, bank: str | Sequence[str], *, unfinished: int) -> Callable[[Sequence[str]], None]:
        """Another bank is to take the place of the present one; what is returned is told what the workers answered.

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

        def replaced(answers: Sequence[str]) -> None:
            if set(answers) != {new.digest}:
                raise AttachedError(f"the file {bank} has changed while it was read; replace the bank once more")
            self._served, self._digest = new, new.digest

        return replaced

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
