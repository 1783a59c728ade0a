"""The calls of bitsandbytes' kernels, without the checks: `hf_galore.integrations.bitsandbytes` is what to use.

Positions of arguments have moved between releases of bitsandbytes, so all but the first go by keyword.
`tests/integrations/test_bitsandbytes.py` looks at the signatures first.

On a GPU its optimizer and quantisation run on the legacy default stream, whatever the current one is, so they are
ordered with that here. (Reading codes runs on the current stream.) CUDA graphs cannot capture them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..lowrank.blockwise import AdamStep, Moments8bit, Quantized
from ..lowrank.nonfinite import has_numbers


def functional() -> Any:
    """`bitsandbytes.functional`, which takes a second to import.

    Raises:
        ImportError: bitsandbytes is not installed.
    """
    from bitsandbytes import functional

    return functional


@contextlib.contextmanager
def _in_order(used: Tensor) -> Iterator[None]:
    """Within, what runs on the default stream comes after what the current one has to do, which then waits for it.

    By events: the host waits for nothing.
    """
    if used.device.type != "cuda" or not has_numbers(used):
        yield
        return
    current, default = torch.cuda.current_stream(used.device), torch.cuda.default_stream(used.device)
    if current == default:
        yield
        return
    default.wait_stream(current)
    try:
        yield
    finally:
        current.wait_stream(default)


def version() -> str:
    """The version of bitsandbytes."""
    import bitsandbytes

    return str(bitsandbytes.__version__)


def quantize_4bit(values: Tensor, block: int) -> Quantized:
    """Call the kernel that quantises to NormalFloat4."""
    functional()  # defines the operation
    # Not by `functional().quantize_4bit`, which makes a table from a list at each call: on a GPU, that copy waits.
    with _in_order(values):
        return Quantized(*torch.ops.bitsandbytes.quantize_4bit(values, block, "nf4", torch.uint8))


def dequantize_4bit(kept: Quantized, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Call the kernel that reads NormalFloat4 codes."""
    # Flat: what it makes of rows is wrong on some CPUs, and of 2 × 1 a 1 × 2. And even, as the codes of an odd number
    # of elements are too: an odd number goes a way that compiles, for each shape anew.
    flat = (2 * kept.codes.numel(),)
    library = functional()
    state = library.QuantState(
        absmax=kept.absmax.float(), shape=torch.Size(flat), blocksize=block, quant_type="nf4", dtype=dtype
    )
    values: Tensor = library.dequantize_4bit(kept.codes, state)  # on a CPU it is 1 × elements
    return values.view(-1)[: math.prod(shape)].view(tuple(shape))


def quantize_8bit(values: Tensor, table: Tensor, block: int) -> Quantized:
    """Call the kernel that quantises to 8 bits by a table."""
    with _in_order(values):
        codes, state = functional().quantize_blockwise(values, code=table, blocksize=block)
    return Quantized(codes, state.absmax)


def dequantize_8bit(kept: Quantized, table: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    """Call the kernel that reads 8-bit codes."""
    library = functional()
    state = library.QuantState(absmax=kept.absmax.float(), code=table, blocksize=block, dtype=dtype)
    values: Tensor = library.dequantize_blockwise(kept.codes, state)
    return values


def adam_8bit_(weight: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep) -> None:
    """Call the kernel of AdamW with moments in 8 bits."""
    with _in_order(weight):
        functional().optimizer_update_8bit_blockwise(
            optimizer_name="adam",
            g=gradient,
            p=weight,
            state1=moments.exp_avg,
            state2=moments.exp_avg_sq,
            beta1=now.betas[0],
            beta2=now.betas[1],
            beta3=0.0,
            alpha=0.0,
            eps=now.eps,
            step=now.step,
            lr=now.lr,
            qmap1=moments.signed,
            qmap2=moments.unsigned,
            absmax1=moments.exp_avg_absmax,
            absmax2=moments.exp_avg_sq_absmax,
            weight_decay=now.weight_decay,
            # By keyword: positions moved between releases, and a stray value here freezes parameters.
            gnorm_scale=1.0,
            skip_zeros=False,
        )
    increment_version(
        [weight, moments.exp_avg, moments.exp_avg_absmax, moments.exp_avg_sq, moments.exp_avg_sq_absmax]
    )  # the kernel does not


def adam_32bit_(weight: Tensor, gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep) -> None:
    """Call the kernel of AdamW with moments in 32 bits."""
    with _in_order(weight):
        functional().optimizer_update_32bit(
            optimizer_name="adam",
            g=gradient,
            p=weight,
            state1=exp_avg,
            beta1=now.betas[0],
            eps=now.eps,
            step=now.step,
            lr=now.lr,
            state2=exp_avg_sq,
            beta2=now.betas[1],
            weight_decay=now.weight_decay,
            gnorm_scale=1.0,
            unorm_vec=None,
            max_unorm=0.0,
            skip_zeros=False,
        )
    increment_version([weight, exp_avg, exp_avg_sq])  # the kernel does not


def linear_table() -> Tensor:
    """bitsandbytes' table of equal steps from −1 to 1: 256 ascending float32 values; that for 0 is 6e-8."""
    table: Tensor = functional().create_linear_map().to(torch.float32)
    return table


def dynamic_tables() -> tuple[Tensor, Tensor]:
    """bitsandbytes' dynamic 8-bit tables for first and second moments: 256 ascending float32 values each."""
    make = functional().create_dynamic_map
    return make(signed=True).to(torch.float32), make(signed=False).to(torch.float32)
