"""The optimizers against the paper (in float64), torch, bitsandbytes, transformers and the published galore_torch."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import galore_torch
import pytest
import torch
from bitsandbytes.optim.adamw import AdamW8bit
from galore_torch.galore_projector import GaLoreProjector
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.optimization import Adafactor

from hf_galore import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.config import PROJ_TYPES, ProjType
from hf_galore.lowrank.refresh import align_signs
from hf_galore.rules import adam_8bit
from hf_galore.rules.adam_8bit import Codebooks
from tests.support.helpers import target_of
from tests.support.reference import ReferenceGaLore

pytestmark = pytest.mark.arithmetic

# The published choices, where the reference has no others.
PUBLISHED: dict[str, Any] = {"refresh": "svd", "stagger": False, "moments": "keep", "proj_bits": 16}
ADAM: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}


def gradients(
    shape: tuple[int, ...], steps: int, dtype: torch.dtype = torch.float32, falloff: float = 2.0
) -> Iterator[Tensor]:
    """A drifting signal and some noise; each singular value is about `falloff` times the next.

    Values well apart make bases well defined, up to the same signs in every precision.
    """
    generator = torch.Generator().manual_seed(sum(shape))

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, dtype=torch.float64)

    if len(shape) != 2:
        for _ in range(steps):
            yield normal(*shape).to(dtype)
        return
    rank = min(shape)
    left, right = normal(shape[0], rank), normal(rank, shape[1])
    strengths = falloff ** -torch.arange(rank, dtype=torch.float64)
    for _ in range(steps):
        left, right = left + 0.02 * normal(*left.shape), right + 0.02 * normal(*right.shape)
        yield (left * strengths @ right + 1e-3 * normal(*shape)).to(dtype)


def train(optimizer: torch.optim.Optimizer, params: list[nn.Parameter], steps: int) -> None:
    streams = [gradients(tuple(param.shape), steps, param.dtype) for param in params]
    for step_gradients in zip(*streams, strict=True):
        for param, gradient in zip(params, step_gradients, strict=True):
            param.grad = gradient
        optimizer.step()


def parameters(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(7)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def assert_same(ours: list[nn.Parameter], theirs: list[nn.Parameter], *, atol: float, rtol: float) -> None:
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=atol, rtol=rtol)


# ---- nothing projected


def test_without_projection_it_is_torch_adamw() -> None:
    shapes = ((12, 7), (7,), (3, 4, 5))
    ours, theirs = parameters(*shapes), parameters(*shapes)

    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:1]}, {"params": params[1:], "weight_decay": 0.0, "lr": 3e-3}]

    train(GaLoreAdamW(groups(ours), **ADAM), ours, 30)
    train(torch.optim.AdamW(groups(theirs), **ADAM), theirs, 30)
    assert_same(ours, theirs, atol=1e-6, rtol=1e-6)


def test_its_defaults_are_those_of_torch_adamw() -> None:
    ours, theirs = parameters((4, 3)), parameters((4, 3))
    train(GaLoreAdamW(ours), ours, 3)
    train(torch.optim.AdamW(theirs), theirs, 3)
    assert_same(ours, theirs, atol=1e-6, rtol=1e-6)


def test_8bit_without_projection_is_bitsandbytes() -> None:
    """Bit for bit: an 8-bit tensor, one under 4,096 elements, and one that is kept in 32 bits."""
    shapes = ((64, 80), (7,), (70, 80))
    ours, theirs = parameters(*shapes), parameters(*shapes)
    train(GaLoreAdamW8bit([{"params": ours[:2]}, {"params": ours[2:], "optim_bits": 32}], **ADAM), ours, 20)
    reference = AdamW8bit(theirs, **ADAM)
    reference.mng.override_config(theirs[2], "optim_bits", 32)
    train(reference, theirs, 20)
    assert_same(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize("beta1", [None, 0.9])
def test_adafactor_without_projection_is_that_of_transformers(beta1: float | None) -> None:
    shapes = ((12, 7), (7,), (3, 4, 5))
    ours, theirs = parameters(*shapes), parameters(*shapes)
    train(GaLoreAdafactor(ours, lr=1e-2, beta1=beta1, weight_decay=0.1), ours, 20)
    options: dict[str, Any] = {"relative_step": False, "scale_parameter": False}
    train(Adafactor(theirs, lr=1e-2, beta1=beta1, weight_decay=0.1, **options), theirs, 20)
    assert_same(ours, theirs, atol=1e-6, rtol=1e-6)


# ---- projected


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [
        (torch.float64, 1e-10),
        # Adam divides each element by its own size, so that rounding of the smallest ones shows at full size:
        # 50 float32 steps of lr · scale = 5e-3 stay within a twentieth of one step.
        (torch.float32, 2.5e-4),
    ],
)
def test_svd_refresh_follows_the_paper(
    proj_type: ProjType, shape: tuple[int, int], dtype: torch.dtype, tolerance: float
) -> None:
    """50 steps, refreshes at steps 1, 21 and 41."""
    # With both sides projected R is diagonal at a refresh, but for rounding, which Adam divides by its own size: it
    # takes a larger ε than the rounding for two computations to agree.
    adam = {**ADAM, "eps": 1e-3} if proj_type == "full" else ADAM
    (param,) = parameters(shape, dtype=dtype)
    reference = ReferenceGaLore(param.detach().numpy(), rank=3, gap=20, scale=0.5, proj_type=proj_type, **adam)
    group = {"params": [param], "rank": 3, "update_proj_gap": 20, "scale": 0.5, "proj_type": proj_type, **PUBLISHED}
    optimizer = GaLoreAdamW([group], **adam)
    for gradient in gradients(shape, 50, dtype):
        param.grad = gradient
        optimizer.step()
        reference.step(gradient.double().numpy())
    torch.testing.assert_close(param.double(), torch.from_numpy(reference.W), atol=tolerance, rtol=0)


def keep_signs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have galore_torch turn its singular vectors to the side of the old ones, as hf_galore does."""
    original = GaLoreProjector.get_orthogonal_matrix

    def aligned(self: Any, weights: Tensor, rank: int, type: str) -> Any:
        new, old = original(self, weights, rank, type), self.ortho_matrix
        if old is None:
            return new
        if type == "full":
            return [align_signs(new[0], old[0]), align_signs(new[1].mT, old[1].mT).mT]
        return align_signs(new, old) if type == "left" else align_signs(new.mT, old.mT).mT

    monkeypatch.setattr(GaLoreProjector, "get_orthogonal_matrix", aligned)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)])
