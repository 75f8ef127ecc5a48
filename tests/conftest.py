"""One thread a process, Hypothesis' profiles, and names of cases that are the same in every process."""

from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(1)  # the models are small
settings.register_profile("quick", deadline=None, max_examples=20)
settings.register_profile("thorough", deadline=None, max_examples=300)  # the slow tier's: --hypothesis-profile=thorough
settings.load_profile("quick")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """The argument's name in the place of a repr with an address, by which pytest-xdist could not tell cases apart."""
    return argname if " at 0x" in repr(val) else None
