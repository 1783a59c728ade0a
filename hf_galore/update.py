"""Adam and Adafactor on one tensor, low-rank or full-rank: pure functions that update the moments in place.

Each returns a direction N with the shape of the gradient; what happens to it (projection back, scale, learning
rate, decay) is the optimizer's business. `step` counts from 1 and includes the present one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

# bitsandbytes' kernels quantise moments in blocks of this many elements; it is not configurable there.
BLOCKWISE_SIZE = 256


def adam_direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """N = m̂ / (√v̂ + ε), as `torch.optim.AdamW` computes it.

    Args:
        gradient: G or R, any floating-point dtype.
        exp_avg: first moment m, same shape, float32 (float64 for float64 weights); updated in place.
        exp_avg_sq: second moment v, likewise.

    Source: Adam (Kingma and Ba, 2015, arXiv:1412.6980), algorithm 1; AdamW (arXiv:1711.05101), algorithm 2.
    """
    beta1, beta2 = betas
    gradient = gradient.to(exp_avg.dtype)
    exp_avg.lerp_(gradient, 1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = exp_avg_sq.sqrt().div_(math.sqrt(1 - beta2**step)).add_(eps)
    return torch.div(exp_avg, denominator, out=denominator).div_(1 - beta1**step)


class QuantizedMoments(NamedTuple):
    """Both moments of Adam in blockwise dynamic 8-bit: codes of the gradient's shape, one scale a block."""

    exp_avg: Tensor  # uint8
    exp_avg_absmax: Tensor  # float32, one for each 256 elements
    exp_avg_sq: Tensor
    exp_avg_sq_absmax: Tensor


class Codebooks(NamedTuple):
    """bitsandbytes' dynamic 8-bit codebooks: 256 float32 values each, ascending."""

    signed: Tensor
    unsigned: Tensor


def dynamic_codebooks(device: torch.device) -> Codebooks:
    """The codebooks of `exp_avg` (signed) and `exp_avg_sq` (unsigned) on `device`.

    Source: 8-bit Optimizers via Block-wise Quantization (Dettmers et al., 2022, arXiv:2110.02861), section 1.3.
    """
    from bitsandbytes.functional import create_dynamic_map

    return Codebooks(create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device))


def blockwise_absmax_shape(numel: int) -> tuple[int]:
    """The shape of the per-block scales of an 8-bit moment with `numel` elements."""
    return (math.ceil(numel / BLOCKWISE_SIZE),)


def adam_8bit_(
    weight: Tensor,
    gradient: Tensor,
    moments: QuantizedMoments,
    codebooks: Codebooks,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
    lr: float,
    weight_decay: float,
) -> None:
    """W ← (1 − ηλ)W − ηN in place, with moments in 8 bits, by bitsandbytes' kernel for the weight's device.

    Args:
        weight: contiguous, float32, bfloat16 or float16.
        gradient: same shape; made contiguous and cast to the weight's dtype, as the kernels ask.

    Source: arXiv:2110.02861.
    """
    from bitsandbytes.functional import optimizer_update_8bit_blockwise

    optimizer_update_8bit_blockwise(
        optimizer_name="adam",
        g=gradient.to(weight.dtype).contiguous(),
        p=weight,
        state1=moments.exp_avg,
        state2=moments.exp_avg_sq,
        beta1=betas[0],
        beta2=betas[1],
        beta3=0.0,
        alpha=0.0,
        eps=eps,
        step=step,
        lr=lr,
        qmap1=codebooks.signed,
        qmap2=codebooks.unsigned,
        absmax1=moments.exp_avg_absmax,
        absmax2=moments.exp_avg_sq_absmax,
        weight_decay=weight_decay,
        # By keyword: positions moved between releases, and a stray value here freezes parameters.
        gnorm_scale=1.0,
        skip_zeros=False,
    )


def adam_32bit_(
    weight: Tensor,
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
    lr: float,
    weight_decay: float,
) -> None:
    """W ← (1 − ηλ)W − ηN in place, with float32 moments, by bitsandbytes' kernel.

    What its 8-bit optimizer does to the parameters whose moments stay in 32 bits; on a GPU one fused kernel with
    no full-rank temporary.

    Args:
        weight: contiguous, float32, bfloat16 or float16.
        gradient: same shape; made contiguous and cast to the weight's dtype, as the kernels ask.
        exp_avg: float32, same shape; updated in place, as is `exp_avg_sq`.
    """
    from bitsandbytes.functional import optimizer_update_32bit

    optimizer_update_32bit(
        optimizer_name="adam",
        g=gradient.to(weight.dtype).contiguous(),
        p=weight,
        state1=exp_avg,
        beta1=betas[0],
        eps=eps,
        step=step,
        lr=lr,
        state2=exp_avg_sq,
        beta2=betas[1],
        weight_decay=weight_decay,
        gnorm_scale=1.0,
        unorm_vec=None,
        max_unorm=0.0,
        skip_zeros=False,
    )


def adam_8bit_direction(
    gradient: Tensor,
    moments: QuantizedMoments,
    codebooks: Codebooks,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """N for a low-rank gradient with 8-bit moments, in float32.

    The kernel only knows how to move a weight. A zero of the gradient's size, moved by −η·N with η = −1, is N; that
    buffer is low-rank, so the weight itself is never cloned.
    """
    direction = torch.zeros(gradient.shape, dtype=torch.float32, device=gradient.device)
    adam_8bit_(direction, gradient, moments, codebooks, step=step, betas=betas, eps=eps, lr=-1.0, weight_decay=0.0)
    return direction


def adafactor_direction(
    gradient: Tensor,
    *,
    exp_avg_sq: Tensor | None,
    exp_avg_sq_row: Tensor | None,
    exp_avg_sq_col: Tensor | None,
    step: int,
    decay_rate: float,
    eps: float,
    clip_threshold: float,
) -> Tensor:
    """The clipped update U of Adafactor, before the learning rate, as `transformers.Adafactor` computes it.

    Args:
        gradient: G or R.
        exp_avg_sq: second moment of a vector or scalar, updated in place; `None` where it is factored.
        exp_avg_sq_row: for a gradient (..., m, n), the second moment's row means (..., m); updated in place.
        exp_avg_sq_col: the column means (..., n).
        decay_rate: exponent of β₂ₜ = 1 − t^decay_rate.
        eps: added to the squared gradient.
        clip_threshold: the largest root mean square of U.

    Source: Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235), algorithm 4.
    """
    moment = exp_avg_sq if exp_avg_sq is not None else exp_avg_sq_row
    assert moment is not None
    gradient = gradient.to(moment.dtype)
    beta2 = 1.0 - step**decay_rate
    squared = gradient.square().add_(eps)
    if exp_avg_sq is not None:
        exp_avg_sq.lerp_(squared, 1 - beta2)
        direction = exp_avg_sq.rsqrt().mul_(gradient)
    else:
        assert exp_avg_sq_row is not None
        assert exp_avg_sq_col is not None
        exp_avg_sq_row.lerp_(squared.mean(dim=-1), 1 - beta2)
        exp_avg_sq_col.lerp_(squared.mean(dim=-2), 1 - beta2)
        row = (exp_avg_sq_row / exp_avg_sq_row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        column = exp_avg_sq_col.rsqrt().unsqueeze(-2)
        direction = (row * column).mul_(gradient)
    rms = direction.norm(2) / math.sqrt(direction.numel())
    return direction.div_((rms / clip_threshold).clamp_(min=1.0))
