"""Each check of whether an edit arrives passes with what is right, and fails with what is broken in its way."""

from contextlib import contextmanager
from functools import partial

import pytest
import torch

from benchmarks.peers import actsteer, arrives, by_hand
from benchmarks.peers.peer import Cannot

FEW = arrives.CHECKS | {"interrupt": partial(arrives.after_an_interrupt, points=20)}


@contextmanager
def hooked(model, directions, c, *, hook):
    """Hooks `hook(delta)`, that are removed whatever happens."""
    handles = [model.get_submodule(site).register_forward_hook(hook(c * v)) for site, v in directions.items()]
    try:
        yield model
    finally:
        for handle in handles:
            handle.remove()


def on_the_first_row(delta):
    """What `output[0] += delta` does where a block gives a tensor and no tuple."""

    def hook(module, args, output):
        return torch.cat([output[:1] + delta, output[1:]])

    return hook


def on_the_prompt(delta):
    def hook(module, args, output):
        return output + delta if output.shape[1] > 1 else None

    return hook


@contextmanager
def without_finally(model, directions, c):
    """Removes its hooks where nothing has gone wrong."""
    block = by_hand.steer(model, directions, c)
    block.__enter__()
    without_finally.kept.append(block)
    yield model
    block.__exit__(None, None, None)


without_finally.kept = []  # what is not there any more is taken off when it is collected


@contextmanager
def removes_all(model, directions, c):
    """Clears the hooks of its sites, whoever registered them."""
    with by_hand.steer(model, directions, c):
        yield model
    for site in directions:
        model.get_submodule(site)._forward_hooks.clear()


@contextmanager
def replaces(model, directions, c):
    """A second one takes the first one's place."""
    for site in directions:
        model.get_submodule(site)._forward_hooks.clear()
    with by_hand.steer(model, directions, c):
        yield model


@contextmanager
def bound(model, directions, c):
    """A `forward` on the instance, bound to the original: a copy has it too, and with it the original's weights."""
    sites = {model.get_submodule(site): c * v for site, v in directions.items()}
    for module, delta in sites.items():
        plain = module.forward
        module.forward = lambda *args, plain=plain, delta=delta, **kwargs: plain(*args, **kwargs) + delta
    try:
        yield model
    finally:
        for module in sites:
            del module.forward


BROKEN = {
    "torch.compile": [by_hand.steer],
    "left pads": [partial(hooked, hook=on_the_first_row)],
    "conv, C = W": [by_hand.steer],
    "exception": [without_finally],
    "beside another": [removes_all, replaces],
    "replica": [by_hand.steer, bound],
    "interrupt": [without_finally],
    "beams": [partial(hooked, hook=on_the_first_row), partial(hooked, hook=on_the_prompt)],
}


@pytest.mark.parametrize("name", [name for name in FEW if name != "interrupt"])
def test_the_edit_of_actsteer_arrives(name):
    with torch.no_grad():
        arrived, evidence = FEW[name](actsteer.steer)
    assert arrived, evidence


@pytest.mark.parametrize("name", ["left pads", "exception", "beside another", "interrupt", "beams"])
def test_the_edit_of_a_hook_arrives_where_that_is_enough(name):
    with torch.no_grad():
        arrived, evidence = FEW[name](by_hand.steer)
    assert arrived, evidence


@pytest.mark.parametrize(("name", "steer"), [(name, steer) for name, each in BROKEN.items() for steer in each])
def test_what_is_broken_does_not_arrive(name, steer):
    with torch.no_grad():
        arrived, evidence = FEW[name](steer)
    assert not arrived and evidence


def test_a_peer_that_cannot_has_a_cell_that_says_why():
    class Peer:
        @staticmethod
        def steer(model, directions, c):
            raise Cannot("it steers nothing")

    cells = arrives.row(Peer, quick=True)
    assert list(cells) == list(arrives.CHECKS)
    assert {(cell.says, cell.evidence) for cell in cells.values()} == {("cannot", "it steers nothing")}