def test_it_follows_galore_torch_but_for_three_definitions(
    proj_type: ProjType, shape: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """galore_torch 1.0 decays after the update, adds ε before the bias correction, and takes singular vectors with the
    signs that LAPACK gives them; all else is the same."""
    keep_signs(monkeypatch)
    if proj_type == "reverse_std" and shape[0] == shape[1]:
        pytest.skip("galore_torch guesses the side from the low-rank gradient's shape")
    lr, betas, eps, weight_decay = ADAM["lr"], (0.9, 0.95), 1e-3, 0.1
    ours, theirs = parameters(shape), parameters(shape)
    options = {"rank": 3, "update_proj_gap": 20, "scale": 0.5, "proj_type": proj_type}
    mine = GaLoreAdamW([{"params": ours, **options, **PUBLISHED}], lr=lr, betas=betas, weight_decay=0.0)
    other = galore_torch.GaLoreAdamW(
        [{"params": theirs, **options}],
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=weight_decay,
        no_deprecation_warning=True,
    )
    for step, gradient in enumerate(gradients(shape, 50), start=1):
        ours[0].grad, theirs[0].grad = gradient, gradient.clone()
        mine.param_groups[0]["eps"] = eps / math.sqrt(1 - betas[1] ** step)
        mine.step()
        ours[0].data.mul_(1 - lr * weight_decay)
        other.step()
    assert_same(ours, theirs, atol=1e-5, rtol=0)


def test_projected_adafactor_follows_galore_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    keep_signs(monkeypatch)
    ours, theirs = parameters((12, 7)), parameters((12, 7))
    options = {"rank": 3, "update_proj_gap": 20, "scale": 0.5, "proj_type": "std"}
    train(GaLoreAdafactor([{"params": ours, **options, **PUBLISHED}], lr=1e-2, weight_decay=0.1), ours, 50)
    published = galore_torch.GaLoreAdafactor(
        [{"params": theirs, **options}], lr=1e-2, weight_decay=0.1, relative_step=False, scale_parameter=False
    )
    train(published, theirs, 50)
    assert_same(ours, theirs, atol=1e-5, rtol=0)


def test_projected_8bit_stays_within_quantisation_error_of_32bit() -> None:
    shape, lr = (96, 80), 1e-2  # R is 96 × 60 = 5,760 elements: above bitsandbytes' 4,096
    options = {"rank": 60, "update_proj_gap": 20, "scale": 0.5, **PUBLISHED}
    start, small, large = (parameters(shape)[0] for _ in range(3))
    eight = GaLoreAdamW8bit([{"params": [small], **options}], lr=lr, weight_decay=0.0)
    thirty_two = GaLoreAdamW([{"params": [large], **options}], lr=lr, weight_decay=0.0)
    assert eight.state[small]["exp_avg"].dtype == torch.uint8
    for gradient in gradients(shape, 50, falloff=1.0):
        small.grad = large.grad = gradient
        eight.step()
        thirty_two.step()
    # Dynamic 8-bit keeps two to three digits of a moment, and Adam's direction is a quotient of two.
    assert (small - large).norm() / (large - start).norm() < 0.05


def test_projected_8bit_is_bitsandbytes_on_the_low_rank_gradient() -> None:
    """Bit for bit: bitsandbytes trains a stand-in of R's shape, whose moves are projected back by hand."""
    shape, lr, scale = (96, 80), 1e-2, 0.5
    (param,) = parameters(shape)
    expected = param.detach().clone()
    stand_in = nn.Parameter(torch.zeros(96, 60))
    optimizer = GaLoreAdamW8bit([{"params": [param], "rank": 60, "scale": scale, **PUBLISHED}], lr=lr, weight_decay=0.0)
    kernel = AdamW8bit([stand_in], lr=1.0, weight_decay=0.0)
    for gradient in gradients(shape, 10):
        param.grad = gradient
        optimizer.step()
        basis = optimizer.state[param]["basis_right"]
        stand_in.data.zero_()
        stand_in.grad = gradient @ basis
        kernel.step()
        expected.addmm_(stand_in.data, basis.mT, alpha=lr * scale)
        torch.testing.assert_close(param.detach(), expected, atol=0, rtol=0)


def test_small_projected_moments_stay_in_32_bits() -> None:
    param = parameters((96, 80))
    optimizer = GaLoreAdamW8bit([{"params": param, "rank": 42}])  # R is 96 × 42 = 4,032 elements
    assert optimizer.state[param[0]]["exp_avg"].dtype == torch.float32


# ---- what no step does


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor])
def test_a_step_leaves_gradient_and_storage_alone(cls: type[Any]) -> None:
    """The incumbent's 8-bit step replaces the weight's storage and leaves a low-rank gradient behind."""
    params = parameters((96, 80), (80,))
    optimizer = cls([{"params": params[:1], "rank": 60}, {"params": params[1:]}])
    pointers = [param.data_ptr() for param in params]
    sent = [torch.randn_like(param) for param in params]
    for param, gradient in zip(params, sent, strict=True):
        param.grad = gradient.clone()
    optimizer.step()
    assert [param.data_ptr() for param in params] == pointers
    for param, gradient in zip(params, sent, strict=True):
        torch.testing.assert_close(param.grad, gradient, atol=0, rtol=0)


