"""What the plugin puts around vLLM's methods, on stand-ins for its objects."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from actsteer import AttachedError, SteeringNotApplied
from actsteer.integrations.vllm import plugin
from actsteer.integrations.vllm.front import REPLACE


class Refused(Exception):  # noqa: N818
    """As vLLM's, which becomes HTTP 400."""


class FakeFront:
    """Notes what it is told."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def confirm(self, request: Any) -> None:
        if self.told and self.told[-1][0] == "replacing":
            raise AttachedError("the bank is being replaced")

    def replacing(self, bank: str, *, unfinished: int) -> Any:
        self.told.append(("replacing", bank, unfinished))
        return SimpleNamespace(digest=f"digest of {bank}")

    def replaced(self, new: Any) -> None:
        self.told.append(("replaced", new.digest))


class Engine:
    """An engine whose workers do what they are told, or fail."""

    def __init__(self) -> None:
        self.output_processor = SimpleNamespace(get_num_unfinished_requests=lambda: 0)
        self.front = FakeFront()
        self.input_processor = SimpleNamespace(actsteer=self.front)
        self.calls: list[Any] = []

    def rpc(self, method: Any, timeout: Any = None, args: Any = (), kwargs: Any = None) -> list[str]:
        self.calls.append((method, args, kwargs))
        if args and args[0] == "broken":
            raise OSError("a worker fails")
        return ["answer"]


DONE = [("replacing", "b", 0), ("replaced", "digest of b")]


def test_workers_are_told_which_bank_the_front_end_has_read_and_other_calls_go_through() -> None:
    engine, called = Engine(), plugin._replacing(Engine.rpc)
    assert called(engine, "profile", None, (1,), {"x": 2}) == ["answer"]
    assert called(engine, REPLACE, None, ("b",)) == ["answer"]
    assert called(engine, REPLACE, kwargs={"bank": "b"}) == ["answer"]
    told = (REPLACE, ("b", "digest of b"), None)
    assert engine.calls == [("profile", (1,), {"x": 2}), told, told]
    assert engine.front.told == DONE * 2
    with pytest.raises(OSError, match="a worker fails"):
        called(engine, REPLACE, None, ("broken",))
    assert engine.front.told[-1] == ("replacing", "broken", 0)  # it is not known which bank they have


def test_what_comes_while_the_workers_replace_a_bank_is_refused_before_the_engine_has_it() -> None:
    engine, seen = Engine(), []
    assigned = plugin._handing_over(Refused, seen.append)

    async def rpc(self: Engine, *args: Any) -> list[str]:
        with pytest.raises(Refused, match="actsteer: the bank is being replaced"):
            assigned(self.input_processor, "meanwhile")
        await asyncio.sleep(0)
        return self.rpc(*args)

    called = plugin._replacing_later(rpc)
    assigned(engine.input_processor, "before")
    assert asyncio.run(called(engine, REPLACE, None, ("b",))) == ["answer"]
    assigned(engine.input_processor, "after")
    assert seen == ["before", "after"]
    assert engine.front.told == DONE


def test_a_site_that_did_not_run_when_vllm_tried_the_model_stops_the_start() -> None:
    def check() -> None:
        raise SteeringNotApplied("these sites did not")

    seen: list[Any] = []
    initialized = plugin._tried(lambda self, config: seen.append(config))
    initialized(SimpleNamespace(), "of an engine without a bank")
    initialized(SimpleNamespace(actsteer=SimpleNamespace(check_fired=lambda: None)), "fine")
    with pytest.raises(SteeringNotApplied):
        initialized(SimpleNamespace(actsteer=SimpleNamespace(check_fired=check)), "silent")
    assert seen == ["of an engine without a bank", "fine"]
