"""The refresh methods: functions that compute new bases from a gradient, and a row of `METHODS` for each of them.

A new method is a function and a row here, and its name in `hf_galore.config.RefreshMethod`.

Pure functions on tensors, which read nothing back from the device. (Inside torch, on a GPU, `svd` and the small `eigh`
of `randomized` do.) All arithmetic is float32 (float64 for float64 gradients) whatever the gradient's dtype is. A
gradient that is not finite gives bases that are finite and mean nothing.

Methods are told how to orthonormalise (`hf_galore.lowrank.orthonormal`). With `products` it may fail, and the caller
looks at what came out. What comes in between need not be looked at: the span of a result that is orthonormal does not
depend on it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import RefreshMethod
from .orthonormal import TINY, Factorisation, orthonormal, precise_product
from .products import Gradient, times, transposed, transposed_times
from .projection import Bases, Side, at_least_float32, basis_shapes, for_each, nonzero_columns, norm_of_each

# Columns of the range finder beyond the rank: what Halko et al. advise (section 4.2).
OVERSAMPLING = 10
# Power iterations of the range finder, which starts from nothing: two serve flat spectra too.
RANDOMIZED_ITERATIONS = 2
# Directions with less than this share of the mean energy in the span are left where the old basis has them: rounding
# decides where they point, and that a run and its repetition differ there would show for the rest of both.
ENERGY_FLOOR = 1e-3
# Added where everything else is about 1, so that a zero gradient gives the old basis back.
_NEGLIGIBLE = 1e-20


class Method(NamedTuple):
    """What a refresh method is."""

    new_bases: Callable[[Gradient, Side, int, Bases | None, int, Factorisation], Bases]
    """Takes the gradient, the side, the rank, the old bases if there are any, a seed, and how to orthonormalise."""
    products: Callable[[tuple[int, int], int, Side], int]
    """How many products of an m × n gradient with r columns (or a few more) a refresh with an old basis takes."""
    from_factors: bool = True
    """Whether a `FactoredGradient` will do."""
    aligns_signs: bool = True
    """Whether the columns are to be turned to the side of the old ones: they have no sign of their own."""
    by_gradient: bool = True
    """Whether the columns are directions of the gradient, so that those beyond its rank hold nothing but rounding."""
    orthonormalises: bool = True
    """Whether it calls `orthonormal`, and so may fail with `products`."""
    repeats: int = 0
    """Refreshes more, each from the bases of the last, after which nothing of the old basis is left in the directions
    of a gradient of less than rank r."""


def svd_bases(
    gradient: Gradient,
    side: Side,
    rank: int,
    old: Bases | None = None,
    seed: int = 0,
    factorisation: Factorisation = "reflections",
) -> Bases:
    """The leading singular vectors of G, from a full SVD: the published refresh.

    Args:
        gradient: G, not its factors.
        side: which bases to return.
        rank: r, below min(m, n).
        old: not used.
        seed: not used.
        factorisation: not used.

    Source: GaLore (Zhao et al., 2024, arXiv:2403.03507), section 4.1, equation 12.
    """
    assert isinstance(gradient, Tensor)
    matrix = scale_(gradient.to(at_least_float32(gradient.dtype), copy=True))
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    # Slices are views that would keep the whole of U or Vh alive: the bases are copied out.
    return Bases(
        left=u[..., :rank].clone() if side != "right" else None,
        right=vh[..., :rank, :].mT.clone() if side != "left" else None,
    )


def randomized_bases(
    gradient: Gradient,
    side: Side,
    rank: int,
    old: Bases | None = None,
    seed: int = 0,
    factorisation: Factorisation = "reflections",
) -> Bases:
    """The leading singular vectors of G, approximately, from nothing but products with it.

    A range finder with oversampling and power iterations, and the singular vectors of G within that range. The random
    start is the same at every refresh, and on every process.

    Args:
        gradient: G, or its factors.
        side: which bases to return.
        rank: r, below min(m, n).
        old: not used.
        seed: not used.
        factorisation: how to orthonormalise.

    Source: Halko, Martinsson and Tropp (2011, arXiv:0909.4061), algorithms 4.4 and 5.1.
    """
    if side == "right":
        return _swapped(randomized_bases(transposed(gradient), "left", rank, factorisation=factorisation))
    m, n = gradient.shape[-2:]
    size = min(rank + OVERSAMPLING, m, n)
    sketch = times(gradient, gaussian(n, size, gradient))
    for _ in range(RANDOMIZED_ITERATIONS):
        range_basis = _orthonormal(sketch, factorisation)
        within = _orthonormal(transposed_times(gradient, range_basis), factorisation)
        sketch = times(gradient, within)
    range_basis = _orthonormal(sketch, factorisation)
    within = scale_(transposed_times(gradient, range_basis))  # n × size, the transpose of G within its range
    # Its right singular vectors from a small symmetric matrix: an SVD of n × size would cost more than all the rest.
    _, vectors = torch.linalg.eigh(within.mT @ within)
    vectors = vectors.flip(-1)[..., :rank]
    left = precise_product(range_basis, vectors)
    return Bases(left, _orthonormal(within @ vectors, factorisation) if side == "full" else None)


def subspace_bases(
    gradient: Gradient,
    side: Side,
    rank: int,
    old: Bases | None = None,
    seed: int = 0,
    factorisation: Factorisation = "reflections",
) -> Bases:
    """The leading left or right singular space of G, by block power iteration from the old basis.

    P ← orth(G(GᵀP)), started from the old basis; from Gaussian columns, and with one iteration more, where there is
    none. A zero gradient returns what it started from.

    Args:
        gradient: G, or its factors.
        side: which bases to return.
        rank: r, below min(m, n).
        old: the old bases, whose columns of zeros are started from random ones; `None` if there are none.
        seed: not used.
        factorisation: how to orthonormalise.

    Source: Golub and Van Loan, Matrix Computations, section 8.2.4 (orthogonal iteration).
    """
    return _iterated(gradient, side, rank, None if old is None else _completed(old, gradient), factorisation)


def random_bases(
    gradient: Gradient,
    side: Side,
    rank: int,
    old: Bases | None = None,
    seed: int = 0,
    factorisation: Factorisation = "reflections",
) -> Bases:
    """Random bases that have nothing to do with G: uniform on the Stiefel manifold, the two sides independent.

    P is orth(Z) for a Gaussian Z, with the signs that make the diagonal of R in Z = PR positive.

    Args:
        gradient: gives the shape, the device and the dtype; its values are not looked at.
        side: which bases to return.
        rank: r, below min(m, n).
        old: not used.
        seed: from 0 to 2⁶³ − 1; the same seed gives the same bases on every device of one kind.
        factorisation: how to orthonormalise.

    Sources: GoLore (He et al., 2024, arXiv:2410.11289); APOLLO (Zhu et al., 2024, arXiv:2412.05270), with Gaussian
    columns that are not orthonormal; Mezzadri (2007, arXiv:math-ph/0609050) for the signs.
    """
    generator = torch.Generator(gradient.device).manual_seed(seed)
    dtype = at_least_float32(gradient.dtype)

    def basis(shape: tuple[int, ...]) -> Tensor:
        sample = torch.randn(shape, generator=generator, dtype=dtype, device=gradient.device)
        return _orthonormal(sample, factorisation, runs=3)  # of nearly as many columns as rows some nearly depend

    shapes = basis_shapes(gradient.shape, side, rank)
    return Bases(*(None if shape is None else basis(shape) for shape in shapes))


def power_iterations(shape: tuple[int, int], rank: int) -> int:
    """How many power iterations a refresh takes: 2, or 1 where the rank is above a sixth of the smaller side of m × n.

    For `subspace`, chosen by `tests/benchmarks/refresh.py`: a low rank asks for a second iteration, and its iterations
    are cheap. More capture hardly more, and do not make the model learn better (`tests/benchmarks/quality.py`).
    """
    return 2 if 6 * rank <= min(shape) else 1


METHODS: dict[RefreshMethod, Method] = {
    "svd": Method(svd_bases, lambda shape, rank, side: 0, from_factors=False, orthonormalises=False),
    "randomized": Method(randomized_bases, lambda shape, rank, side: 2 * RANDOMIZED_ITERATIONS + 2),
    "subspace": Method(
        subspace_bases,
        lambda shape, rank, side: 2 * power_iterations(shape, rank) + (side == "full"),
        aligns_signs=False,  # its columns come from the old ones
        repeats=2,
    ),
    "random": Method(random_bases, lambda shape, rank, side: 0, aligns_signs=False, by_gradient=False),
}


def gaussian(rows: int, columns: int, gradient: Gradient) -> Tensor:
    """The same Gaussian numbers of variance 1 / rows every time, without touching anybody's random state."""
    generator = torch.Generator(gradient.device).manual_seed(0)
    size, dtype = (rows, columns), at_least_float32(gradient.dtype)
    sample: Tensor = torch.randn(size, generator=generator, dtype=dtype, device=gradient.device)
    return sample / math.sqrt(rows)