class Recorder(TorchDispatchMode):
    """Notes every operation, with the devices of the tensors that went in and the largest tensor that came out."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[tuple[str, set[str], set[str]]] = []
        self.made: list[int] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {arg.device.type for arg in args if isinstance(arg, Tensor)}
        outputs = {out.device.type} if isinstance(out, Tensor) else set()
        self.ops.append((str(func), inputs, outputs))
        is_new = isinstance(out, Tensor) and not any(out is arg for arg in args) and "transpose" not in str(func)
        self.made.append(out.numel() if is_new else 0)
        return out


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_neither_synchronises_nor_clones_a_weight(
    cls: type[Any], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the meta device, which stands for a GPU: reading a value or mixing devices there raises by itself."""

    def meta_codebooks(device: torch.device) -> Codebooks:
        return Codebooks(torch.zeros(256, device=device), torch.zeros(256, device=device))

    monkeypatch.setattr(adam_8bit, "codebooks", meta_codebooks)
    target, vector = (nn.Parameter(torch.zeros(shape, device="meta", dtype=dtype)) for shape in ((512, 256), (256,)))
    optimizer = cls([{"params": [target], "rank": 32}, {"params": [vector]}])
    for key in ("step", "refreshed_at"):  # not a refresh, which waits for the device once
        optimizer.state[target][key].fill_(1)
    target_of(optimizer, target).bases()  # the table of 8-bit codes goes to a device once
    for param in (target, vector):
        param.grad = torch.zeros_like(param)
    with Recorder() as recorder:
        optimizer.step()
    on_device = [op for op in recorder.ops if "meta" in op[1]]
    assert on_device
    assert not [op for op in on_device if op[2] and op[2] != {"meta"}]
    assert not [
        op
        for op in recorder.ops
        if any(name in op[0] for name in ("linalg_svd", "linalg_qr", "linalg_eigh", "linalg_cholesky"))
    ]
    assert not [op for op in recorder.ops if "_to_copy" in op[0] and op[1] != op[2]]
    assert max(recorder.made) < target.numel()


# ---- groups


def test_param_options_split_a_group_and_keep_what_it_says() -> None:
    params = parameters((8, 6), (6,), (6, 8))
    options: dict[Tensor, dict[str, Any]] = {params[0]: {"rank": 2, "scale": 0.5}, params[2]: {"rank": 2, "scale": 0.5}}
    optimizer = GaLoreAdamW([{"params": params, "weight_decay": 0.3}], param_options=options)
    assert [[id(p) for p in group["params"]] for group in optimizer.param_groups] == [
        [id(params[0]), id(params[2])],
        [id(params[1])],
    ]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.3]
    assert [group.get("rank") for group in optimizer.param_groups] == [2, None]


