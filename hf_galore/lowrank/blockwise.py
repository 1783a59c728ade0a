"""Blockwise 4 and 8 bits, and AdamW on moments that are kept so, in plain torch: what bitsandbytes' kernels compute.

A tensor is cut, flat, into blocks of elements that share one scale, their largest magnitude; each element is kept as
the place of the nearest value in a table. `hf_galore.integrations.bitsandbytes` uses these functions where a kernel,
bitsandbytes' or one of `hf_galore.kernels`, is wrong, and to find that out.

Sources: 8-bit Optimizers via Block-wise Quantization (Dettmers et al., 2022, arXiv:2110.02861); NormalFloat4 from QLoRA
(Dettmers et al., 2023, arXiv:2305.14314), section 3; AdamW (arXiv:1711.05101), algorithm 2.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# bitsandbytes' kernels quantise moments in blocks of this many elements; it is not configurable there.
MOMENT_BLOCK = 256


class Quantized(NamedTuple):
    """Codes and the largest magnitude of each block: float32 as quantised, any floating-point dtype to be read."""

    codes: Tensor
    absmax: Tensor


class Moments8bit(NamedTuple):
    """Adam's moments in 8 bits, with the tables that their codes point into: 256 ascending float32 values each."""

    exp_avg: Tensor  # uint8
    exp_avg_absmax: Tensor
    exp_avg_sq: Tensor
    exp_avg_sq_absmax: Tensor
    signed: Tensor
    unsigned: Tensor


class AdamStep(NamedTuple):
    """What is the same for all elements in one step of W ← (1 − ηλ)W − ηN, N = m̂ / (√v̂ + ε)."""

    step: int
    betas: tuple[float, float]
    eps: float
    lr: float
    weight_decay: float


# Quantiles of a normal distribution, as bitsandbytes has them: a checkpoint's codes mean the same to both.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@torch.no_grad()
def plain_quantize_8bit(values: Tensor, table: Tensor, block: int) -> Quantized:
    """Quantise to 8 bits: of each element, over its block's largest magnitude, the nearest of the table."""
    places, absmax = nearest_places(values, table, block)
    return Quantized(places.to(torch.uint8).view(values.shape), absmax)


@torch.no_grad()
def plain_dequantize_8bit(kept: Quantized, table: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """What 8-bit codes stand for, computed in float32 and then rounded to `dtype`."""
    return _values_at(kept.codes, kept.absmax, table, block).to(dtype)


@torch.no_grad()
def plain_quantize_4bit(values: Tensor, block: int) -> Quantized:
    """Quantise to NormalFloat4, two codes to a byte, the first in the upper half.

    The half byte after an odd number of elements stands for 0, as bitsandbytes' does.
    """
    places, absmax = nearest_places(values, nf4(values.device), block)
    if places.numel() % 2:
        places = torch.nn.functional.pad(places, (0, 1), value=NF4.index(0.0))
    halves = places.to(torch.uint8)
    return Quantized((halves[::2] << 4 | halves[1::2]).unsqueeze(1), absmax)


@torch.no_grad()
def plain_dequantize_4bit(kept: Quantized, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """What NormalFloat4 codes stand for, in `shape`, computed in float32 and then rounded to `dtype`."""
    codes = kept.codes.view(-1)
    places = torch.stack([codes >> 4, codes & 15], dim=1).view(-1)[: math.prod(shape)]
    return _values_at(places, kept.absmax, nf4(codes.device), block).to(dtype).view(tuple(shape))


@torch.no_grad()
def plain_adam_(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep) -> None:
    """One step of AdamW in place, in float32; decay and update are rounded to the weight's dtype once, together."""
    gradient, updated = gradient.float(), weight.float()
    beta1, beta2 = now.betas
    exp_avg.mul_(beta1).add_(gradient, alpha=1 - beta1)
    exp_avg_sq.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - beta2**now.step)).add_(now.eps)
    updated.mul_(1 - now.lr * now.weight_decay)
    updated.addcdiv_(exp_avg, denominator, value=-now.lr / (1 - beta1**now.step))
    weight.copy_(updated)


@torch.no_grad()
def plain_adam_8bit_(weight: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep) -> None:
    """One step of AdamW in place, with moments in 8 bits, which are read, moved by `plain_adam_` and written anew."""
    kept = (
        (moments.exp_avg, moments.exp_avg_absmax, moments.signed),
        (moments.exp_avg_sq, moments.exp_avg_sq_absmax, moments.unsigned),
    )
    exp_avg, exp_avg_sq = (_values_at(codes, absmax, table, MOMENT_BLOCK) for codes, absmax, table in kept)
    plain_adam_(weight, gradient, exp_avg, exp_avg_sq, now)
    for values, (codes, absmax, table) in zip((exp_avg, exp_avg_sq), kept, strict=True):
        new = plain_quantize_8bit(values, table, MOMENT_BLOCK)
        codes.copy_(new.codes)
        absmax.copy_(new.absmax)


def nf4(device: torch.device) -> Tensor:
    """The 16 values of NormalFloat4, ascending, float32."""
    return torch.tensor(NF4, dtype=torch.float32, device=device)


def nearest_places(values: Tensor, table: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """The place in the table of each element, flat, and the largest magnitude of each block."""
    flat = values.reshape(-1).float()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    absmax = blocks.abs().amax(dim=1)
    scaled = blocks / torch.where(absmax > 0, absmax, 1.0).unsqueeze(1)  # a block of zeros stays one
    places = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2, out_int32=True)
    return places.view(-1)[: flat.numel()], absmax


def _values_at(places: Tensor, absmax: Tensor, table: Tensor, block: int) -> Tensor:
    """What places in the table stand for, in their shape, float32."""
    return table[places.int()] * scale_of_each(absmax, block, places.numel()).view(places.shape)


def scale_of_each(absmax: Tensor, block: int, numel: int) -> Tensor:
    """The scale of each element, flat."""
    return absmax.float().unsqueeze(1).expand(-1, block).reshape(-1)[:numel]