def scale_(matrix: Tensor) -> Tensor:
    """The matrix scaled in place to a largest element of 1, and finite: no factorisation may see what is not.

    Each of a stack by itself.
    """
    return matrix.div_(_largest(matrix)).nan_to_num_(0.0, 0.0, 0.0)


def _iterated(gradient: Gradient, side: Side, rank: int, old: Bases | None, factorisation: Factorisation) -> Bases:
    """`subspace_bases` from old bases without columns of zeros, in the dtype of the arithmetic."""
    if side == "right":
        swapped = None if old is None else _swapped(old)
        return _swapped(_iterated(transposed(gradient), "left", rank, swapped, factorisation))
    *stack, m, n = gradient.shape
    old_left, old_right = old or (None, None)
    basis = gaussian(m, rank, gradient).expand(*stack, m, rank) if old_left is None else old_left
    iterations = power_iterations((m, n), rank) + (old_left is None)
    # The first iteration from an old basis or a random one has columns that nearly depend: all have most of the leading
    # directions. After it they are nearly orthogonal, also where it has not been orthonormalised to the last digit.
    for _ in range(iterations):
        basis = _power_iteration(gradient, basis, factorisation, runs=3 if iterations == 1 else 2)
    if side == "left":
        return Bases(basis, None)
    start = gaussian(n, rank, gradient) if old_right is None else old_right
    within = scale_(transposed_times(gradient, basis))
    size = (within.square().sum(dim=(-2, -1), keepdim=True) / rank).sqrt()
    return Bases(basis, _orthonormal(within + (ENERGY_FLOOR * size + _NEGLIGIBLE) * start, factorisation))


