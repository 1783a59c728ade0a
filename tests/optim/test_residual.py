"""Options that use the gradient itself: what becomes of a residual, and updates along the scaled gradient."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit, GaLoreConfig, make_optimizer
from hf_galore.lowrank.residual import limited
from hf_galore.recipes.suggestions import Choice
from tests.support.helpers import Counting, assert_a_bad_gradient_changes_nothing, target_of, tiny_llama
from tests.support.reference_residual import ReferenceResidual

OPTIONS: dict[str, dict[str, Any]] = {
    "fira": {"residual": "fira", "residual_scale": 0.7},
    "sign": {"residual": "sign", "residual_scale": 0.1},
    "muon": {"rule": "muon", "residual": "muon", "residual_scale": 0.3},
    # Of matrices as small as most are here it is in 32 bits.
    "muon, momentum": {"rule": "muon", "residual": "muon", "residual_scale": 0.3, "residual_bits": 8},
    "normuon": {"rule": "muon", "residual": "normuon", "residual_scale": 0.3},
    "normuon, momentum": {"rule": "muon", "residual": "normuon", "residual_scale": 0.3, "residual_bits": 8},
    "channel": {"scaling": "channel"},
    "tensor": {"scaling": "tensor"},
}


def gradients(shape: tuple[int, ...], count: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Gradients that grow and shrink, so that the limiter has something to do, with a few directions that are large."""
    generator = torch.Generator().manual_seed(1)
    *stack, m, n = shape
    left, right = (torch.randn(*stack, size, 3, generator=generator, dtype=torch.float64) for size in (m, n))
    found = []
    for step in range(count):
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        mixed = left @ torch.randn(*stack, 3, 3, generator=generator, dtype=torch.float64) @ right.mT
        found.append(((mixed + noise) * (1 + 3 * (step % 7 == 5)) * 1e-2).to(dtype))
    return found


def made(weight: nn.Parameter, option: str, **group: Any) -> GaLoreAdamW:
    group = {"rank": 4, "update_proj_gap": 8, "scale": 0.5, **OPTIONS[option], **group}
    if "scaling" not in group:
        group = {"refresh": "svd", "proj_bits": 16, **group}
    return GaLoreAdamW([{"params": [weight], **group}], lr=0.01, weight_decay=0.1)


def reference_of(option: str, start: npt.NDArray[np.float64]) -> ReferenceResidual:
    """What `made` makes, of one matrix."""
    keys = ("residual_scale", "residual_bits")
    options = {key: OPTIONS[option][key] for key in keys if key in OPTIONS[option]}
    return ReferenceResidual(
        start, option=option.split(",", maxsplit=1)[0], lr=0.01, scale=0.5, weight_decay=0.1, **options
    )


SIDES = [
    (option, side)
    for option, options in OPTIONS.items()
    for side in (("left", "right") if "scaling" in options else ("left", "right", "full"))
]


@pytest.mark.parametrize(("option", "side"), SIDES)
@pytest.mark.parametrize("stack", [None, 3])
def test_it_follows_its_paper_for_fifty_steps_with_refreshes(option: str, side: str, stack: int | None) -> None:
    shape = (12, 20) if stack is None else (stack, 12, 20)
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    optimizer = made(weight, option, proj_type=side)
    (target,) = optimizer.targets()
    start = weight.detach().numpy().copy().reshape(-1, 12, 20)
    references = [reference_of(option, one) for one in start]
    for gradient in gradients(shape, 50):
        weight.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(weight.grad, gradient)  # left as it is
        bases = [None if basis is None else basis.numpy().reshape(-1, *basis.shape[-2:]) for basis in target.bases()]
        for index, reference in enumerate(references):
            own = [None if basis is None else basis[index] for basis in bases]
            reference.step(gradient.numpy().reshape(-1, 12, 20)[index], *own)
    assert int(np.max(optimizer.state[weight]["refreshes"].numpy())) == 7
    for reference, found, one in zip(references, weight.detach().numpy().reshape(-1, 12, 20), start, strict=True):
        assert np.linalg.norm(found - reference.W) < 1e-6 * np.linalg.norm(reference.W - one)


def test_the_growth_of_a_term_is_limited() -> None:
    """By 1 % a step, from what it was after its own limit; a step without a term changes nothing of that."""
    factors, norms = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[3.0, 9.0, 8.0]])  # a norm of 10
    norm = (factors * norms).norm()
    for before, now in ((0.0, 10.0), (5.0, 5.05), (9.95, 10.0), (20.0, 10.0)):
        found, kept = limited(factors, norm, torch.tensor(before))
        assert kept.item() == pytest.approx(now)
        assert torch.allclose(found, factors * now / 10)
    found, kept = limited(torch.zeros(1, 3), torch.tensor(0.0), torch.tensor(5.0))
    assert (found.any().item(), kept.item()) == (False, 5.0)
    found, kept = limited(factors.expand(2, 1, 3), norm.expand(2), torch.tensor([5.0, 0.0]))
    assert kept.tolist() == pytest.approx([5.05, 10.0])


