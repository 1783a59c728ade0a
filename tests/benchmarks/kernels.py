"""Our Triton kernels on a card, beside bitsandbytes' and a plain copy of as many bytes.

    python -m tests.benchmarks.kernels                       # low-rank gradients of a 7B model, rank 1024
    python -m tests.benchmarks.kernels --elements 4194304

A kernel is as fast as the card's memory where its share of a copy's rate is near 1. Times are medians, by events.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from hf_galore import kernels
from hf_galore.integrations import bitsandbytes_calls as calls
from hf_galore.lowrank.blockwise import Moments8bit, Quantized
from tests.support.own_kernels import LATER

ROUNDS = 50


def microseconds(function: Callable[[], object]) -> float:
    """The median time of a call on the card, after some calls that compile and warm up."""
    for _ in range(5):
        function()
    times: list[float] = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3)
    return statistics.median(times)


def copy_rate(size: int) -> float:
    """Bytes a microsecond that a copy reads and writes, of so many in all."""
    source = torch.zeros(size // 2, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return size / microseconds(lambda: target.copy_(source))


def cases(numel: int) -> dict[str, tuple[Callable[[], object], Callable[[], object], float]]:
    """Ours, bitsandbytes', and the bytes for an element that have to be read and written."""
    gradient = torch.randn(numel, device="cuda", dtype=torch.bfloat16)
    values, norm = gradient.float(), gradient.float().norm()
    tables = [table.cuda() for table in calls.dynamic_tables()]
    first, second = (kernels.quantize_8bit(v, t, 256) for v, t in zip((values, values.square()), tables, strict=True))
    moments, in_32 = Moments8bit(*first, *second, *tables), (values.clone(), values.square())
    in_4 = kernels.quantize_4bit(values, 64)
    narrow = Quantized(in_4.codes, in_4.absmax.to(torch.bfloat16))
    weight, now = gradient.clone(), LATER._replace(lr=-1.0, weight_decay=0.0)

    def theirs() -> Tensor:
        direction = torch.zeros_like(gradient)
        calls.adam_8bit_(direction, gradient, moments, now)
        return direction

    def theirs_in_32() -> Tensor:
        direction = torch.zeros_like(gradient)
        calls.adam_32bit_(direction, gradient, in_32[0], in_32[1], now)
        return direction

    bf16 = torch.bfloat16
    return {
        "adam_8bit_direction": (lambda: kernels.adam_8bit_direction(gradient, moments, LATER, norm), theirs, 8),
        "adam_8bit_": (
            lambda: kernels.adam_8bit_(weight, gradient, moments, LATER, norm),
            lambda: calls.adam_8bit_(weight, gradient, moments, LATER),
            10,
        ),
        "adam_32bit_direction": (
            lambda: kernels.adam_32bit_direction(gradient, in_32[0], in_32[1], LATER, norm),
            theirs_in_32,
            20,
        ),
        "dequantize_4bit": (
            lambda: kernels.dequantize_4bit(narrow, 64, (numel,), bf16),
            lambda: calls.dequantize_4bit(narrow, 64, (numel,), bf16),
            2.53,
        ),
        "dequantize_8bit": (
            lambda: kernels.dequantize_8bit(first, tables[0], 256, bf16),
            lambda: calls.dequantize_8bit(first, tables[0], 256, bf16),
            3,
        ),
        "quantize_4bit": (lambda: kernels.quantize_4bit(values, 64), lambda: calls.quantize_4bit(values, 64), 4.5),
        "quantize_8bit": (
            lambda: kernels.quantize_8bit(values, tables[0], 256),
            lambda: calls.quantize_8bit(values, tables[0], 256),
            5,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, nargs="+", default=[4096 * 1024, 11008 * 1024])
    sizes = parser.parse_args().elements
    if not (torch.cuda.is_available() and kernels.serves(torch.zeros(1, device="cuda"))):
        raise SystemExit("This needs an NVIDIA card and Triton.")
    console = Console()
    for numel in sizes:
        table = Table("kernel", "µs", "of a copy's rate", "bitsandbytes µs", title=f"{numel:,} elements")
        for name, (ours, theirs, size) in cases(numel).items():
            time = microseconds(ours)
            share = size * numel / time / copy_rate(round(size * numel))
            table.add_row(name, f"{time:.0f}", f"{share:.2f}", f"{microseconds(theirs):.0f}")
        console.print(torch.cuda.get_device_name(), f"torch {torch.__version__}, Triton {kernels.triton_version()}")
        console.print(table)


if __name__ == "__main__":
    main()
