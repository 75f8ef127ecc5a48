"""Jacobian: the strongest directions of a linear map that is known by its products with vectors alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import trange

from actsteer.collecting.moments import exact
from actsteer.errors import UnsupportedModelError

Read = Callable[[Any], Tensor]
"""What a direction moves, (n, d') for one batch, in float32 at least."""


def strongest(
    products: Callable[[Float[Tensor, "k d"]], Float[Tensor, "k d"]],
    d: int,
    *,
    count: int,
    steps: int,
    generator: torch.Generator | None = None,
    progress: bool = True,
) -> tuple[Float[Tensor, "count d"], Float[Tensor, " count"]]:
    """The eigenvectors of the largest eigenvalues of a symmetric matrix A >= 0, as rows, and these; in float64.

    They are the best that the span of X, A X, A² X, ... holds, for `count` random vectors X: each step multiplies A by
    `count` vectors. They are exact after d / count steps, and nearly so long before where eigenvalues differ.

    Args:
        products: X -> X A, of rows.

    Source: randomized block Krylov methods, Musco & Musco 2015 (arXiv 1504.05477).

    >>> matrix = torch.diag(torch.tensor([1.0, 9.0, 4.0], dtype=torch.float64))
    >>> vectors, values = strongest(lambda rows: rows @ matrix, 3, count=2, steps=2)
    >>> vectors.abs().round(decimals=6).tolist(), values.round(decimals=6).tolist()
    ([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], [9.0, 4.0])
    """
    basis = images = torch.zeros(0, d, dtype=torch.float64)
    block = torch.randn(count, d, generator=generator, dtype=torch.float64)
    for _ in trange(steps, desc="discover", disable=not progress, delay=2.0):
        block = _new(block, basis)
        if not len(block):  # the span is one that A maps into itself
            break
        basis, block = torch.cat([basis, block]), products(block)
        images = torch.cat([images, block])
    inside = basis @ images.T
    values, vectors = torch.linalg.eigh((inside + inside.T) / 2)
    return (vectors.T @ basis)[-count:].flip(0), values[-count:].flip(0)


def _new(rows: Float[Tensor, "k d"], basis: Float[Tensor, "n d"]) -> Float[Tensor, "m d"]:
    """Orthonormal rows that span what the basis lacks of these."""
    rows = rows / rows.norm(dim=1, keepdim=True).clamp(min=torch.finfo(rows.dtype).tiny)
    for _ in range(2):  # twice, for accuracy
        rows = rows - rows @ basis.T @ basis
        sizes, spanned = torch.linalg.svd(rows, full_matrices=False)[1:]
        rows = spanned[sizes > 1e-12][: rows.shape[1] - len(basis)]
    return rows


@final
class Squared:
    """X -> X JᵀJ, of rows, with J the Jacobian of what is read on all batches by the leaf, where the leaf is zero.

    Raises:
        UnsupportedModelError: the model has an operation without a forward derivative, or cuts gradients off.
    """

    def __init__(self, read: Read, leaf: Float[Tensor, "1 d"], data: Sequence[Any]) -> None:
        self._read, self._leaf, self._data = read, leaf, data
        self._largest = 0.0

    def __call__(self, rows: Float[Tensor, "k d"]) -> Float[Tensor, "k d"]:
        total = torch.zeros_like(rows)
        for batch in self._data:
            moved = [self._moved(batch, row.to(self._leaf)) for row in rows]
            there = self._read(batch)
            for index, pushed in enumerate(moved):
                pulled = None
                if there.requires_grad and pushed is not None:
                    (pulled,) = torch.autograd.grad(there, [self._leaf], pushed, retain_graph=True, allow_unused=True)
                back = torch.zeros_like(rows[index]) if pulled is None else exact(pulled[0]).cpu()
                self._check(0.0 if pushed is None else float(exact(pushed).square().sum()), float(back @ rows[index]))
                total[index] += back
        return total

    def _check(self, forth: float, back: float) -> None:
        """That ‖J v‖² is the same both ways, to within what is small beside the largest that was seen."""
        self._largest = max(self._largest, forth, back)
        if abs(forth - back) > 0.1 * self._largest:
            raise UnsupportedModelError(
                f"method='jacobian': ‖J v‖² is {forth:.4g} by forward derivatives and {back:.4g} by gradients; does a "
                "module run without gradients? Use method='trained'"
            )

    @torch.no_grad()
    def _moved(self, batch: Any, tangent: Float[Tensor, " d"]) -> Tensor | None:
        """J v, by forward derivatives; None where nothing depends on the leaf."""
        try:
            # of the kernels of attention, this one alone has a forward derivative
            with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
                self._leaf.copy_(forward_ad.make_dual(torch.zeros_like(self._leaf), tangent[None]))
                moved: Tensor | None = forward_ad.unpack_dual(self._read(batch)).tangent
                return moved
        except NotImplementedError as error:
            why = str(error).splitlines()[0]
            raise UnsupportedModelError(
                f"method='jacobian': an operation has no forward derivative ({why}); use method='trained'"
            ) from error