def test_an_empty_group_falls_away_and_no_parameters_are_refused() -> None:
    net = nn.Linear(6, 8)
    optimizer = GaLoreAdamW([{"params": net.parameters()}, {"params": [], "weight_decay": 0.0}], module=net)
    assert [group["param_names"] for group in optimizer.param_groups] == [["weight", "bias"]]
    with pytest.raises(ValueError, match="no parameters"):
        GaLoreAdamW([])
    with pytest.raises(ValueError, match="no parameters"):
        GaLoreAdamW([{"params": []}])


def test_published_defaults_complete_a_group_with_a_rank() -> None:
    optimizer = GaLoreAdamW([{"params": parameters((8, 6)), "rank": 2}])
    group = optimizer.param_groups[0]
    assert (group["update_proj_gap"], group["scale"], group["proj_type"]) == (200, 0.25, "std")


@pytest.mark.parametrize(
    ("group", "message"),
    [
        ({"rank": 0}, "rank has to be an integer of at least 1, but was given 0"),
        ({"rank": 2, "scale": math.nan}, "scale has to be a finite number above 0, or auto, or .*, but was given nan"),
        ({"rank": 2, "proj_type": "foo"}, "proj_type has to be one of std, reverse_std"),
        ({"scale": 1.0}, "sets scale but no rank"),
        ({"lr": -1.0}, "lr has to be at least 0"),
        ({"betas": (0.9, 1.0)}, "betas have to be"),
    ],
)
def test_a_bad_group_is_refused(group: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GaLoreAdamW([{"params": parameters((8, 6)), **group}])


def test_only_matrices_can_be_projected() -> None:
    with pytest.raises(ValueError, match=r"Only matrices, and stacks of them,.*\(5,\).*group without a rank"):
        GaLoreAdamW([{"params": parameters((5,)), "rank": 2}])


def test_a_matrix_no_larger_than_the_rank_trains_full_rank() -> None:
    ours, theirs = parameters((8, 6)), parameters((8, 6))
    train(GaLoreAdamW([{"params": ours, "rank": 6}], **ADAM), ours, 5)
    train(torch.optim.AdamW(theirs, **ADAM), theirs, 5)
    assert_same(ours, theirs, atol=1e-6, rtol=1e-6)


def test_a_frozen_parameter_costs_no_state_until_it_is_thawed() -> None:
    params = parameters((8, 6), (8, 6))
    params[0].requires_grad_(False)
    optimizer = GaLoreAdamW([{"params": params, "rank": 2}])
    assert params[0] not in optimizer.state
    before = params[0].detach().clone()
    params[1].grad = torch.ones(8, 6)
    optimizer.step()
    torch.testing.assert_close(params[0].detach(), before, atol=0, rtol=0)
    params[0].requires_grad_(True)
    params[0].grad = torch.ones(8, 6)
    optimizer.step()
    assert optimizer.state[params[0]]["step"] == 1
    assert not torch.equal(params[0], before)


def test_a_sparse_gradient_is_refused() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = GaLoreAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError, match="sparse=False"):
        optimizer.step()


def test_a_closure_is_called_with_gradients_on() -> None:
    (param,) = parameters((8, 6))
    optimizer = GaLoreAdamW([{"params": [param], "rank": 2}], lr=1e-2)

    def closure() -> float:
        optimizer.zero_grad()
        loss = param.square().sum()
        loss.backward()
        return loss.item()

    first = optimizer.step(closure)
    second = optimizer.step(closure)
    assert second < first


@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor])
def test_a_copy_goes_on_by_itself(cls: type[Any]) -> None:
    params = parameters((96, 80), (80,))
    optimizer = cls([{"params": params[:1], "rank": 60}, {"params": params[1:]}])
    train(optimizer, params, 3)
    twin = copy.deepcopy(optimizer)
    twins = [param for group in twin.param_groups for param in group["params"]]
    train(optimizer, params, 3)
    train(twin, twins, 3)
    assert_same(params, twins, atol=0, rtol=0)


def test_moments_of_low_precision_weights_are_float32() -> None:
    params = parameters((8, 6), (6,), dtype=torch.bfloat16)
    optimizer = GaLoreAdamW([{"params": params[:1], "rank": 2, "proj_bits": 16}, {"params": params[1:]}])
    dtypes = {key: value.dtype for param in params for key, value in optimizer.state[param].items()}
    assert dtypes["exp_avg"] == dtypes["exp_avg_sq"] == torch.float32
    assert dtypes["basis_right"] == torch.bfloat16