def _power_iteration(gradient: Gradient, basis: Tensor, factorisation: Factorisation, runs: int) -> Tensor:
    within = transposed_times(gradient, basis)
    largest = _largest(within)  # squares of 1e-30 are 0, and of 1e30 infinite
    within.div_(largest)
    floor = ENERGY_FLOOR * for_each(norm_of_each(within)).square() / basis.shape[-1]
    # In place throughout: at 4096 × 1024 the temporaries would take a tenth of the time.
    image = times(gradient, within).div_(largest).addcmul_(basis, floor + _NEGLIGIBLE)
    return _orthonormal(image, factorisation, runs)


def _completed(old: Bases, gradient: Gradient) -> Bases:
    """The old bases with random numbers in place of their columns of zeros, which nothing would grow from."""
    dtype = at_least_float32(gradient.dtype)
    return Bases(
        *(
            None
            if basis is None
            else torch.where(nonzero_columns(basis).unsqueeze(-2), basis.to(dtype), _uniform(basis.shape, gradient))
            for basis in old
        )
    )


def _uniform(shape: Sequence[int], gradient: Gradient) -> Tensor:
    """Uniform numbers of the variance that `gaussian` has, the same every time: quicker to make."""
    generator = torch.Generator(gradient.device).manual_seed(1)
    dtype = at_least_float32(gradient.dtype)
    sample: Tensor = torch.rand(tuple(shape[-2:]), generator=generator, dtype=dtype, device=gradient.device)
    return sample.sub_(0.5).mul_((12 / shape[-2]) ** 0.5)


def _orthonormal(matrix: Tensor, factorisation: Factorisation, runs: int = 2) -> Tensor:
    """`orthonormal` of a matrix of any size. The matrix is overwritten."""
    return orthonormal(scale_(matrix), factorisation, runs=runs)


def _largest(matrix: Tensor) -> Tensor:
    """The largest magnitude, 0-dimensional and above 0; of a stack that of each, k × 1 × 1."""
    if matrix.ndim == 2:
        low, high = matrix.aminmax()
        return torch.maximum(-low, high).clamp_min(TINY)
    low, high = matrix.flatten(1).aminmax(dim=1)
    return for_each(torch.maximum(-low, high).clamp_min(TINY))


def _swapped(bases: Bases) -> Bases:
    return Bases(bases.right, bases.left)
