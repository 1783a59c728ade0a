"""A refresh: new bases for a gradient, and what there is to know of them. Pure functions on tensors.

How the bases are computed is in `hf_galore.lowrank.methods`. None of these reads a value back from the device. Of a
gradient that is not finite come bases that mean nothing, and on a GPU others may be not orthonormal: the caller, who
reads the norm and the defect with whatever else it wants to know of a refresh, throws them away.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..config import RefreshMethod
from .methods import METHODS, gaussian, scale_
from .orthonormal import TINY, Factorisation, defect, gram, usual
from .products import FactoredGradient, Gradient, GroupedGradient, ShardedGradient, SummedGradient, times, transposed
from .projection import Bases, Side, at_least_float32, nonzero_columns, norm_of, norm_of_each

# Columns that estimate the part of a gradient outside its basis, where only its factors are at hand.
PROBES = 16
# A column with less than this part of what a column has on average may stand for nothing: `methods.ENERGY_FLOOR` leaves
# up to that in it. (Columns of real gradients have 3e-4 and more.)
WEAK = 1e-4
# The part of a vector's square below which it depends on others. Rounding leaves up to 4e-5 of one that does, in
# float32; of others, where gradients are of full rank, mostly 0.5 and more is left.
_PIVOT = 1e-3
# Rows of a gradient that tell what precision it was computed in.
_SAMPLE_ROWS = 64


def new_bases(
    gradient: Gradient,
    side: Side,
    rank: int,
    method: RefreshMethod,
    old: Bases | None,
    *,
    seed: int = 0,
    factorisation: Factorisation | None = None,
) -> Bases:
    """New bases for a gradient G, m × n, in float32 (float64 for float64 gradients); of a stack those of each.

    Args:
        gradient: G, or its factors; `svd` takes G only.
        side: which bases to return.
        rank: r, below min(m, n).
        method: one of `METHODS`.
        old: the present bases; `None` before the first refresh.
        seed: of `random`, another one for each target and refresh (`hf_galore.lowrank.seeds.basis_seed`).
        factorisation: how to orthonormalise; `None` for the way that is quicker on the gradient's device. With
            `products` the bases may have a `defect`.
    """
    new = METHODS[method].new_bases(gradient, side, rank, old, seed, factorisation or usual(gradient.device))
    if old is None or not METHODS[method].aligns_signs:
        return new
    return Bases(*(None if p is None or q is None else align_signs(p, q) for p, q in zip(new, old, strict=True)))


def products(shape: tuple[int, int], rank: int, side: Side, method: RefreshMethod) -> int:
    """How many products of the gradient with r columns (or a few more) a refresh with an old basis takes."""
    return METHODS[method].products(shape, rank, side)


def cheaper_from_factors(shape: Sequence[int], rank: int, side: Side, method: RefreshMethod, tokens: int) -> bool:
    """Whether a refresh and R take fewer multiply-adds from the factors of a gradient than from G = δᵀX.

    Args:
        shape: m × n, of the weight.
        rank: r.
        side: which bases are refreshed.
        method: false for one that cannot work from factors.
        tokens: T, the rows of δ and of X; of a stack those of a weight on average.
    """
    if not METHODS[method].from_factors:
        return False
    m, n = shape[-2:]
    narrow = products((m, n), rank, side, method) + 1  # and R
    return narrow * tokens * rank * (m + n) < tokens * m * n + narrow * rank * m * n


def full_rank(bases: Bases, gradient: Gradient, old: Bases | None, low_rank: Tensor | None = None) -> Tensor:
    """1 where every column stands for a direction of the gradient, 0 where its rank may be below r; 0-dimensional.

    Of a stack k numbers.

    The rank of a gradient in factors is at most its rows. Of another a column tells that has next to nothing of it, and
    that it was so at the last refresh; and R, whose rank is that of the gradient at most, though what the power
    iteration has kept of old directions is no longer small in it.

    Args:
        bases: as `new_bases` gives them.
        gradient: G, or its factors.
        old: those before, if there were any.
        low_rank: R in these bases; of a sharded gradient the rows of its long side that this process has.
    """
    floor = _noise_floor(gradient)
    found = [nonzero_columns(basis).all(dim=-1) for basis in old or () if basis is not None]
    for share in _shares(bases, gradient):
        if share is not None:
            limit = floor.clamp_min(WEAK * share.shape[-1] ** -0.5)
            enough = _tokens(gradient) >= share.shape[-1]
            found.append((share > limit.unsqueeze(-1)).all(dim=-1) & enough)
    if low_rank is not None and low_rank.dtype.itemsize >= 4:
        if isinstance(gradient, ShardedGradient):
            products = gradient.ranks.sum(gram(low_rank))
        else:
            products = gram(low_rank.mT if bases.right is None else low_rank)
        found.append(_independent(products))
    flag: Tensor = torch.stack(found).all(dim=0)
    return flag.to(at_least_float32(gradient.dtype))


def _independent(products: Tensor) -> Tensor:
    """Whether no vector depends on those before it, as far as rounding allows to say so: a boolean, or k of them.

    The pivots of a Cholesky factorisation are what is left of a vector's square once the others are taken out.

    Args:
        products: of the vectors with each other, r × r.
    """
    factor, failed = torch.linalg.cholesky_ex(products)
    left: Tensor = factor.diagonal(dim1=-2, dim2=-1).square()
    enough: Tensor = (left > _PIVOT * products.diagonal(dim1=-2, dim2=-1)).all(dim=-1)
    return enough.logical_and(failed == 0)


def _tokens(gradient: Gradient) -> int | float | Tensor:
    """The rows of a gradient's factors, of a grouped one those of each weight; more than enough where it has none."""
    if isinstance(gradient, GroupedGradient):
        return gradient.counts()
    if isinstance(gradient, SummedGradient):
        return gradient.tokens
    return gradient.inputs.shape[-2] if isinstance(gradient, FactoredGradient) else math.inf


