"""Random bases: that they are uniform and fixed by a seed, what they capture, and what they make of few rows."""

from __future__ import annotations

import itertools
import statistics

import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreAdamW
from hf_galore.lowrank.products import FactoredGradient, Gradient
from hf_galore.lowrank.projection import Bases, Side, basis_shapes, project
from hf_galore.lowrank.refresh import bases_of_lower_rank, figures_of, full_rank, new_bases, overlap
from hf_galore.lowrank.rounding import generator_for
from hf_galore.lowrank.seeds import basis_seed, mixed_seed
from tests.support.helpers import assert_identical

SIDES: list[Side] = ["left", "right", "full"]
# A mean is off by more than this many standard errors once in two million times; the seeds are fixed besides.
ERRORS = 5.0


def gaussian(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_bases(shape: tuple[int, int], side: Side, rank: int, seed: int, old: Bases | None = None) -> Bases:
    return new_bases(torch.zeros(shape), side, rank, "random", old, seed=seed)


def there(bases: Bases) -> list[Tensor]:
    return [basis for basis in bases if basis is not None]


# ---- the distribution


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("shape", "rank"), [((60, 50), 10), ((50, 60), 49), ((1024, 768), 256), ((9, 9), 1)])
def test_bases_are_orthonormal_whatever_the_gradient_is(
    shape: tuple[int, int], rank: int, side: Side, dtype: torch.dtype
) -> None:
    for gradient in (gaussian(*shape).to(dtype), torch.full(shape, float("nan"), dtype=dtype)):
        bases = new_bases(gradient, side, rank, "random", None, seed=7)
        shapes = tuple(None if basis is None else tuple(basis.shape) for basis in bases)
        assert shapes == basis_shapes(shape, side, rank)
        for basis in there(bases):
            assert basis.dtype == torch.promote_types(dtype, torch.float32)
            torch.testing.assert_close(basis.mT @ basis, torch.eye(rank, dtype=basis.dtype), atol=1e-5, rtol=0)


@pytest.mark.parametrize("side", SIDES)
def test_bases_are_uniform(side: Side) -> None:
    """Uniform on the Stiefel manifold: of P the mean is 0 and of PPᵀ r/k · I, for a basis of k rows.

    Elements of P have the variance 1/k; of PPᵀ those on the diagonal follow Beta(r/2, (k − r)/2). A QR whose signs are
    left as they come is far off: its first element is negative nine times in ten.
    """
    shape, rank, samples = (12, 8), 3, 3000
    found = [there(random_bases(shape, side, rank, seed)) for seed in range(samples)]
    for each in zip(*found, strict=True):
        bases = torch.stack(each).double()
        rows = bases.shape[1]
        part = rank / rows
        assert bases.mean(0).abs().max() < ERRORS * (1 / rows / samples) ** 0.5
        assert (bases.square().mean(0) - 1 / rows).abs().max() < ERRORS * (2 / rows**2 / samples) ** 0.5
        projectors = bases @ bases.mT
        deviation = (2 * part * (1 - part) / (rows + 2)) ** 0.5
        mean = projectors.mean(0)
        assert (mean - part * torch.eye(rows)).abs().max() < ERRORS * deviation / samples**0.5
        assert projectors.diagonal(dim1=1, dim2=2).std(0).mean().item() == pytest.approx(deviation, rel=0.05)


@pytest.mark.parametrize("side", SIDES)
def test_nothing_of_the_old_basis_or_of_the_gradient_is_in_the_new_one(side: Side) -> None:
    shape, rank = (60, 50), 10
    old = random_bases(shape, side, rank, 1)
    new = random_bases(shape, side, rank, 2, old)
    assert_identical(tuple(new), tuple(random_bases(shape, side, rank, 2)))
    assert_identical(tuple(new), tuple(new_bases(gaussian(*shape).float(), side, rank, "random", old, seed=2)))
    assert overlap(new, old).item() == pytest.approx(rank / shape[side == "right"], abs=0.1)


def test_the_two_sides_are_independent() -> None:
    left, right = random_bases((60, 60), "full", 10, 3)
    assert left is not None
    assert right is not None
    assert overlap(Bases(left, None), Bases(right, None)).item() == pytest.approx(10 / 60, abs=0.1)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("form", ["product", "factors"])
