"""Our kernels compiled for cards that are not here: that they compile, keep in registers, and are not compiled anew."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import parse

from hf_galore import kernels
from hf_galore.integrations import bitsandbytes_calls as calls
from hf_galore.kernels import where
from hf_galore.lowrank.blockwise import AdamStep, Quantized
from tests.support.own_kernels import LATER, moments_8bit, moments_32bit, pretended_card, registers_and_stack

triton = pytest.importorskip("triton")
if triton.knobs.runtime.interpret:
    pytest.skip("Triton interprets in this process", allow_module_level=True)

NAMES = ("adam_8bit", "adam_32bit", "quantize_4bit", "dequantize_4bit", "quantize_8bit", "dequantize_8bit")
WHOLE, ODD = 4096, 231
# So that 1,024 threads have room on a processor; of a kernel that Triton 3.6 makes (torch 2.11's), 896.
MOST_REGISTERS = 64 if parse(triton.__version__) >= parse("3.7") else 72


@pytest.fixture(autouse=True, scope="module")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def call_all(numel: int, dtype: torch.dtype, weight_dtype: torch.dtype, now: AdamStep = LATER) -> None:
    """Each kernel as it is called for a tensor of so many elements."""
    gradient, weight = torch.zeros(numel, dtype=dtype), torch.zeros(numel, dtype=weight_dtype)
    norm, moments, in_32 = torch.zeros(()), moments_8bit((numel,), zero=True), moments_32bit((numel,), zero=True)
    kernels.adam_8bit_direction(gradient, moments, now, norm)
    kernels.adam_8bit_(weight, gradient, moments, now, norm)
    kernels.adam_32bit_direction(gradient, *in_32, now, norm)
    kernels.adam_32bit_(weight, gradient, *in_32, now, norm)
    codes, absmax = kernels.quantize_4bit(in_32[0], 64)
    kernels.dequantize_4bit(Quantized(codes, absmax.to(torch.bfloat16)), 64, (numel,), dtype)
    table = calls.linear_table()
    kept = kernels.quantize_8bit(in_32[0], table, 256)
    kernels.dequantize_8bit(kept, table, 256, dtype)


@pytest.mark.parametrize(
    ("capability", "numel", "dtype", "weight_dtype"),
    [
        (80, WHOLE, torch.bfloat16, torch.bfloat16),
        (86, WHOLE, torch.float32, torch.bfloat16),
        (89, WHOLE, torch.bfloat16, torch.bfloat16),
        (89, 1, torch.float16, torch.float16),
        (90, ODD, torch.bfloat16, torch.float32),
    ],
)
def test_kernels_compile_and_spill_nothing(
    capability: int, numel: int, dtype: torch.dtype, weight_dtype: torch.dtype, tmp_path: Path
) -> None:
    with pretended_card(capability) as compiled:
        call_all(numel, dtype, weight_dtype)
    assert {kernel.name for kernel in compiled} == set(NAMES)
    for kernel in compiled:
        registers, spilled = registers_and_stack(kernel, tmp_path)
        assert spilled == 0, kernel.name
        assert registers <= MOST_REGISTERS, kernel.name
        assert f".target sm_{capability}" in kernel.asm["ptx"]


def test_16_bytes_are_read_and_written_at_once() -> None:
    """Else a card's memory is not used up: a thread reads eight bfloat16, and eight codes of each moment."""
    with pretended_card(89) as compiled:
        call_all(WHOLE, torch.bfloat16, torch.bfloat16)
    for kernel in compiled:
        if kernel.name in ("adam_8bit", "adam_32bit", "dequantize_4bit", "dequantize_8bit"):
            assert re.search(r"st\.global\.v4\.b32", kernel.asm["ptx"]), kernel.name
        if kernel.name == "adam_8bit":
            assert len(re.findall(r"ld\.global\.v2\.b32", kernel.asm["ptx"])) == 2
            assert re.search(r"ld\.global\.v4\.b32", kernel.asm["ptx"])


def test_bfloat16_is_rounded_to_the_nearest() -> None:
    """The interpreter cuts off, so only this shows it."""
    with pretended_card(89) as compiled:
        call_all(WHOLE, torch.bfloat16, torch.bfloat16)
    for kernel in compiled:
        if not kernel.name.startswith("quantize"):
            conversions = set(re.findall(r"cvt\.\w+\.bf16(?:x2)?\.f32", kernel.asm["ptx"]))
            assert conversions
            assert conversions <= {"cvt.rn.bf16.f32", "cvt.rn.bf16x2.f32"}


def test_numbers_that_change_each_step_compile_nothing() -> None:
    steps = [
        AdamStep(step=1, betas=(0.9, 0.999), eps=1e-8, lr=1.0, weight_decay=0.0),
        AdamStep(step=2, betas=(0.9, 0.999), eps=1e-8, lr=0.0, weight_decay=0.1),
        AdamStep(step=16, betas=(0.9, 0.999), eps=1e-8, lr=16, weight_decay=1),
        AdamStep(step=10**6, betas=(0, 0.95), eps=1, lr=1e-5, weight_decay=0),
    ]
    made: dict[str, set[Any]] = {}
    for now in steps:
        with pretended_card(89) as compiled:
            call_all(WHOLE, torch.bfloat16, torch.bfloat16, now)
        for kernel in compiled:
            made.setdefault(kernel.name, set()).add(kernel.hash)
    # A direction and a weight are one kernel each.
    assert {name: len(hashes) for name, hashes in made.items()} == {name: 2 if "adam" in name else 1 for name in NAMES}
    # Another number of elements, as far from a multiple of 16, is no other kernel either.
    with pretended_card(89) as compiled:
        call_all(WHOLE + 32, torch.bfloat16, torch.bfloat16)
    assert {kernel.hash for kernel in compiled} <= set.union(*made.values())


def test_tensors_of_more_than_2_to_the_31_elements_have_offsets_of_64_bits() -> None:
    """An embedding of 256,000 × 8,192 has nearly as many."""
    codes, values, table = torch.zeros(64, dtype=torch.uint8), torch.zeros(64), torch.zeros(256)
    numel = 2**31 + 64
    with pretended_card(89) as compiled:
        where.launch("dequantize_8bit", 1, values, codes, values, table, numel, block=256, rows=4)
    (kernel,) = compiled
    assert "%numel: i64" in kernel.asm["ttir"]
    offsets = re.findall(r"tt\.addptr .* : tensor<[^>]*!tt\.ptr<\w+>[^,]*, tensor<[0-9x]+x(i\d+)>", kernel.asm["ttir"])
    assert offsets.count("i64") == 3  # the table's are places in it
    assert offsets.count("i32") == 1
