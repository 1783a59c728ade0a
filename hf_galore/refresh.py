"""Computing a new basis from a gradient: pure functions on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .projection import Bases, Side


def svd_bases(gradient: Tensor, side: Side, rank: int) -> Bases:
    """The leading singular vectors of the gradient, from a full SVD: the published refresh.

    Runs in float32 (float64 for a float64 gradient) whatever the gradient's dtype is, and returns bases in the
    gradient's dtype.

    Args:
        gradient: G, m × n.
        side: which bases to return.
        rank: r, at most min(m, n).

    Source: GaLore (arXiv:2403.03507), section 4.1, equation 12.
    """
    matrix = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    # Slices are views that would keep the whole of U or Vh alive: the bases are copied out.
    return Bases(
        left=u[:, :rank].to(gradient.dtype, copy=True) if side != "right" else None,
        right=vh[:rank].mT.to(gradient.dtype, copy=True) if side != "left" else None,
    )


def align_signs(basis: Tensor, old: Tensor) -> Tensor:
    """`basis` with each column turned to the side of the old basis's column: their products are not negative.

    Singular vectors have no sign of their own, and rounding decides which comes out of a factorisation. The moments
    are kept over a refresh, and a column that flips would turn its momentum round.

    Args:
        basis: k × r.
        old: k × r; zeros before the first refresh.
    """
    flipped = (basis * old).sum(dim=0) < 0
    return torch.where(flipped, -basis, basis)
