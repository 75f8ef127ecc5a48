"""Row c: the mean difference of pairs of texts, at one site and at all blocks: time and peak memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from benchmarks.extraction import BODY, body, over, times
from benchmarks.memory import peak
from benchmarks.overhead import shown
from benchmarks.peers import by_hand, language
from benchmarks.peers.peer import Cell, Peer, tried
from benchmarks.timing import Ratio, set_threads

WHO = "The captain|A tired sailor|My uncle|An old woman|The doctor|Two children|Nobody|The last of the guests"
WHO += "|She|They|A boy from the north|The cook|Our neighbour|His brother|The young teacher|A man with a red hat"
SEA = "went down to the harbour|dived into the waves|saw a whale|waited for the tide|mended the nets|rowed to the reef"
SEA += "|sailed round the island|slept on the deck|swam beside the ship|counted the fishing boats|smelled salt"
SEA += "|drank rum in the cabin|lost an oar|dropped the anchor|watched the storm come over the sea|fed the gulls"
LAND = "went up to the office|climbed into the attic|saw a horse|waited for the bus|mended the roof|drove to the shop"
LAND += "|walked round the park|slept on the sofa|ran beside the car|counted the parked bicycles|smelled bread"
LAND += "|drank tea in the kitchen|lost a key|dropped the hammer|watched the snow come over the fields|fed the hens"
Work = Callable[[], Any]


def row(peer: Peer, *, repeats: int, quick: bool) -> dict[str, Cell]:
    """Time, as a ratio to the model's body over the same texts in the same round, and what memory grows by."""
    with set_threads(1), torch.no_grad():
        model, _ = _loaded(quick=quick)
        count = model.config.num_hidden_layers
        every = [f"model.layers.{n}" for n in range(count)]
        cases = {f"block {count // 2} of {count}": every[count // 2 - 1 : count // 2], f"all {count} blocks": every}
        timed = _Timed(peer, cases, repeats=repeats, quick=quick)
        cells: dict[str, Cell] = {}
        for name, sites in cases.items():
            cells[name] = tried(partial(timed.cell, name))
            cells[f"{name}, MB"] = tried(partial(_memory, peer, sites, quick=quick))
        return cells


def texts(pairs: int) -> tuple[list[str], list[str]]:
    """(of the sea, of the land): each text of the one side beside one of the other that begins alike."""
    who, sea, land = (part.split("|") for part in (WHO, SEA, LAND))
    chosen = list(itertools.product(range(len(who)), range(len(sea))))[:: len(who) * len(sea) // pairs][:pairs]
    return [f"{who[a]} {sea[b]}" for a, b in chosen], [f"{who[a]} {land[b]}" for a, b in chosen]


def _loaded(*, quick: bool) -> tuple[Any, Any]:
    return (language.tiny(), language.tiny_tokenizer()) if quick else language.load()


def _pairs(*, quick: bool) -> int:
    return 8 if quick else 256


class _Timed:
    """All cases in the same rounds, on models of their own, for some peers change theirs for good."""

    def __init__(self, peer: Peer, cases: dict[str, list[str]], *, repeats: int, quick: bool) -> None:
        self.peer, self.cases, self.rounds = peer, cases, max(2, repeats // 10)
        self.model, self.tokenizer = _loaded(quick=quick)
        self.unhooked, self.plain = _loaded(quick=quick)
        self.texts = texts(_pairs(quick=quick))
        self.found: dict[str, dict[str, Tensor]] = {}
        self.taken: dict[str, list[float]] = {}

    def cell(self, name: str) -> Cell:
        """The first one runs them all."""
        if not self.taken:
            runs: dict[str, Work] = {case: partial(self._run, case) for case in self.cases}
            runs[BODY] = partial(body, self.unhooked, language.batches(self.plain, [*self.texts[0], *self.texts[1]]))
            self.taken = times(runs, repeats=self.rounds, clock=time.process_time)
        seconds = {way: self.taken[way] for way in (BODY, name)}
        expected = by_hand.extract(self.unhooked, self.plain, *self.texts, self.cases[name])
        said = f"{compared(self.found[name], expected)}; the body takes {min(seconds[BODY]):.3g} s"
        return Cell(shown(Ratio.of(over(seconds[name], seconds[BODY]))), said, {"seconds": seconds})

    def _run(self, name: str) -> None:
        self.found[name] = self.peer.extract(self.model, self.tokenizer, *self.texts, self.cases[name])


def compared(found: dict[str, Tensor], expected: dict[str, Tensor]) -> str:
    """How near the directions are to those by hand, in float64: the farthest of all sites."""
    cosines, lengths, off = [], [], []
    for site, wanted in expected.items():
        got = found[site].double()
        cosines.append(torch.cosine_similarity(got, wanted, dim=0).item())
        lengths.append((got.norm() / wanted.norm()).item())
        off.append(((got - wanted).norm() / wanted.norm()).item())
    return (
        f"cosine to by hand's {min(cosines):.6f} or more, length {min(lengths):.3g} to {max(lengths):.3g} of its, "
        f"relative difference {max(off):.1e} or less"
    )


def _memory(peer: Peer, sites: list[str], *, quick: bool) -> Cell:
    megabytes = peak(prepared, getattr(peer, "__name__"), sites, quick)  # noqa: B009 - the peer is a module
    return Cell(f"{megabytes:.0f}", "", {"megabytes": megabytes})


def prepared(peer: str, sites: list[str], quick: bool) -> Work:
    """For a process of its own: the model is there, and what is allocated once."""
    torch.set_grad_enabled(False)
    model, tokenizer = _loaded(quick=quick)
    extract = partial(import_module(peer).extract, model, tokenizer)
    extract(*texts(4), sites)
    return partial(extract, *texts(_pairs(quick=quick)), sites)
