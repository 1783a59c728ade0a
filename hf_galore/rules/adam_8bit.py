"""Adam with both moments in blockwise dynamic 8-bit, by our kernels on NVIDIA's cards, elsewhere by bitsandbytes'.

bitsandbytes' own rules hold: moments of fewer than 4,096 elements stay in 32 bits, and so do those of a group with
`optim_bits: 32`. Its kernels walk the memory as if it were contiguous, and know no update that is skipped.

Source: 8-bit Optimizers via Block-wise Quantization (Dettmers et al., 2022, arXiv:2110.02861).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from ..integrations import bitsandbytes as kernels
from ..kernels import adam as own
from ..lowrank.blockwise import AdamStep
from ..lowrank.nonfinite import Skip
from ..lowrank.rotation import Rotation, rotate_adam
from ..lowrank.rounding import add_rounded_, part_of
from .adam import Adam, adam_direction, direction_step, weight_step
from .rule import Group, Moment, Moments, Rule

# bitsandbytes keeps the moments of smaller tensors in 32 bits: they save nothing and hurt most.
MIN_8BIT_ELEMENTS = 4096


class Adam32bit(Adam):
    """Adam as bitsandbytes' 8-bit optimizer computes it for parameters whose moments stay in 32 bits."""

    defaults: ClassVar[Mapping[str, Any]] = {**Adam.defaults, "optim_bits": 8}

    def check(self, group: Group) -> None:
        """Check what Adam does, `optim_bits`, and that bitsandbytes is installed."""
        check_installed("8-bit moments need", "The 32-bit optimizers work without it.")
        super().check(group)
        if group["optim_bits"] not in (8, 32):
            raise ValueError(f"optim_bits has to be 8 or 32, but is {group['optim_bits']!r}.")

    def check_parameter(self, name: str, param: Tensor) -> None:
        """Check that the kernels know the weight's dtype."""
        if param.dtype not in kernels.DTYPES:
            raise ValueError(
                f"bitsandbytes trains float32, bfloat16 and float16 weights, but {name} is {param.dtype}. Use "
                "GaLoreAdamW for it."
            )

    def update_(self, weight: Tensor, gradient: Tensor, moments: Moments, group: Group, step: int, skip: Skip) -> bool:
        """Update a weight of any dtype by one fused kernel, with no full-rank temporary."""
        exp_avg, exp_avg_sq, now = moments["exp_avg"], moments["exp_avg_sq"], weight_step(group, step)
        if skip.known is None and kernels.fused("adam_32bit_", weight, weight.dtype):
            own.adam_32bit_(weight, gradient, exp_avg, exp_avg_sq, now, skip.norm)
        elif skip.flag is not None:
            adam_in_parts_(weight, gradient, (exp_avg, exp_avg_sq), now, skip.flag)
        else:
            # Its kernels ask for a gradient of the weight's dtype.
            kernels.adam_32bit_(weight, gradient.to(weight.dtype).contiguous(), exp_avg, exp_avg_sq, now)
        return True


