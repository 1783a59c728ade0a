"""Adam and Adafactor on one tensor, low-rank or full-rank: pure functions that update the moments in place.

Each returns a direction N with the shape of the gradient; what happens to it (projection back, scale, learning
rate, decay) is the optimizer's business. `step` counts from 1 and includes the present one.

Where `skip` is 1 the moments stay as they are and the direction is zero.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from ..integrations import bitsandbytes as kernels
from ..lowrank.nonfinite import known_skip
from ..lowrank.rounding import add_rounded_, part_of


def adam_(
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
    skip: Tensor,
) -> None:
    """W ← (1 − ηλ)W − ηN in place, N = m̂ / (√v̂ + ε): torch's own fused AdamW on one tensor.

    Args:
        weight: contiguous, as are the others, which have its dtype and shape.
        gradient: G.
        exp_avg: first moment m, updated in place.
        exp_avg_sq: second moment v, likewise.
        skip: 0-dimensional float32; at 1 nothing is changed.

    Source: Adam (Kingma and Ba, 2015, arXiv:1412.6980), algorithm 1; AdamW (arXiv:1711.05101), algorithm 2.
    """
    adamw(
        [weight],
        [gradient],
        [exp_avg],
        [exp_avg_sq],
        [],
        # It counts on the device and adds 1 itself.
        [torch.full((), step - 1, dtype=torch.float32, device=weight.device)],
        fused=True,
        found_inf=skip,
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=lr,
        weight_decay=weight_decay,
        eps=eps,
        maximize=False,
    )


def adam_direction(
    gradient: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
    skip: Tensor,
) -> Tensor:
    """N = m̂ / (√v̂ + ε), in the moments' dtype; zero where `skip` is 1.

    The kernel only knows how to move a weight. A zero of the gradient's size, moved by −η·N with η = −1, is N.

    Args:
        gradient: G or R, any floating-point dtype.
        exp_avg: first moment, float32 (float64 for float64 weights), contiguous; updated in place.
        exp_avg_sq: second moment, likewise.
        skip: as in `adam_`.
    """
    direction = torch.zeros_like(exp_avg)
    gradient = gradient.to(exp_avg.dtype).contiguous()
    adam_(
        direction,
        gradient,
        exp_avg,
        exp_avg_sq,
        step=step,
        betas=betas,
        eps=eps,
        lr=-1.0,
        weight_decay=0.0,
        skip=skip,
    )
    return direction


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
    table = kernels.functional().create_dynamic_map
    return Codebooks(table(signed=True).to(device), table(signed=False).to(device))


def blockwise_absmax_shape(numel: int) -> tuple[int]:
    """The shape of the per-block scales of an 8-bit moment with `numel` elements."""
    return (math.ceil(numel / kernels.MOMENT_BLOCK),)


def dequantize_moments(moments: QuantizedMoments, codebooks: Codebooks) -> tuple[Tensor, Tensor]:
    """Both moments in float32."""

    def plain(codes: Tensor, absmax: Tensor, code: Tensor) -> Tensor:
        return kernels.dequantize_8bit(kernels.Quantized(codes, absmax), code, kernels.MOMENT_BLOCK, torch.float32)

    return (
        plain(moments.exp_avg, moments.exp_avg_absmax, codebooks.signed),
        plain(moments.exp_avg_sq, moments.exp_avg_sq_absmax, codebooks.unsigned),
    )


def quantize_moments_(moments: QuantizedMoments, exp_avg: Tensor, exp_avg_sq: Tensor, codebooks: Codebooks) -> None:
    """Put float32 moments where the 8-bit ones are."""
    for values, codes, absmax, code in (
        (exp_avg, moments.exp_avg, moments.exp_avg_absmax, codebooks.signed),
        (exp_avg_sq, moments.exp_avg_sq, moments.exp_avg_sq_absmax, codebooks.unsigned),
    ):
        new = kernels.quantize_8bit(values.contiguous(), code, kernels.MOMENT_BLOCK)
        codes.copy_(new.codes)
        absmax.copy_(new.absmax)


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
    kernels.adam_8bit_(
        weight,
        gradient.to(weight.dtype).contiguous(),
        kernels.Moments8bit(*moments, *codebooks),
        kernels.AdamStep(step, betas, eps, lr, weight_decay),
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
    kernels.adam_32bit_(
        weight,
        gradient.to(weight.dtype).contiguous(),
        exp_avg,
        exp_avg_sq,
        kernels.AdamStep(step, betas, eps, lr, weight_decay),
    )


def adam_8bit_direction(
    gradient: Tensor,
    moments: QuantizedMoments,
    codebooks: Codebooks,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
    skip: Tensor,
) -> Tensor:
    """N for a low-rank gradient with 8-bit moments, in its dtype; see `adam_direction` for how.

    The kernel computes in float32 whatever the dtype, and N is cast to the weight's in any case when it is projected
    back: float32 copies of it and of the gradient would only take memory.
    """
    direction = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
    # bitsandbytes' kernels have no way to skip an update that only the device knows of: the moments are put back.
    before = None if known_skip(skip) is False else [moment.clone() for moment in moments]
    adam_8bit_(direction, gradient, moments, codebooks, step=step, betas=betas, eps=eps, lr=-1.0, weight_decay=0.0)
    if before is not None:
        skipped = skip.bool()
        for moment, old in zip(moments, before, strict=True):
            torch.where(skipped, old, moment, out=moment)
        direction.masked_fill_(skipped, 0.0)
    return direction


def adam_in_parts_(
    weight: Tensor,
    gradient: Tensor,
    moments: QuantizedMoments | tuple[Tensor, Tensor],
    codebooks: Codebooks,
    *,
    step: int,
    betas: tuple[float, float],
    eps: float,
    lr: float,
    weight_decay: float,
    skip: Tensor,
) -> None:
    """W ← (1 − ηλ)W − ηN in place, rounded once, where only the device knows whether the update is skipped.

    bitsandbytes' kernels would move a weight and its moments in any case, and on a GPU round twice. A part at a time,
    because what is computed is a copy.

    Args:
        weight: contiguous.
        gradient: of its shape.
        moments: in 8 bits, or m and v in float32; contiguous.
    """
    flat, gradients = weight.view(-1), gradient.to(weight.dtype).contiguous().view(-1)
    size = part_of(flat.numel())
    for start in range(0, flat.numel(), size):
        part = slice(start, start + size)
        if isinstance(moments, QuantizedMoments):
            blocks = slice(start // kernels.MOMENT_BLOCK, (start + size) // kernels.MOMENT_BLOCK)
            of_part = QuantizedMoments(
                moments.exp_avg.view(-1)[part],
                moments.exp_avg_absmax[blocks],
                moments.exp_avg_sq.view(-1)[part],
                moments.exp_avg_sq_absmax[blocks],
            )
            direction = adam_8bit_direction(
                gradients[part], of_part, codebooks, step=step, betas=betas, eps=eps, skip=skip
            )
        else:
            exp_avg, exp_avg_sq = (moment.view(-1)[part] for moment in moments)
            direction = adam_direction(gradients[part], exp_avg, exp_avg_sq, step=step, betas=betas, eps=eps, skip=skip)
        add_rounded_(flat[part], direction.__getitem__, alpha=-lr, decay=1 - lr * weight_decay, skip=skip)


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
    skip: Tensor,
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
        skip: 0-dimensional float32; at 1 the moments stay and U is zero.

    Source: Adafactor (Shazeer and Stern, 2018, arXiv:1804.04235), algorithm 4.
    """
    moment = exp_avg_sq if exp_avg_sq is not None else exp_avg_sq_row
    assert moment is not None
    skipped = skip.bool()
    gradient = gradient.to(moment.dtype).masked_fill(skipped, 0.0)
    weight = (step**decay_rate) * (1 - skip.to(moment.dtype))  # 1 − β₂ₜ, or 0
    squared = gradient.square().add_(eps)
    if exp_avg_sq is not None:
        exp_avg_sq.lerp_(squared, weight)
        direction = exp_avg_sq.rsqrt().mul_(gradient)
    else:
        assert exp_avg_sq_row is not None
        assert exp_avg_sq_col is not None
        exp_avg_sq_row.lerp_(squared.mean(dim=-1), weight)
        exp_avg_sq_col.lerp_(squared.mean(dim=-2), weight)
        row = (exp_avg_sq_row / exp_avg_sq_row.mean(dim=-1, keepdim=True)).rsqrt_().unsqueeze(-1)
        column = exp_avg_sq_col.rsqrt().unsqueeze(-2)
        direction = (row * column).mul_(gradient)
    rms = direction.norm(2) / math.sqrt(direction.numel())
    # Moments that are still zero make 0 · ∞ of a gradient that is skipped.
    return direction.div_((rms / clip_threshold).clamp_(min=1.0)).masked_fill_(skipped, 0.0)
