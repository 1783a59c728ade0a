"""What tests of our Triton kernels share: moments, what float64 makes of them, and a card that is not there."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from hf_galore.integrations import bitsandbytes_calls as calls
from hf_galore.lowrank.blockwise import (
    MOMENT_BLOCK,
    AdamStep,
    Moments8bit,
    Quantized,
    nearest_places,
    plain_dequantize_8bit,
    plain_quantize_8bit,
    scale_of_each,
)

# Less than a block, one, and no whole number of them; odd; several programs.
COUNTS = (1, 2, 231, 256, 257, 1030)
FIRST = AdamStep(step=1, betas=(0.9, 0.999), eps=1e-8, lr=1e-2, weight_decay=0.0)
LATER = AdamStep(step=7, betas=(0.9, 0.99), eps=1e-4, lr=0.25, weight_decay=0.5)


def moments_8bit(shape: tuple[int, ...], seed: int = 0, zero: bool = False) -> Moments8bit:
    """Moments like those of gradients of about 0.01, or none yet, with bitsandbytes' dynamic tables."""
    first, second = moments_32bit(shape, seed, zero)
    signed, unsigned = calls.dynamic_tables()
    return Moments8bit(
        *plain_quantize_8bit(first, signed, MOMENT_BLOCK),
        *plain_quantize_8bit(second, unsigned, MOMENT_BLOCK),
        signed,
        unsigned,
    )


def moments_32bit(shape: tuple[int, ...], seed: int = 0, zero: bool = False) -> tuple[Tensor, Tensor]:
    """The same in float32."""
    generator = torch.Generator().manual_seed(1000 + seed)
    first, second = (torch.randn(shape, generator=generator) for _ in range(2))
    return (first * 0.0, second * 0.0) if zero else (0.01 * first, 1e-4 * (second.square() + 1e-3))


def in_float32(moments: Moments8bit) -> tuple[Tensor, Tensor]:
    """What 8-bit moments stand for."""
    first, second = Quantized(*moments[:2]), Quantized(*moments[2:4])
    return (
        plain_dequantize_8bit(first, moments.signed, MOMENT_BLOCK, torch.float32),
        plain_dequantize_8bit(second, moments.unsigned, MOMENT_BLOCK, torch.float32),
    )


def copy_of(moments: Moments8bit) -> Moments8bit:
    """The same, apart."""
    return Moments8bit(*(tensor.clone() for tensor in moments))


class Exact(NamedTuple):
    """What a step gives in float64."""

    exp_avg: Tensor
    exp_avg_sq: Tensor
    direction: Tensor

    def weight(self, before: Tensor, now: AdamStep) -> Tensor:
        return before.double() * (1 - now.lr * now.weight_decay) - now.lr * self.direction


def exact(gradient: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, now: AdamStep) -> Exact:
    """Moments and N after a step, in float64."""
    beta1, beta2 = now.betas
    first = beta1 * exp_avg.double() + (1 - beta1) * gradient.double()
    second = beta2 * exp_avg_sq.double() + (1 - beta2) * gradient.double().square()
    corrected = first / (1 - beta1**now.step), second / (1 - beta2**now.step)
    return Exact(first, second, corrected[0] / (corrected[1].sqrt() + now.eps))


def assert_quantised(codes: Tensor, absmax: Tensor, values: Tensor, table: Tensor) -> None:
    """Whether codes are those of float64 values.

    Where two are equally near, either: moments differ in float32's last bits, a few 1e-7 of the largest of a block.
    """
    codes, absmax = codes.cpu(), absmax.cpu()
    nearest, largest = nearest_places(values.float(), table, MOMENT_BLOCK)
    torch.testing.assert_close(absmax, largest, rtol=1e-6, atol=0)
    apart = (codes.reshape(-1).int() - nearest).abs()
    assert (apart <= 1).all()
    of_each = scale_of_each(largest, MOMENT_BLOCK, values.numel())
    scaled = values.reshape(-1) / torch.where(of_each > 0, of_each, 1.0)
    middle = (table[codes.reshape(-1).int()] + table[nearest]) / 2
    assert ((scaled - middle).abs()[apart == 1] <= 1e-6).all()


@contextlib.contextmanager
def pretended_card(capability: int) -> Iterator[list[Any]]:
    """Within, launches of Triton kernels compile for a card that is not there, and run nothing.

    Args:
        capability: 89 for 8.9. Kernels compiled for it before are kept.

    Yields:
        What was compiled for each launch.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    card = mock.Mock()
    card.get_current_device.return_value = capability
    card.get_current_stream.return_value = 0
    card.get_current_target.return_value = GPUTarget("cuda", capability, 32)
    run, compiled = JITFunction.run, []

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        compiled.append(run(self, *args, grid=grid, warmup=True, **kwargs))
        return compiled[-1]

    with mock.patch.object(driver, "_active", card), mock.patch.object(JITFunction, "run", compile_only):
        yield compiled


def registers_and_stack(compiled: Any, folder: Path) -> tuple[int, int]:
    """Registers that a thread of a compiled kernel takes, and the bytes that it keeps outside them, spilled."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    found = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True)
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", found.stdout + found.stderr))
    return int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"])