class Adam8bit(Adam32bit):
    """Adam with moments in 8 bits, one float32 scale for each 256 elements."""

    def for_shape(self, shape: tuple[int, ...], group: Group) -> Rule:
        """This, or 32-bit moments of small tensors and where the group asks for them."""
        return _IN_32_BITS if group["optim_bits"] == 32 or math.prod(shape) < MIN_8BIT_ELEMENTS else self

    def of_stack(self, shape: tuple[int, ...]) -> Rule:
        """This, or 32-bit moments where blocks would run from one gradient of the stack into the next."""
        return self if math.prod(shape) % kernels.MOMENT_BLOCK == 0 else _IN_32_BITS

    def moments(self, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> dict[str, Moment]:
        """Codes of the gradient's shape and the scales of their blocks, for either moment."""
        return {**moment_8bit("exp_avg", shape), **moment_8bit("exp_avg_sq", shape)}

    def direction(
        self, gradient: Tensor, moments: Moments, group: Group, step: int, skip: Skip
    ) -> tuple[Tensor, float]:
        """N in the gradient's dtype, and the learning rate."""
        quantized, now = QuantizedMoments.of(moments), direction_step(group, step)
        if skip.known is None and kernels.fused("adam_8bit_direction", gradient, gradient.dtype):
            direction = own.adam_8bit_direction(gradient, quantized.in_table(), now, skip.norm)
        else:
            direction = adam_8bit_direction(gradient, quantized, now, skip.flag)
        return direction, float(group["lr"])

    def update_(self, weight: Tensor, gradient: Tensor, moments: Moments, group: Group, step: int, skip: Skip) -> bool:
        """Update a weight of any dtype by one fused kernel, with no full-rank temporary."""
        quantized, now = QuantizedMoments.of(moments), weight_step(group, step)
        if skip.known is None and kernels.fused("adam_8bit_", weight, weight.dtype):
            own.adam_8bit_(weight, gradient, quantized.in_table(), now, skip.norm)
        elif skip.flag is not None:
            adam_in_parts_(weight, gradient, quantized, now, skip.flag)
        else:
            adam_8bit_(weight, gradient, quantized, now)
        return True

    def rotate_(self, moments: Moments, group: Group, rotation: Rotation, step: int) -> None:
        """Carry both moments into the new basis, in float32 between their codes."""
        quantized = QuantizedMoments.of(moments)
        exp_avg, exp_avg_sq = dequantize_moments(quantized)
        rotated = rotate_adam(exp_avg, exp_avg_sq, rotation, step=step, betas=group["betas"])
        quantize_moments_(quantized, *rotated)


_IN_32_BITS = Adam32bit()
_IN_8_BITS = Adam8bit()


def check_installed(needs: str, otherwise: str) -> None:
    """Check that there is bitsandbytes, whose tables the codes of 8-bit moments point into.

    Args:
        needs: the beginning of the message.
        otherwise: what works without it.

    Raises:
        ImportError: it is not installed.
    """
    try:
        kernels.functional()
    except ImportError as error:
        raise ImportError(f"{needs} bitsandbytes: pip install bitsandbytes. {otherwise}") from error


def is_in_8_bits(shape: tuple[int, ...]) -> bool:
    """Whether `Adam8bit` keeps moments of a matrix, or of each matrix of a stack, in 8 bits, and not in 32."""
    rule = _IN_8_BITS.for_shape(shape[-2:], {"optim_bits": 8})
    return isinstance(rule if len(shape) == 2 else rule.of_stack(shape[-2:]), Adam8bit)


def moment_8bit(key: str, shape: tuple[int, ...]) -> dict[str, Moment]:
    """A moment of this key in 8 bits: its codes, of the gradient's shape, and the scales of their blocks."""
    scales = (math.ceil(math.prod(shape) / kernels.MOMENT_BLOCK),)
    return {key: Moment(shape, torch.uint8), f"{key}_absmax": Moment(scales, torch.float32)}


class QuantizedMoments(NamedTuple):
    """Both moments of Adam in blockwise dynamic 8-bit: codes of the gradient's shape, one scale a block."""

    exp_avg: Tensor  # uint8
    exp_avg_absmax: Tensor  # float32, one for each 256 elements
    exp_avg_sq: Tensor
    exp_avg_sq_absmax: Tensor

    @classmethod
    def of(cls, moments: Moments) -> QuantizedMoments:
        """Those among a parameter's moments."""
        return cls(*(moments[key] for key in cls._fields))

    def in_table(self) -> kernels.Moments8bit:
        """These with the tables that their codes point into."""
        return kernels.Moments8bit(*self, *codebooks(self.exp_avg.device))


class Codebooks(NamedTuple):
    """bitsandbytes' dynamic 8-bit codebooks: 256 float32 values each, ascending."""

    signed: Tensor
    unsigned: Tensor


@functools.cache
def codebooks(device: torch.device) -> Codebooks:
    """The codebooks of `exp_avg` (signed) and `exp_avg_sq` (unsigned) on `device`; copied there once.

    Source: arXiv:2110.02861, section 1.3.
    """
    return Codebooks(*(table.to(device) for table in kernels.dynamic_tables()))


def dequantize_moments(moments: QuantizedMoments) -> tuple[Tensor, Tensor]:
    """Both moments in float32."""
    tables = codebooks(moments.exp_avg.device)
    return (
        dequantize_moment(kernels.Quantized(moments.exp_avg, moments.exp_avg_absmax), tables.signed),
        dequantize_moment(kernels.Quantized(moments.exp_avg_sq, moments.exp_avg_sq_absmax), tables.unsigned),
    )


def dequantize_moment(kept: kernels.Quantized, table: Tensor) -> Tensor:
    """A moment in float32, from its codes' table."""
    return kernels.dequantize_8bit(kept, table, kernels.MOMENT_BLOCK, torch.float32)


def quantize_moments_(moments: QuantizedMoments, exp_avg: Tensor, exp_avg_sq: Tensor) -> None:
    """Put float32 moments where the 8-bit ones are."""
    tables = codebooks(moments.exp_avg.device)
    quantize_moment_(kernels.Quantized(moments.exp_avg, moments.exp_avg_absmax), exp_avg, tables.signed)
    quantize_moment_(kernels.Quantized(moments.exp_avg_sq, moments.exp_avg_sq_absmax), exp_avg_sq, tables.unsigned)


def quantize_moment_(kept: kernels.Quantized, values: Tensor, table: Tensor, skip: Tensor | None = None) -> None:
    """Put a float32 moment where an 8-bit one is, each value to the nearest in its codes' table.

    Args:
        kept: updated in place.
        values: of its shape.
        table: of its codes.
        skip: 0-dimensional; at 1 the 8-bit one stays, to the bit: read and put back it might not. `None` for never.
    """
    new = kernels.quantize_8bit(values.contiguous(), table, kernels.MOMENT_BLOCK)
    for old, value in zip(kept, new, strict=True):
        if skip is None:
            old.copy_(value)
        else:
            torch.where(skip.bool(), old, value, out=old)


def adam_8bit_(weight: Tensor, gradient: Tensor, moments: QuantizedMoments, now: AdamStep) -> None:
    """W ← (1 − ηλ)W − ηN in place, with moments in 8 bits.

    Args:
        weight: contiguous, float32, bfloat16 or float16.
        gradient: same shape; made contiguous and cast to the weight's dtype, as the kernels ask.
        moments: updated in place.
    """
    kernels.adam_8bit_(weight, gradient.to(weight.dtype).contiguous(), moments.in_table(), now)


def adam_8bit_direction(gradient: Tensor, moments: QuantizedMoments, now: AdamStep, skip: Tensor | None) -> Tensor:
    """N for a gradient with 8-bit moments, in its dtype; zero where `skip` is 1.

    The kernel computes in float32 whatever the dtype, and N is cast to the weight's in any case when it is projected
    back: float32 copies of it and of the gradient would only take memory.

    Args:
        now: from `direction_step`.
        skip: as in `adam_`.
    """
    direction = torch.zeros_like(gradient, memory_format=torch.contiguous_format)
    # What only the device knows to be skipped is computed, and the moments are put back.
    before = [] if skip is None else [moment.clone() for moment in moments]
    adam_8bit_(direction, gradient, moments, now)
    if skip is not None:
        skipped = skip.bool()
        for moment, old in zip(moments, before, strict=True):
            torch.where(skipped, old, moment, out=moment)
        direction.masked_fill_(skipped, 0.0)
    return direction


def adam_in_parts_(
    weight: Tensor,
    gradient: Tensor,
    moments: QuantizedMoments | tuple[Tensor, Tensor],
    now: AdamStep,
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
    size, to_direction = part_of(flat.numel()), now._replace(lr=-1.0, weight_decay=0.0)
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
            direction = adam_8bit_direction(gradients[part], of_part, to_direction, skip)
        else:
            exp_avg, exp_avg_sq = (moment.view(-1)[part] for moment in moments)
            direction = adam_direction(gradients[part], exp_avg, exp_avg_sq, to_direction, skip)
        add_rounded_(flat[part], direction.__getitem__, alpha=-now.lr, decay=1 - now.lr * now.weight_decay, skip=skip)