def bases_of_lower_rank(gradient: Gradient, side: Side, rank: int, method: RefreshMethod, bases: Bases) -> Bases:
    """The bases of a gradient of less than rank r, with zeros for the columns that stand for none of its directions.

    A layer that sees fewer rows than the rank, such as a classifier, has such a gradient. What it has along the other
    columns is rounding, which Adam would blow up to full size. Random bases are returned as they are: each of their
    columns has about 1/m of the gradient's energy, whatever its rank, and so none of them holds rounding alone.

    Args:
        gradient: neither zero nor infinite.
        side: which bases there are.
        rank: r.
        method: that has made them.
        bases: from `new_bases`, of which `full_rank` says 0.
    """
    made_by = METHODS[method]
    if not made_by.by_gradient:
        return bases
    # What the floor of a power iteration keeps of the old basis has tilted the directions that there are.
    for _ in range(made_by.repeats):
        bases = made_by.new_bases(gradient, side, rank, bases, 0, "reflections")
    floor = _noise_floor(gradient)
    return Bases(
        *(
            None if p is None or share is None else p * (share > floor.unsqueeze(-1)).unsqueeze(-2)
            for p, share in zip(bases, _shares(bases, gradient), strict=True)
        )
    )


def _shares(bases: Bases, gradient: Gradient) -> tuple[Tensor | None, Tensor | None]:
    """‖Gᵀp‖ / ‖G‖ of every column p of either basis, from 16 random columns of G."""

    def shares(basis: Tensor, gradient: Gradient) -> Tensor:
        sketch = scale_(times(gradient, gaussian(gradient.shape[-1], PROBES, gradient)))
        along: Tensor = torch.linalg.vector_norm(basis.mT @ sketch, dim=-1)
        return along.div_(norm_of_each(sketch).clamp_min(TINY).unsqueeze(-1))

    return (
        None if bases.left is None else shares(bases.left, gradient),
        None if bases.right is None else shares(bases.right, transposed(gradient)),
    )


def _noise_floor(gradient: Gradient) -> Tensor:
    """The share of a gradient's norm that rounding may put into one direction; 0-dimensional, or k numbers.

    Rounding the elements of G by up to ε/2 of their size puts up to about ε / √min(m, n) of its norm into the direction
    with most of it; twice that is taken. A gradient in float32 may have been computed in less, under autocast.
    """
    precise = 32 * torch.finfo(torch.float32).eps  # of the refresh itself; nobody needs less of a float64 gradient
    stack = gradient.shape[:-2]
    floor = torch.full(stack, precise, dtype=at_least_float32(gradient.dtype), device=gradient.device)
    if isinstance(gradient, (FactoredGradient, GroupedGradient, SummedGradient)):
        return floor
    spread = 2 * min(gradient.shape[-2:]) ** -0.5
    if gradient.dtype in (torch.bfloat16, torch.float16):
        return floor.add_(torch.finfo(gradient.dtype).eps * spread)
    sample = (gradient.part if isinstance(gradient, ShardedGradient) else gradient)[..., :_SAMPLE_ROWS, :]
    for dtype in (torch.bfloat16, torch.float16):
        rounded: Tensor = (sample.to(dtype).to(sample.dtype) == sample).flatten(-2).all(dim=-1)
        if isinstance(gradient, ShardedGradient):
            rounded = gradient.ranks.all(rounded)
        floor = torch.maximum(floor, rounded * (precise + torch.finfo(dtype).eps * spread))
    return floor


