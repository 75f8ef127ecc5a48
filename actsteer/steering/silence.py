"""silence: what a block has not done, though it ended without an error."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from actsteer.steering.choose import Choice
from actsteer.steering.edit import Fired
from actsteer.steering.plan import Plan


def unused(plan: Plan, chosen: Mapping[str, Choice], *, ran: bool) -> Iterator[str]:
    """The warnings due at the end of a block: that the model did not run in it, or that nothing was generated.

    Whether an edit that is written into a bias has run cannot be seen, and is not warned of.

    Args:
        ran: whether the model ran in the block.
    """
    if not plan.active:
        return
    seen = {site: edit.fired for site, edit in plan.edits.items() if chosen[site].mechanism != "fold"}
    if chosen and not ran and seen.keys() == plan.edits.keys() and all(fired is Fired.NO for fired in seen.values()):
        yield (
            f"the {type(plan.model).__name__} did not run in the block, so that nothing was steered; call it inside, "
            "the same object as the Steerer was given"
        )
    if not ran:
        return
    positions = {concept: own for passes in plan.passes for concept, own in passes.positions.items()}
    for concept in plan.active:
        was_met = any(passes.is_met.get(concept, False) for passes in plan.passes)
        if isinstance(own := positions.get(concept), str) and own == "generated" and not was_met:
            yield (
                f"positions='generated' of {plan.bank.concepts[concept]!r}: nothing was generated in the block that "
                "the model went on from, so that it steered nothing: a plain forward pass is all prompt, and so is the "
                "one that makes the first new token; generate more with model.generate, or choose other positions"
            )
