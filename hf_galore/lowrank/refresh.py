"""Computing a new basis from a gradient: pure functions on tensors.

None reads a value back from the device. (Inside torch, on a GPU, `svd` and the small `eigh` of `randomized` do.)
All arithmetic is float32 (float64 for float64 gradients) whatever the gradient's dtype is. Of a gradient that is not
finite come bases that are orthonormal and mean nothing: the caller, who reads its norm with whatever else it wants to
know of a refresh, throws them away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import RefreshMethod
from .projection import Bases, FactoredGradient, Gradient, Side, norm_of, times, transposed_times

# Columns of the range finder beyond the rank: what Halko et al. advise (section 4.2).
OVERSAMPLING = 10
# Power iterations of the range finder, which starts from nothing: two serve flat spectra too.
RANDOMIZED_ITERATIONS = 2
# Directions with less than this share of the mean energy in the span are left where the old basis has them: rounding
# decides where they point, and that a run and its repetition differ there would show for the rest of both.
ENERGY_FLOOR = 1e-3
# Columns that estimate the part of a gradient outside its basis, where only its factors are at hand.
PROBES = 16
# A column with less than this part of what a column has on average may stand for nothing: the floor above leaves up to
# that in it. (Columns of real gradients have 3e-4 and more.)
WEAK = 1e-4
# Rows of a gradient that tell what precision it was computed in.
_SAMPLE_ROWS = 64
_TINY = torch.finfo(torch.float32).tiny
# Added where everything else is about 1, so that a zero gradient gives the old basis back.
_NEGLIGIBLE = 1e-20


def power_iterations(shape: tuple[int, int], rank: int) -> int:
    """How many power iterations a refresh takes: 2, or 1 where the rank is above a sixth of the smaller side.

    For `subspace`, chosen by `tests/benchmarks/refresh.py`: a low rank asks for a second iteration, and its iterations
    are cheap. More capture hardly more, and do not make the model learn better (`tests/benchmarks/quality.py`).
    """
    return 2 if 6 * rank <= min(shape) else 1


def products(shape: tuple[int, int], rank: int, side: Side, method: RefreshMethod) -> int:
    """How many products of the gradient with r columns (or a few more) a later refresh takes."""
    if method == "randomized":
        return 2 * RANDOMIZED_ITERATIONS + 2
    return 2 * power_iterations(shape, rank) + (side == "full")


def new_bases(gradient: Gradient, side: Side, rank: int, method: RefreshMethod, old: Bases | None) -> Bases:
    """New bases for a gradient G, m × n, in float32 (float64 for float64 gradients).

    Args:
        gradient: G, or its factors; `svd` takes G only.
        side: which bases to return.
        rank: r, below min(m, n).
        method: `svd`, `randomized` or `subspace`.
        old: the present bases; `None` before the first refresh.
    """
    if method == "subspace":
        return subspace_bases(gradient, side, rank, None if old is None else _completed(old, gradient))
    if method == "randomized":
        new = randomized_bases(gradient, side, rank)
    else:
        assert isinstance(gradient, Tensor)
        new = svd_bases(gradient, side, rank)
    if old is None:
        return new
    return Bases(*(None if p is None or q is None else align_signs(p, q) for p, q in zip(new, old, strict=True)))


def full_rank(bases: Bases, gradient: Gradient, old: Bases | None) -> Tensor:
    """1 where every column stands for a direction of the gradient, 0 where its rank may be below r; 0-dimensional.

    The rank of a gradient in factors is at most its rows. Of another a column tells that has next to nothing of it (a
    rank only a little below r does not show that way), and that it was so at the last refresh.

    Args:
        bases: as `new_bases` gives them.
        old: those before, if there were any.
    """
    floor = _noise_floor(gradient)
    found = [_is_alive(basis).all() for basis in old or () if basis is not None]
    for share in _shares(bases, gradient):
        if share is not None:
            limit = floor.clamp_min(WEAK * share.shape[0] ** -0.5)
            known = isinstance(gradient, FactoredGradient) and len(gradient.inputs) < share.shape[0]
            found.append((share > limit).all() & (not known))
    flag: Tensor = torch.stack(found).all()
    return flag.to(_dtype_of(gradient))


def bases_of_lower_rank(gradient: Gradient, side: Side, rank: int, method: RefreshMethod, bases: Bases) -> Bases:
    """The bases of a gradient of less than rank r, with zeros for the columns that stand for none of its directions.

    A layer that sees fewer rows than the rank, such as a classifier, has such a gradient. What it has along the other
    columns is rounding, which Adam would blow up to full size.

    Args:
        gradient: neither zero nor infinite.
        bases: from `new_bases`, of which `full_rank` says 0.
    """
    if method == "subspace":
        # What the floor of a power iteration keeps of the old basis has tilted the directions that there are.
        for _ in range(2):
            bases = subspace_bases(gradient, side, rank, bases)
    floor = _noise_floor(gradient)
    return Bases(
        *(
            None if p is None or share is None else p * (share > floor)
            for p, share in zip(bases, _shares(bases, gradient), strict=True)
        )
    )


def _shares(bases: Bases, gradient: Gradient) -> tuple[Tensor | None, Tensor | None]:
    """‖Gᵀp‖ / ‖G‖ of every column p of either basis, from 16 random columns of G."""

    def shares(basis: Tensor, gradient: Gradient) -> Tensor:
        sketch = _scale_(times(gradient, _gaussian(gradient.shape[1], PROBES, gradient)))
        along: Tensor = torch.linalg.vector_norm(basis.mT @ sketch, dim=-1)
        return along.div_(norm_of(sketch).clamp_min(_TINY))

    return (
        None if bases.left is None else shares(bases.left, gradient),
        None if bases.right is None else shares(bases.right, _transposed(gradient)),
    )


def _noise_floor(gradient: Gradient) -> Tensor:
    """The share of a gradient's norm that rounding may put into one direction; 0-dimensional.

    Rounding the elements of G by up to ε/2 of their size puts up to about ε / √min(m, n) of its norm into the direction
    with most of it; twice that is taken. A gradient in float32 may have been computed in less, under autocast.
    """
    precise = 32 * torch.finfo(torch.float32).eps  # of the refresh itself; nobody needs less of a float64 gradient
    floor = torch.full((), precise, dtype=_dtype_of(gradient), device=gradient.device)
    if isinstance(gradient, FactoredGradient):
        return floor
    spread = 2 * min(gradient.shape) ** -0.5
    if gradient.dtype in (torch.bfloat16, torch.float16):
        return floor.add_(torch.finfo(gradient.dtype).eps * spread)
    sample = gradient[:_SAMPLE_ROWS]
    for dtype in (torch.bfloat16, torch.float16):
        rounded: Tensor = (sample.to(dtype).to(sample.dtype) == sample).all()
        floor = torch.maximum(floor, rounded * (precise + torch.finfo(dtype).eps * spread))
    return floor


def _completed(old: Bases, gradient: Gradient) -> Bases:
    """The old bases with something to start from in the columns that stand for nothing."""
    return Bases(
        *(
            None
            if basis is None
            else torch.where(_is_alive(basis), basis.to(_dtype_of(gradient)), _uniform(basis.shape, gradient))
            for basis in old
        )
    )


def _is_alive(basis: Tensor) -> Tensor:
    """Which columns stand for a direction."""
    size: Tensor = torch.linalg.vector_norm(basis, dim=0, dtype=torch.promote_types(basis.dtype, torch.float32))
    alive: Tensor = size > 0.5
    return alive


def svd_bases(gradient: Tensor, side: Side, rank: int) -> Bases:
    """The leading singular vectors of G, from a full SVD: the published refresh.

    Source: GaLore (Zhao et al., 2024, arXiv:2403.03507), section 4.1, equation 12.
    """
    u, _, vh = torch.linalg.svd(_scale_(gradient.to(_dtype_of(gradient), copy=True)), full_matrices=False)
    # Slices are views that would keep the whole of U or Vh alive: the bases are copied out.
    return Bases(
        left=u[:, :rank].clone() if side != "right" else None,
        right=vh[:rank].mT.clone() if side != "left" else None,
    )


def randomized_bases(gradient: Gradient, side: Side, rank: int) -> Bases:
    """The leading singular vectors of G, approximately, from nothing but products with it.

    A range finder with oversampling and power iterations, and the singular vectors of G within that range. The random
    start is the same at every refresh, and on every process.

    Source: Halko, Martinsson and Tropp (2011, arXiv:0909.4061), algorithms 4.4 and 5.1.
    """
    if side == "right":
        return _swapped(randomized_bases(_transposed(gradient), "left", rank))
    m, n = gradient.shape
    size = min(rank + OVERSAMPLING, m, n)
    sketch = times(gradient, _gaussian(n, size, gradient))
    for _ in range(RANDOMIZED_ITERATIONS):
        within = _orthonormal(transposed_times(gradient, _orthonormal(sketch)))
        sketch = times(gradient, within)
    range_basis = _orthonormal(sketch)
    within = _scale_(transposed_times(gradient, range_basis))  # n × size, the transpose of G within its range
    # Its right singular vectors from a small symmetric matrix: an SVD of n × size would cost more than all the rest.
    _, vectors = torch.linalg.eigh(within.mT @ within)
    vectors = vectors.flip(-1)[:, :rank]
    left = range_basis @ vectors
    return Bases(left, _orthonormal(within @ vectors) if side == "full" else None)


def subspace_bases(gradient: Gradient, side: Side, rank: int, old: Bases | None) -> Bases:
    """The leading left or right singular space of G, by block power iteration from the old basis.

    P ← orth(G(GᵀP)), started from the old basis; from Gaussian columns, and with one iteration more, where there is
    none. A zero gradient returns what it started from.

    Source: Golub and Van Loan, Matrix Computations, section 8.2.4 (orthogonal iteration).
    """
    if side == "right":
        return _swapped(subspace_bases(_transposed(gradient), "left", rank, None if old is None else _swapped(old)))
    m, n = gradient.shape
    old_left, old_right = old or (None, None)
    basis = _gaussian(m, rank, gradient) if old_left is None else old_left.to(_dtype_of(gradient))
    for _ in range(power_iterations((m, n), rank) + (old_left is None)):
        basis = _power_iteration(gradient, basis)
    if side == "left":
        return Bases(basis, None)
    start = _gaussian(n, rank, gradient) if old_right is None else old_right.to(_dtype_of(gradient))
    within = _scale_(transposed_times(gradient, basis))
    size = (within.square().sum() / rank).sqrt()
    return Bases(basis, _orthonormal(within + (ENERGY_FLOOR * size + _NEGLIGIBLE) * start))


def align_signs(basis: Tensor, old: Tensor) -> Tensor:
    """`basis` with each column turned to the side of the old basis's column: their products are not negative.

    Singular vectors have no sign of their own, and rounding decides which comes out of a factorisation. The moments
    are kept over a refresh, and a column that flips would turn its momentum round.

    Args:
        basis: k × r.
        old: k × r.
    """
    flipped = (basis * old).sum(dim=0) < 0
    return torch.where(flipped, -basis, basis)


def overlap(new: Bases, old: Bases) -> Tensor:
    """How much of the old subspace is in the new one, 0 to 1: ‖P_newᵀP_old‖²_F / r, the smaller of the two sides'.

    Two random subspaces overlap by r / m. Columns of zeros count for nothing. 0-dimensional.
    """
    shares = [
        norm_of(p.mT @ q).square() / _is_alive(q).sum().clamp_min(1)
        for p, q in zip(new, old, strict=True)
        if p is not None and q is not None
    ]
    return torch.stack(shares).amin()


def figures_of(
    gradient: Gradient, low_rank: Tensor, new: Bases, old: Bases | None, computed: Bases | None = None
) -> Tensor:
    """What there is to know of a refresh: ‖G‖_F, the captured energy and the overlap (1 for a first refresh).

    Of a gradient in factors ‖G‖² is ‖R‖² + ‖G − back(R)‖², the latter estimated from products with `PROBES` Gaussian
    columns, without bias: there is no G to take the norm of.

    Args:
        gradient: G.
        low_rank: R, in the new bases.
        new: the new bases as they are kept.
        old: those before, if there were any.
        computed: the new bases before they were quantised, to be told what `full_rank` says of them.

    Returns:
        3 numbers, or 4, of at least float32 on the gradient's device.

    Source: the estimate is Hutchinson's (1989).
    """
    captured = norm_of(low_rank)
    if isinstance(gradient, FactoredGradient):
        probes = _gaussian(gradient.shape[1], PROBES, gradient) * (gradient.shape[1] / PROBES) ** 0.5
        narrow = probes if new.right is None else new.right.mT.to(probes.dtype) @ probes
        back = low_rank.to(probes.dtype) @ narrow
        back = back if new.left is None else new.left.to(probes.dtype) @ back
        total = torch.hypot(captured, norm_of(times(gradient, probes) - back))
    else:
        total = norm_of(gradient)
    energy = (captured / total.clamp_min(_TINY)).square().clamp_max(1.0)
    shared = torch.ones_like(total) if old is None else overlap(new, old)
    figures = [total, torch.where(total > 0, energy, 1.0), shared]
    return torch.stack(figures if computed is None else [*figures, full_rank(computed, gradient, old).to(total.dtype)])


def _power_iteration(gradient: Gradient, basis: Tensor) -> Tensor:
    within = transposed_times(gradient, basis)
    largest = _largest(within)  # squares of 1e-30 are 0, and of 1e30 infinite
    within.div_(largest)
    floor = ENERGY_FLOOR * norm_of(within).square() / basis.shape[1]
    # In place throughout: at 4096 × 1024 the temporaries would take a tenth of the time.
    return _orthonormal(times(gradient, within).div_(largest).addcmul_(basis, floor + _NEGLIGIBLE))


def _gaussian(rows: int, columns: int, gradient: Gradient) -> Tensor:
    """The same numbers every time, without touching anybody's random state."""
    generator = torch.Generator(gradient.device).manual_seed(0)
    size = (rows, columns)
    sample: Tensor = torch.randn(size, generator=generator, dtype=_dtype_of(gradient), device=gradient.device)
    return sample / math.sqrt(rows)