# ---- updates that are skipped


@pytest.fixture(params=["known to the host", "known to the device"])
def _who_knows(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "known to the device":
        monkeypatch.setattr("hf_galore.lowrank.nonfinite._look", lambda norm: None)
        monkeypatch.setattr("hf_galore.lowrank.nonfinite.host_knows", lambda tensor: False)


KINDS = {"float32": (torch.float32, False), "nearest": (torch.bfloat16, False), "random": (torch.bfloat16, True)}


@pytest.mark.usefixtures("_who_knows")
@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("shape", [(12, 20), (2, 12, 20)], ids=["matrix", "stack"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_skipped_update_leaves_all_as_it_is(option: str, shape: tuple[int, ...], kind: str) -> None:
    """Between refreshes and where one is due; also on a GPU, where only the device knows."""
    dtype, rounds = KINDS[kind]
    ends = []
    for bad in ((), (3, 8)):  # with a gap of 8 the ninth update refreshes
        weight = nn.Parameter(torch.ones(shape, dtype=dtype))
        seeds = {"stochastic_rounding": rounds, "rounding_seed": 1} if rounds else {}
        optimizer = made(weight, option, **seeds)
        for step, gradient in enumerate(gradients(shape, 12, dtype)):
            if step in bad:
                assert_a_bad_gradient_changes_nothing(optimizer, weight, gradient)
                optimizer.skipped_updates()  # as a log does: the device's count becomes the host's
            weight.grad = gradient
            optimizer.step()
        ends.append({"weight": weight.detach(), **optimizer.state[weight]})
    assert int(ends[1]["refreshes"].max()) == 2
    for key, value in ends[0].items():
        assert torch.equal(value, ends[1][key]), key


# ---- where R says nothing


def test_a_channel_beside_the_basis_does_not_blow_up() -> None:
    """R of it is rounding. Divided by that, S of it would be all that the limiter leaves of the others, too."""
    moved = []
    for beside in (0.0, 1e-2):
        weight = nn.Parameter(torch.zeros(16, 24))
        optimizer = made(weight, "fira", update_proj_gap=100, residual_scale=1.0)
        torch.manual_seed(0)
        turn = torch.linalg.qr(torch.randn(16, 16))[0]
        for step in range(3):
            gradient = torch.zeros(16, 24)
            gradient[:8, :23] = torch.randn(8, 23) * 1e-2
            gradient[8:, 23] = beside * (step > 0)
            before = weight.detach().clone()
            weight.grad = turn @ gradient
            optimizer.step()
        moved.append((weight - before).detach())
    assert 0 < moved[0][:, :23].norm() < 0.1
    assert torch.allclose(moved[0][:, :23], moved[1][:, :23], atol=1e-4)
    assert moved[1][:, 23].norm() < moved[1][:, :23].norm(dim=0).max() * 2


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("option", ["fira", "sign"])
def test_a_gradient_of_a_lower_rank_than_the_bases_has_no_residual(option: str, dtype: torch.dtype, bits: int) -> None:
    """Two tokens, and a rank of 16: what is left of G is the rounding of bases, which a sign would blow up."""
    torch.manual_seed(0)
    gradient = (torch.randn(48, 2) @ torch.randn(2, 64) * 1e-2).to(dtype)
    moved = []
    for options in ({}, {**OPTIONS[option], "residual_scale": 1.0}):
        weight = nn.Parameter(torch.zeros(48, 64, dtype=dtype))
        group = {"params": [weight], "rank": 16, "scale": 1.0, "proj_bits": bits, **options}
        optimizer = GaLoreAdamW([group], lr=1e-2, weight_decay=0)
        for _ in range(3):
            weight.grad = gradient.clone()
            optimizer.step()
        moved.append(weight.detach().double())
    assert (moved[1] - moved[0]).norm() < {16: 0.01, 8: 0.02, 4: 0.15}[bits] * moved[0].norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("option", ["fira", "sign", "muon", "normuon", "normuon, momentum", "channel", "tensor"])
def test_rows_that_never_have_a_gradient_stay(option: str, dtype: torch.dtype) -> None:
    """Bases have next to nothing of them, of which a sign would make a whole step."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(48, 64, dtype=dtype))
    optimizer = made(weight, option, **({} if "scaling" in OPTIONS[option] else {"refresh": "subspace"}))
    for _ in range(9):
        weight.grad = torch.randn(48, 64, dtype=dtype) * 1e-2
        weight.grad[::4] = 0
        optimizer.step()
    assert weight[::4].norm() < 1e-6 * weight[1::4].norm()
    assert weight[1::4].norm() > 0.01


# ---- momenta of all that there is


@pytest.mark.parametrize("option", ["muon", "normuon"])
@pytest.mark.parametrize("shape", [(12, 20), (20, 12), (3, 12, 20)], ids=str)
@pytest.mark.parametrize("side", ["left", "full"])
def test_with_a_momentum_of_the_residual_that_refreshes_carry_it_is_that_of_the_whole(
    option: str, shape: tuple[int, ...], side: str
) -> None:
    """Muon, or NorMuon, with no bases, whose momentum lies in two parts: in 32 bits, as of matrices this small."""
    weight = nn.Parameter(torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    options = {"residual_scale": 1.0, "residual_bits": 8, "moments": "rotate", "proj_type": side}
    optimizer = made(weight, option, **options)
    start = weight.detach().numpy().copy().reshape(-1, *shape[-2:])
    references = [ReferenceResidual(one, option=option, lr=0.01, scale=0.5, weight_decay=0.1) for one in start]
    for gradient in gradients(shape, 50):
        weight.grad = gradient
        optimizer.step()
        for reference, one in zip(references, gradient.numpy().reshape(start.shape), strict=True):
            reference.step(one, None, None)
    assert int(np.max(optimizer.state[weight]["refreshes"].numpy())) == 7
    for reference, found, one in zip(references, weight.detach().numpy().reshape(start.shape), start, strict=True):
        assert np.linalg.norm(found - reference.W) < 1e-9 * np.linalg.norm(reference.W - one)


# ---- rows and columns


@pytest.mark.parametrize("shape", [(40, 16), (16, 40)], ids=str)
def test_normuon_moves_each_line_of_the_longer_side_as_far(shape: tuple[int, int]) -> None:
    """Where Muon moves one with a small gradient less; both move the matrix as far."""
    wide = shape[0] < shape[1]
    sizes = torch.logspace(0, -1, 40, dtype=torch.float64)[:, None]
    moved = {}
    for option in ("muon", "normuon"):
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.float64))
        optimizer = made(weight, option, weight_decay=0.0)
        generator = torch.Generator().manual_seed(0)
        steps = []
        for _ in range(60):
            before = weight.detach().clone()
            gradient = torch.randn(40, 16, generator=generator, dtype=torch.float64) * sizes
            weight.grad = gradient.mT.clone() if wide else gradient
            optimizer.step()
            steps.append((weight.detach() - before).norm(dim=0 if wide else 1))
        moved[option] = torch.stack(steps[20:]).square().mean(0).sqrt()  # of each line
    assert moved["muon"].max() > 4 * moved["muon"].min()
    assert moved["normuon"].max() < 1.3 * moved["normuon"].min()
    assert moved["normuon"].norm() == pytest.approx(moved["muon"].norm().item(), rel=1e-6)


def test_normuon_keeps_a_number_for_each_line_of_the_longer_side() -> None:
    for shape, kept in (((12, 20), (1, 20)), ((20, 12), (20, 1)), ((12, 12), (12, 1)), ((3, 12, 20), (3, 1, 20))):
        weight = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
        optimizer = made(weight, "normuon")
        weight.grad = torch.ones(shape, dtype=torch.bfloat16)
        optimizer.step()
        numbers = optimizer.state[weight]["line_mean_squares"]
        assert (tuple(numbers.shape), numbers.dtype) == (kept, torch.float32)


def test_a_matrix_of_a_stack_without_a_gradient_keeps_its_numbers_and_stays() -> None:
    """As an expert without tokens: for however long, so that its numbers may not fade to nothing."""
    weight = nn.Parameter(torch.zeros(2, 20, 12))
    optimizer = made(weight, "normuon", weight_decay=0.0)
    for step, gradient in enumerate(gradients((2, 20, 12), 6, torch.float32)):
        weight.grad = gradient
        weight.grad[1] *= step < 3
        if step == 3:
            before, numbers = weight[1].detach().clone(), optimizer.state[weight]["line_mean_squares"][1].clone()
        optimizer.step()
    assert torch.equal(weight[1], before)
    assert torch.equal(optimizer.state[weight]["line_mean_squares"][1], numbers)
    assert (numbers > 0).all()


# ---- scaling


def test_scaling_takes_other_random_numbers_at_each_refresh_and_the_same_from_a_seed() -> None:
    weight = nn.Parameter(torch.zeros(3, 64, 96))
    optimizer = made(weight, "channel", rank=32, update_proj_gap=2)
    (target,) = optimizer.targets()
    seen = []
    for gradient in gradients((3, 64, 96), 5, torch.float32):
        weight.grad = gradient
        optimizer.step()
        basis, again = target.bases().left, target.bases().left
        assert basis is not None
        assert again is not None
        assert torch.equal(basis, again)
        seen.append(basis)
    assert seen[0].shape == (3, 64, 32)
    assert abs(seen[0].var().item() - 1 / 32) < 1e-3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    different = [seen[0][0], seen[0][1], seen[0][2], seen[2][0], seen[4][0]]
    for index, one in enumerate(different):
        for other in different[:index]:
            assert abs((one * other).sum() / one.square().sum()) < 0.1
    resumed = made(nn.Parameter(torch.zeros(3, 64, 96)), "channel", rank=32, update_proj_gap=2, basis_seed=1234)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    found = resumed.targets()[0].bases().left
    assert found is not None
    assert torch.equal(found, seen[4])


def test_a_matrix_of_a_stack_without_a_gradient_has_its_refresh_later() -> None:
    weight = nn.Parameter(torch.zeros(2, 12, 20))
    optimizer = made(weight, "channel")
    for step, gradient in enumerate(gradients((2, 12, 20), 3, torch.float32)):
        weight.grad = gradient
        weight.grad[1] *= step > 0
        optimizer.step()
    state = optimizer.state[weight]
    assert (state["refreshed_at"].tolist(), state["refreshes"].tolist()) == ([0, 1], [1, 1])


@pytest.mark.parametrize("option", ["channel", "tensor"])
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_scaling_at_rank_1_with_the_embedding_and_the_head(option: str, cls: type[Any], tied: bool) -> None:
    """APOLLO-Mini: each target moves along its gradient, a tied weight once."""
    model = tiny_llama(tie_word_embeddings=tied)
    optimizer = make_optimizer(
        model,
        ["attn", "mlp", "embed_tokens", "lm_head"],
        optim="galore_adamw" if cls is GaLoreAdamW else "galore_adamw_8bit",
        optim_args={"rank": 1, "scale": 4, "scaling": option},
        lr=1e-3,
    )
    assert len(optimizer.targets()) == 14 + (1 if tied else 2)
    data = Counting(4)
    batch = {key: torch.stack([data[row][key] for row in range(4)]) for key in data[0]}
    before = {name: param.detach().clone() for name, param in model.named_parameters()}
    losses = []
    for step in range(6):
        loss = model(**batch).loss
        losses.append(loss.item())
        loss.backward()
        gradient = {name: param.grad.clone() for name, param in model.named_parameters() if param.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        for name, param in model.named_parameters() if step == 0 else ():
            if optimizer.trained(param).projected:
                moved, along = (param - before[name]).detach(), gradient[name]
                left, right = target_of(optimizer, param).bases()
                low_rank = along @ right if left is None else left.mT @ along
                # The first step's direction is the sign of R.
                if option == "tensor":
                    scales = low_rank.sign().norm() / low_rank.norm()
                else:
                    # Of one column, or one row; of what the projection nearly misses there is a bound.
                    size = along.norm(dim=0 if right is None else 1, keepdim=True)
                    scales = torch.maximum(low_rank.abs(), size / 16).reciprocal()
                expected = -4e-3 * torch.where(along != 0, scales * along, 0.0)
                assert (moved - expected).norm() < 1e-2 * expected.norm(), name
    assert losses[-1] < losses[0] - 0.2


def test_suggestions_of_a_rank_keep_the_options() -> None:
    for options in ("residual=fira, residual_scale=0.5", "scaling=channel"):
        config = GaLoreConfig.from_optim_args(options)
        found = GaLoreConfig.from_optim_args(Choice(64, 2, True).overrides(config)[1])
        assert (found.rank, found.residual, found.scaling) == (64, config.residual, config.scaling)


def test_an_option_that_is_changed_to_nothing_there_is_is_refused() -> None:
    param = nn.Parameter(torch.ones(8, 12))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 2, "residual": "fira"}], lr=1e-2)
    optimizer.param_groups[0]["residual"] = "bogus"
    param.grad = torch.ones(8, 12)
    with pytest.raises(ValueError, match=r"residual has to be one of none, .*, normuon, but was given 'bogus'"):
        optimizer.step()
