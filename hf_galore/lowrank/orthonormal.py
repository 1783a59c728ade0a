"""Orthonormal columns with the span of a matrix, two ways, and how far columns are from being so.

`by_reflections` is Householder QR, which never fails. `by_products` is Cholesky QR, run two or three times, with a
shift: little but matrix products, which suits a GPU, and may fail where columns are nearly dependent. It does not look
whether it has, as the host would wait for the device; `defect` tells, whoever reads it.

Both give the Q of QR with a positive diagonal of R: each column is on the side of the column it came from, and Q is
continuous in the matrix.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Factorisation = Literal["reflections", "products"]

TINY = torch.finfo(torch.float32).tiny
# How far from orthonormal columns may be, in units of the dtype's precision: 1e-5 in float32.
TOLERANCE = 84
# What is added to the diagonal of a Gram matrix, in units of the dtype's precision and of its norm. A run divides a
# condition number by up to 1/√(shift), about 1,000 in float32; without it, it fails above that.
_SHIFT = 4
# The bits of a float32 that TF32 leaves out, and half the last one that it keeps.
_LEFT_OUT, _HALF = 2**13 - 1, 2**12


def usual(device: torch.device) -> Factorisation:
    """The way that is quicker: on CPUs QR takes 0.4 to 0.9 of the time, on an H200 2.6 times that of two bare runs.

    (`python -m tests.benchmarks.refresh --only orthonormal`; on an H200 without the shift and the check.)
    """
    return "products" if device.type == "cuda" else "reflections"


def orthonormal(matrix: Tensor, factorisation: Factorisation, *, runs: int = 2) -> Tensor:
    """Orthonormal columns with the span of `matrix`, each on the side of the column that it came from.

    Args:
        matrix: m × r with m ≥ r, or a stack of such, finite, float32 or float64. It may be overwritten.
        factorisation: `products` may fail, see `by_products`.
        runs: how often Cholesky QR is run.
    """
    return by_products(matrix, runs) if factorisation == "products" else by_reflections(matrix)


def warm_up(device: torch.device) -> None:
    """Let a GPU's libraries take what factorisations need outside of torch's allocator, while there is memory.

    The first refresh is in a backward pass, where the card is fullest. cuSOLVER fails there with an internal error,
    where torch's allocator would have freed what it does not use.
    """
    if device.type == "cuda":
        sample = torch.eye(16, 8, device=device)
        by_reflections(by_products(sample))


def by_reflections(matrix: Tensor) -> Tensor:
    """Householder QR with the signs that make the diagonal of R positive."""
    q: Tensor
    q, r = torch.linalg.qr(matrix)
    return q.mul_(torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0).unsqueeze(-2))


def by_products(matrix: Tensor, runs: int = 2) -> Tensor:
    """Cholesky QR, run again on its own result, all runs but the last with a shift.

    In float32 two runs are enough up to a condition number of about 500 once the columns have norm 1, and three up to
    about 1e6. Where columns are more dependent than that, what comes back is finite, with elements of −1 to 1, and has
    a `defect`.

    Args:
        matrix: m × r with m ≥ r, finite, its largest element about 1. It is overwritten.
        runs: 1 or more.

    Source: Fukaya et al. (2020, arXiv:1809.11085), shifted CholeskyQR3, with a shift that is no larger than rounding
    asks for in practice; theirs, which covers the worst case, would be above 1 here.
    """
    q = matrix.div_(torch.linalg.vector_norm(matrix, dim=-2, keepdim=True).clamp_min(TINY))
    for left in reversed(range(runs)):
        products = gram(q)
        if left:
            norm = torch.linalg.vector_norm(products, 1, dim=-2).amax(dim=-1, keepdim=True)
            _diagonal(products).add_(norm, alpha=_SHIFT * torch.finfo(q.dtype).eps)
        # Not `cholesky`, for which the host waits.
        upper: Tensor = torch.linalg.cholesky_ex(products, upper=True)[0]
        del products
        if left:
            # In place, as the manual allows: this is where the memory of a step may peak.
            torch.linalg.solve_triangular(upper, q, upper=True, left=False, out=q)
        else:
            # Q + Q(R⁻¹ − I), which is QR⁻¹: R is nearly I, so that a product in TF32 does no harm.
            ones_off = upper.neg().diagonal_scatter(1 - _diagonal(upper), dim1=-2, dim2=-1)
            rest = torch.linalg.solve_triangular(upper, ones_off, upper=True)
            q = torch.addmm(q, q, rest) if q.ndim == 2 else torch.baddbmm(q, q, rest)
    return q.nan_to_num_(0.0, 1.0, -1.0).clamp_(-1.0, 1.0)


def defect(basis: Tensor) -> Tensor:
    """The largest element of |PᵀP − I|, as a share of what is allowed, which is 1 at most; 0-dimensional; may be NaN.

    Of a stack k numbers.
    """
    products = gram(basis)
    _diagonal(products).sub_(1)
    return products.abs_().amax(dim=(-2, -1)).div_(TOLERANCE * torch.finfo(basis.dtype).eps)


def _diagonal(matrices: Tensor) -> Tensor:
    """A view of the diagonal of a matrix, or of each of a stack."""
    return matrices.diagonal(dim1=-2, dim2=-1)


def gram(matrix: Tensor) -> Tensor:
    """MᵀM, r × r, in full precision even where products of float32 matrices are computed in TF32."""
    if not _may_be_rounded(matrix):
        return matrix.mT @ matrix
    coarse, fine = _apart(matrix)
    mixed = coarse.mT @ fine
    return (coarse.mT @ coarse).add_(mixed).add_(mixed.mT)


def precise_product(a: Tensor, b: Tensor) -> Tensor:
    """AB, in full precision even where products of float32 matrices are computed in TF32."""
    if not _may_be_rounded(a):
        return a @ b
    (coarse_a, fine_a), (coarse_b, fine_b) = _apart(a), _apart(b)
    return (coarse_a @ coarse_b).add_(coarse_a @ fine_b).add_(fine_a @ coarse_b)


def _may_be_rounded(matrix: Tensor) -> bool:
    """Whether products of a matrix may be computed in TF32."""
    return matrix.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")


def _apart(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A float32 matrix M as a sum of two, of which the first has no more bits than TF32 has.

    Products of the first parts are then exact; what rounding does to those with the second, which is 2⁻¹¹ of M, is no
    more than float32's own. The products of two second parts are as small.
    """
    coarse = matrix.view(torch.int32).add(_HALF).bitwise_and_(~_LEFT_OUT).view(torch.float32)
    return coarse, matrix - coarse
