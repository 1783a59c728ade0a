"""One step of Adam in one kernel: moments, direction or weight, and nothing where the gradient is not finite.

Each function computes, for a gradient G (or low-rank gradient R), m ← β₁m + (1 − β₁)G, v ← β₂v + (1 − β₂)G² and
N = m̂ / (√v̂ + ε) in float32, N from the moments as they are before they are kept in 8 bits again. What is written in
place has its version counter raised, as by torch's own operations. Fake and meta tensors are left alone.

Sources: Adam (Kingma and Ba, 2015, arXiv:1412.6980), algorithm 1; AdamW (arXiv:1711.05101), algorithm 2; 8-bit
Optimizers via Block-wise Quantization (Dettmers et al., 2022, arXiv:2110.02861).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..lowrank.blockwise import MOMENT_BLOCK, AdamStep, Moments8bit
from ..lowrank.nonfinite import has_numbers
from .where import DTYPES, launch

# Blocks and elements that one program takes: four warps, eight elements to a thread, which is 16 bytes of bfloat16.
_ROWS = 4
_SIZE = 1024


def adam_8bit_direction(gradient: Tensor, moments: Moments8bit, now: AdamStep, norm: Tensor) -> Tensor:
    """N for a gradient, with moments in 8 bits that are updated in place.

    Args:
        gradient: float32, bfloat16 or float16, of any shape; made contiguous.
        moments: contiguous, with bitsandbytes' dynamic tables: the kernel knows their form.
        now: its learning rate and decay are not used.
        norm: of the gradient: 0-dimensional, floating-point, on its device. Where it is NaN or infinite, the moments
            are left alone and N is 0.

    Returns:
        Contiguous, in the gradient's shape and dtype.

    Raises:
        ValueError: A dtype, a shape, a device or a stride is another.
    """
    direction = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    _adam_8bit_(direction, gradient, moments, now, norm, is_weight=False)
    return direction


def adam_8bit_(weight: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep, norm: Tensor) -> None:
    """W ← (1 − ηλ)W − ηN in place, rounded once, to the nearest, with moments in 8 bits.

    Args:
        weight: contiguous, float32, bfloat16 or float16.
        gradient: of its shape; its dtype may be another of these.
        moments: as in `adam_8bit_direction`.
        now: the step's number and options.
        norm: as in `adam_8bit_direction`; where it is not finite, the weight too is left alone.

    Raises:
        ValueError: A dtype, a shape, a device or a stride is another.
    """
    _adam_8bit_(weight, gradient, moments, now, norm, is_weight=True)


def adam_32bit_direction(gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep, norm: Tensor) -> Tensor:
    """N for a gradient, in its dtype, with moments in contiguous float32; else as `adam_8bit_direction`."""
    direction = torch.empty_like(gradient, memory_format=torch.contiguous_format)
    _adam_32bit_(direction, gradient, (exp_avg, exp_avg_sq), now, norm, is_weight=False)
    return direction


def adam_32bit_(
    weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep, norm: Tensor
) -> None:
    """W ← (1 − ηλ)W − ηN in place, with moments in contiguous float32; else as `adam_8bit_`."""
    _adam_32bit_(weight, gradient, (exp_avg, exp_avg_sq), now, norm, is_weight=True)


def _adam_8bit_(
    target: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep, norm: Tensor, *, is_weight: bool
) -> None:
    codes, scales = (moments.exp_avg, moments.exp_avg_sq), (moments.exp_avg_absmax, moments.exp_avg_sq_absmax)
    _check(target, gradient, codes, torch.uint8, norm)
    blocks = math.ceil(gradient.numel() / MOMENT_BLOCK)
    for scale in scales:
        _check_like("The moments' scales", scale, blocks, torch.float32, gradient.device)
    for table in (moments.signed, moments.unsigned):
        _check_like("The moments' tables", table, 256, torch.float32, gradient.device)
    if not has_numbers(gradient):
        return
    launch(
        "adam_8bit",
        math.ceil(blocks / _ROWS),
        target,
        gradient.contiguous(),
        norm,
        *moments,
        gradient.numel(),
        *_numbers(now),
        is_weight=is_weight,
        block=MOMENT_BLOCK,
        rows=_ROWS,
    )
    increment_version([*([target] if is_weight else []), *codes, *scales])


def _adam_32bit_(
    target: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], now: AdamStep, norm: Tensor, *, is_weight: bool
) -> None:
    _check(target, gradient, moments, torch.float32, norm)
    if not has_numbers(gradient):
        return
    launch(
        "adam_32bit",
        math.ceil(gradient.numel() / _SIZE),
        target,
        gradient.contiguous(),
        norm,
        *moments,
        gradient.numel(),
        *_numbers(now),
        is_weight=is_weight,
        size=_SIZE,
    )
    increment_version([*([target] if is_weight else []), *moments])


def _numbers(now: AdamStep) -> tuple[float, ...]:
    """β₁, 1 − β₁, β₂, 1 − β₂, ε, 1/(1 − β₁ᵗ), 1/√(1 − β₂ᵗ), 1 − ηλ and η, from float64.

    Floats, all of them: Triton compiles anew for integers that are 1, or multiples of 16.
    """
    beta1, beta2 = (float(beta) for beta in now.betas)
    corrections = 1 / (1 - beta1**now.step), 1 / math.sqrt(1 - beta2**now.step)
    lr = float(now.lr)
    return (beta1, 1 - beta1, beta2, 1 - beta2, float(now.eps), *corrections, 1 - lr * now.weight_decay, lr)


def _check(target: Tensor, gradient: Tensor, moments: tuple[Tensor, Tensor], dtype: torch.dtype, norm: Tensor) -> None:
    device, numel = gradient.device, gradient.numel()
    for name, tensor in (("weight", target), ("gradient", gradient)):
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"The {name} has to be float32, bfloat16 or float16, but is {tensor.dtype}: use plain torch for it."
            )
    if norm.numel() != 1 or not norm.is_floating_point() or norm.device != device:
        raise ValueError(
            f"The norm has to be one floating-point number on {device}, but is {tuple(norm.shape)} {norm.dtype} on "
            f"{norm.device}."
        )
    _check_like("The weight", target, numel, target.dtype, device)
    for moment in moments:
        _check_like("A moment", moment, numel, dtype, device)


def _check_like(name: str, tensor: Tensor, numel: int, dtype: torch.dtype, device: torch.device) -> None:
    """Raise an error unless a tensor is what a kernel takes it for: it would use memory that is not the tensor's."""
    if tensor.numel() != numel or tensor.dtype != dtype or tensor.device != device or not tensor.is_contiguous():
        raise ValueError(
            f"{name}: has to be {numel} contiguous elements of {dtype} on {device}, but is {tensor.numel()} "
            f"{'contiguous' if tensor.is_contiguous() else 'strided'} elements of {tensor.dtype} on {tensor.device}."
        )
