"""Where our kernels serve, what they are given, and what plans get: all that needs neither a card nor Triton."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_galore import kernels
from hf_galore.kernels import where
from hf_galore.lowrank.blockwise import Moments8bit, Quantized
from tests.support.own_kernels import LATER, moments_8bit

CUDA = torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _nothing_known() -> Any:
    where._serves_device.cache_clear()
    yield
    where._serves_device.cache_clear()


def of_a_card(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """A fake tensor on a card."""
    return torch.empty(shape, dtype=dtype, device=CUDA)


def fake_moments(numel: int) -> Moments8bit:
    """Fake moments on a card."""
    blocks = -(-numel // 256)
    parts = [((numel,), torch.uint8), ((blocks,), torch.float32)] * 2 + [((256,), torch.float32)] * 2
    return Moments8bit(*(of_a_card(shape, dtype) for shape, dtype in parts))


def test_they_serve_nothing_on_a_cpu() -> None:
    assert not kernels.serves(torch.zeros(1))
    assert not kernels.serves(torch.zeros(1, device="meta"))


@pytest.mark.parametrize(
    ("capability", "triton", "hip", "expected"),
    [
        ((8, 9), True, None, True),
        ((7, 0), True, None, True),
        ((6, 1), True, None, False),
        ((8, 9), False, None, False),
        ((9, 4), True, "7.0", False),
    ],
)
def test_they_serve_on_cards_with_triton(
    capability: tuple[int, int], triton: bool, hip: str | None, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object() if name == "triton" and triton else None)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert where._serves_device(CUDA) == expected


@pytest.mark.parametrize(("system", "expected"), [("linux", True), ("win32", False), ("darwin", False)])
def test_fakes_of_a_card_are_served_where_triton_can_be_installed(
    system: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    with FakeTensorMode():
        assert kernels.serves(of_a_card((3,), torch.float32)) == expected
        assert not kernels.serves(torch.empty(3))


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_fakes_get_shapes_and_are_left_alone(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "_programs", None)  # nothing is launched
    with FakeTensorMode():
        gradient, norm = of_a_card((7, 39), dtype), of_a_card((), torch.float32)
        moments, in_32 = fake_moments(273), [of_a_card((7, 39), torch.float32) for _ in range(2)]
        for found in (
            kernels.adam_8bit_direction(gradient, moments, LATER, norm),
            kernels.adam_32bit_direction(gradient, in_32[0], in_32[1], LATER, norm),
        ):
            assert (found.shape, found.dtype, found.device) == ((7, 39), dtype, CUDA)
        weight = of_a_card((7, 39), torch.bfloat16)
        kernels.adam_8bit_(weight, gradient, moments, LATER, norm)
        kernels.adam_32bit_(weight, gradient, in_32[0], in_32[1], LATER, norm)
        codes, absmax = kernels.quantize_4bit(gradient, 64)
        assert (codes.shape, codes.dtype, absmax.shape, absmax.dtype) == ((137, 1), torch.uint8, (5,), torch.float32)
        found = kernels.dequantize_4bit(Quantized(codes, absmax.to(torch.bfloat16)), 64, (7, 39), dtype)
        assert (found.shape, found.dtype, found.device) == ((7, 39), dtype, CUDA)
        table = of_a_card((256,), torch.float32)
        codes, absmax = kernels.quantize_8bit(gradient, table, 256)
        assert (codes.shape, codes.dtype, absmax.shape, absmax.dtype) == ((7, 39), torch.uint8, (2,), torch.float32)
        found = kernels.dequantize_8bit(Quantized(codes, absmax), table, 256, dtype)
        assert (found.shape, found.dtype, found.device) == ((7, 39), dtype, CUDA)


@pytest.fixture
def _no_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_galore.kernels import adam, blockwise

    for module in (adam, blockwise):
        monkeypatch.setattr(module, "launch", lambda *args, **constants: None)


@pytest.mark.usefixtures("_no_launch")
def test_what_is_written_in_place_has_its_version_raised() -> None:
    """A backward pass that needs what was there before is an error, not a wrong gradient."""
    weight, gradient, norm = torch.zeros(300), torch.zeros(300), torch.zeros(())
    moments, in_32 = moments_8bit((300,)), (torch.zeros(300), torch.zeros(300))
    written = (*moments[:4], *in_32)

    def versions() -> list[int]:
        return [tensor._version for tensor in (weight, *written)]

    before = versions()
    kernels.adam_8bit_direction(gradient, moments, LATER, norm)
    kernels.adam_32bit_direction(gradient, *in_32, LATER, norm)
    after = versions()
    assert after[0] == before[0]
    assert all(new > old for new, old in zip(after[1:], before[1:], strict=True))
    kernels.adam_8bit_(weight, gradient, moments, LATER, norm)
    between = versions()
    kernels.adam_32bit_(weight, gradient, *in_32, LATER, norm)
    assert between[0] > after[0]
    assert weight._version > between[0]
    assert all(new > old for new, old in zip(versions()[1:], after[1:], strict=True))
    assert gradient._version == 0


STRIDED = torch.zeros(20, 15).mT


@pytest.mark.usefixtures("_no_launch")
@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda g, m, n: kernels.adam_8bit_direction(g.double(), m, LATER, n), "float32, bfloat16 or float16"),
        (lambda g, m, n: kernels.adam_8bit_direction(g[:-1], m, LATER, n), "299 contiguous elements"),
        (lambda g, m, n: kernels.adam_8bit_direction(g, m, LATER, g), "one floating-point number"),
        (lambda g, m, n: kernels.adam_8bit_direction(g, m, LATER, n.long()), "one floating-point number"),
        (lambda g, m, n: kernels.adam_8bit_direction(g, m, LATER, n.to("meta")), "one floating-point number on cpu"),
        (
            lambda g, m, n: kernels.adam_8bit_direction(g, m._replace(exp_avg=m.exp_avg.float()), LATER, n),
            "A moment: has to be 300 contiguous elements of torch.uint8",
        ),
        (
            lambda g, m, n: kernels.adam_8bit_direction(g, m._replace(exp_avg_absmax=n), LATER, n),
            "scales: has to be 2 contiguous",
        ),
        (
            lambda g, m, n: kernels.adam_8bit_direction(g, m._replace(signed=m.signed.to("meta")), LATER, n),
            "tables: has to be 256",
        ),
        (lambda g, m, n: kernels.adam_8bit_(STRIDED, g, m, LATER, n), "The weight: has to be 300 contiguous"),
        (lambda g, m, n: kernels.adam_32bit_(g, g, STRIDED, g, LATER, n), "A moment: has to be 300 contiguous"),
        (lambda g, m, n: kernels.adam_32bit_(g, g, g.bfloat16(), g, LATER, n), "of torch.float32 on cpu, but is"),
        (lambda g, m, n: kernels.quantize_4bit(g, 48), "power of two from 2 to 1024, but is 48"),
        (lambda g, m, n: kernels.quantize_4bit(g.double(), 64), "float32, bfloat16 or float16, but are torch.float64"),
        (
            lambda g, m, n: kernels.dequantize_4bit(kernels.quantize_4bit(g, 64), 64, (301,), g.dtype),
            "151 contiguous bytes, but are 150",
        ),
        (
            lambda g, m, n: kernels.dequantize_4bit(kernels.quantize_4bit(g, 64), 32, (300,), g.dtype),
            "10 contiguous floating-point numbers, but are 5",
        ),
        (
            lambda g, m, n: kernels.quantize_8bit(g, m.signed[:16], 256),
            "256 contiguous float32 values on cpu, but is 16",
        ),
    ],
)
def test_what_a_kernel_cannot_take_is_refused_in_words(call: Callable[..., Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(torch.zeros(300), moments_8bit((300,)), torch.zeros(()))


def test_importing_them_imports_no_triton() -> None:
    code = "import sys, hf_galore.kernels as k; assert 'hf_galore.kernels.programs' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