def _uniform(shape: Sequence[int], gradient: Gradient) -> Tensor:
    """Uniform numbers of the variance that `_gaussian` has, the same every time: quicker to make."""
    generator = torch.Generator(gradient.device).manual_seed(1)
    sample: Tensor = torch.rand(tuple(shape), generator=generator, dtype=_dtype_of(gradient), device=gradient.device)
    return sample.sub_(0.5).mul_((12 / shape[0]) ** 0.5)


def _orthonormal(matrix: Tensor) -> Tensor:
    """Orthonormal columns with the span of `matrix`, by Householder QR, each on the side of the column it came from.

    Continuous in `matrix`, as QR without a fixed sign is not. The matrix is overwritten.
    """
    q: Tensor
    q, r = torch.linalg.qr(_scale_(matrix))  # as fast as a Cholesky QR run twice, and it never fails
    return q.mul_(torch.where(r.diagonal() < 0, -1.0, 1.0))


def _scale_(matrix: Tensor) -> Tensor:
    """The matrix scaled in place to a largest element of 1, and finite: no factorisation may see what is not."""
    return matrix.div_(_largest(matrix)).nan_to_num_(0.0, 0.0, 0.0)


def _largest(matrix: Tensor) -> Tensor:
    """The largest magnitude, 0-dimensional and above 0."""
    low, high = matrix.aminmax()
    return torch.maximum(-low, high).clamp_min(_TINY)


def _dtype_of(gradient: Gradient) -> torch.dtype:
    """The dtype that a refresh is computed in, at least float32."""
    return torch.promote_types(gradient.dtype, torch.float32)


def _transposed(gradient: Gradient) -> Gradient:
    if isinstance(gradient, FactoredGradient):
        return FactoredGradient(gradient.inputs, gradient.output_gradient)
    return gradient.mT


def _swapped(bases: Bases) -> Bases:
    return Bases(bases.right, bases.left)