def align_signs(basis: Tensor, old: Tensor) -> Tensor:
    """`basis` with each column turned to the side of the old basis's column: their products are not negative.

    Singular vectors have no sign of their own, and rounding decides which comes out of a factorisation. The moments
    are kept over a refresh, and a column that flips would turn its momentum round.

    Args:
        basis: m × r, or a stack of such.
        old: of its shape.
    """
    flipped = (basis * old).sum(dim=-2, keepdim=True) < 0
    return torch.where(flipped, -basis, basis)


def overlap(new: Bases, old: Bases) -> Tensor:
    """How much of the old subspace is in the new one, 0 to 1: ‖P_newᵀP_old‖²_F / r, the smaller of the two sides'.

    Two random subspaces overlap by r / m. Columns of zeros count for nothing. 0-dimensional, or k numbers.
    """
    shares = [
        norm_of_each(p.mT @ q).square() / nonzero_columns(q).sum(dim=-1).clamp_min(1)
        for p, q in zip(new, old, strict=True)
        if p is not None and q is not None
    ]
    return torch.stack(shares).amin(dim=0)


def may_fail(method: RefreshMethod, device: torch.device) -> bool:
    """Whether `new_bases` may give bases that are not orthonormal, if not told how to orthonormalise."""
    return METHODS[method].orthonormalises and usual(device) == "products"


def figures_of(
    gradient: Gradient,
    low_rank: Tensor,
    new: Bases,
    old: Bases | None,
    computed: Bases | None = None,
    check: bool = False,
) -> Tensor:
    """What there is to know of a refresh: ‖G‖_F, the captured energy and the overlap (1 for a first refresh).

    Of a gradient in factors ‖G‖² is ‖R‖² + ‖G − back(R)‖², the latter estimated from products with `PROBES` Gaussian
    columns, without bias: there is no G to take the norm of.

    Args:
        gradient: G.
        low_rank: R, in the new bases; what this process has of it, of a sharded gradient.
        new: the new bases as they are kept.
        old: those before, if there were any.
        computed: the new bases before they were quantised, to be told what `full_rank` says of them, and their defect.
        check: whether to compute the defect; it is 0 otherwise.

    Returns:
        3 numbers, or 5, of at least float32 on the gradient's device; of a stack as many rows of k numbers.

    Source: the estimate is Hutchinson's (1989).
    """
    captured = norm_of_each(low_rank)
    if isinstance(gradient, ShardedGradient):
        captured, total = gradient.ranks.norms([captured, norm_of(gradient.part)]).unbind()
    elif isinstance(gradient, (FactoredGradient, GroupedGradient, SummedGradient)):
        probes = gaussian(gradient.shape[-1], PROBES, gradient) * (gradient.shape[-1] / PROBES) ** 0.5
        narrow = probes if new.right is None else new.right.mT.to(probes.dtype) @ probes
        back = low_rank.to(probes.dtype) @ narrow
        back = back if new.left is None else new.left.to(probes.dtype) @ back
        total = torch.hypot(captured, norm_of_each(times(gradient, probes) - back))
    else:
        total = norm_of_each(gradient)
    energy = (captured / total.clamp_min(TINY)).square().clamp_max(1.0)
    shared = torch.ones_like(total) if old is None else overlap(new, old)
    figures = [total, torch.where(total > 0, energy, 1.0), shared]
    if computed is not None:
        full = full_rank(computed, gradient, old, low_rank)
        defects = [defect(basis) for basis in computed if basis is not None and check]
        worst = torch.stack(defects).amax(dim=0) if defects else torch.zeros_like(full)
        figures += [full.to(total.dtype), worst.to(total.dtype)]
    return torch.stack(figures)