def test_they_capture_the_energy_that_chance_gives_them(form: str, power: float, side: Side) -> None:
    """r/m of it, r/n, or (r/m)(r/n): exactly so on average, and nearly so each time where the spectrum is flat."""
    (m, n), rank, samples = (64, 48), 12, 200
    u, v = (torch.linalg.qr(gaussian(size, 48, seed=size))[0] for size in (m, n))
    values = torch.arange(1, 49, dtype=torch.float64) ** -power
    delta, inputs = (u * values).mT.float(), v.mT.float()
    gradient: Gradient = FactoredGradient(delta, inputs) if form == "factors" else delta.mT @ inputs
    found = []
    for seed in range(samples):
        bases = new_bases(gradient, side, rank, "random", None, seed=seed)
        low_rank = project(gradient, bases)
        if form == "product":
            found.append(figures_of(gradient, low_rank, bases, None)[1].item())
        else:
            found.append((low_rank.norm() / values.norm()).square().item())
    expected = {"left": rank / m, "right": rank / n, "full": rank / m * rank / n}[side]
    error = statistics.stdev(found) / samples**0.5
    assert error < 0.05 * expected  # so that the next line says something
    assert abs(statistics.fmean(found) - expected) < ERRORS * error + 1e-6  # and the rounding of float32
    if power == 0:
        assert max(abs(energy - expected) for energy in found) < 0.5 * expected


# ---- seeds


def test_every_target_and_refresh_of_every_run_has_bases_of_its_own() -> None:
    numbers = list(itertools.product([0, 1, 42, 2**63, -1], range(30), range(30)))
    bases = {basis_seed(*each) for each in numbers}
    updates = {mixed_seed(*each) for each in numbers}
    assert len(bases) == len(updates) == len(numbers)
    assert not bases & updates  # no basis from the numbers that round an update
    assert all(0 <= seed < 2**63 for seed in bases)
    seeds = [basis_seed(*each) for each in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    for a, b in itertools.combinations(seeds, 2):
        shared = overlap(random_bases((200, 50), "left", 10, a), random_bases((200, 50), "left", 10, b))
        assert shared.item() == pytest.approx(10 / 200, abs=0.05)


def test_seeds_stay_what_they_are() -> None:
    """A run that another version of the library resumes goes on with the bases that it would have had."""
    assert mixed_seed(42, 3, 7) == generator_for(torch.device("cpu"), 42, 3, 7).initial_seed()
    assert (mixed_seed(42, 3, 7), basis_seed(42, 3, 7)) == (7750566056401900720, 1564215618392908121)


# ---- gradients of less than rank r


def flipped(gradient: Tensor, exact: Tensor, bases: Bases) -> float:
    """The part of R's elements with the wrong sign, which is Adam's first step, where a gradient has been rounded."""
    right = project(exact, Bases(*(None if basis is None else basis.double() for basis in bases)))
    return float((project(gradient, bases).double().sign() != right.sign()).double().mean())


def least_share(bases: Bases, gradient: Tensor) -> float:
    """The least ‖Gᵀp‖ / ‖G‖ of their columns p."""
    sides = ((bases.left, gradient), (bases.right, gradient.mT))
    shares = [matrix.mT @ basis.double() for basis, matrix in sides if basis is not None]
    return min(float((share.norm(dim=0) / gradient.norm()).min()) for share in shares)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-4), (torch.bfloat16, 0.02)], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rows", [1, 8])
def test_few_rows_leave_no_column_with_rounding_alone(rows: int, side: Side, dtype: torch.dtype, bound: float) -> None:
    """A random column has 1/m of the energy of a gradient of any rank; an svd's beyond the rank have rounding."""
    shape, rank = (96, 80), 32
    delta, inputs = (gaussian(rows, size, seed=size).to(dtype) for size in shape)
    gradient, exact = delta.mT @ inputs, delta.double().mT @ inputs.double()
    bases = new_bases(gradient, side, rank, "random", None, seed=5)
    assert bases_of_lower_rank(gradient, side, rank, "random", bases) is bases
    # Of one row, one column in a thousand has less by chance; beyond the rank, those of an svd have.
    assert least_share(bases, exact) > 1e-3 / shape[0] ** 0.5
    assert least_share(new_bases(gradient, side, rank, "svd", None), exact) < 1e-3 / shape[0] ** 0.5
    assert flipped(gradient, exact, bases) < bound


@pytest.mark.parametrize("side", SIDES)
def test_few_rows_are_no_lower_rank_from_factors_either(side: Side) -> None:
    gradient = FactoredGradient(gaussian(8, 96, seed=1).float(), gaussian(8, 80, seed=2).float())
    bases = new_bases(gradient, side, 32, "random", None, seed=3)
    assert full_rank(bases, gradient, None) == 0
    assert bases_of_lower_rank(gradient, side, 32, "random", bases) is bases


# ---- the option


def test_random_bases_are_refused_with_lazy_refreshes() -> None:
    weight = nn.Parameter(torch.zeros(12, 10))
    group = {"params": [weight], "rank": 4, "refresh": "random"}
    GaLoreAdamW([group])
    with pytest.raises(ValueError, match=r"lazy_refresh=true .* refresh=random.*svd, randomized, subspace\.$"):
        GaLoreAdamW([{**group, "lazy_refresh": True}])
