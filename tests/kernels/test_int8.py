"""Our kernels for weights in 8 bits: interpreted, compiled for cards, in plans, and where they are wrong."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from packaging.version import parse
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_galore import kernels
from hf_galore.int8 import BLOCK, Int8Blocks, Int8Weight, add_int8_, int8_linear, products, read_blocks, times_weight
from hf_galore.integrations import bitsandbytes_checks as checks
from hf_galore.kernels import int8 as own
from hf_galore.kernels import where
from tests.support.own_int8 import copy_of, plain_read, weights
from tests.support.own_kernels import pretended_card, registers_and_stack

ROOT = Path(__file__).resolve().parents[2]
CUDA = torch.device("cuda", 0)


def test_blocks_are_those_of_the_format() -> None:
    assert own._BLOCK == BLOCK


# ---- compiled for cards that are not here


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    triton = pytest.importorskip("triton")
    if triton.knobs.runtime.interpret:
        pytest.skip("Triton interprets in this process")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))


def call_all(columns: int, dtype: torch.dtype, seed: int = 2**62 + 1, first_row: int = 3, decay: float = 0.9) -> None:
    """Each kernel as a training calls it, for some rows of a weight of so many columns."""
    codes = torch.zeros(8, columns, dtype=torch.int8)
    exponents = torch.ones(8, -(-columns // BLOCK), dtype=torch.uint8)
    kernels.read_int8(codes, exponents, dtype)
    skip = torch.zeros(())
    update = torch.zeros(8, columns, dtype=dtype)
    kernels.add_int8_(codes, exponents, update, alpha=-1e-3, decay=decay, skip=skip, seed=seed, first_row=first_row)


@pytest.mark.usefixtures("_own_cache")
@pytest.mark.parametrize(
    ("capability", "columns", "dtype"),
    [(86, 4096, torch.bfloat16), (89, 11008, torch.float32), (80, 231, torch.float16), (90, 2560, torch.bfloat16)],
)
def test_they_compile_and_spill_nothing(capability: int, columns: int, dtype: torch.dtype, tmp_path: Path) -> None:
    triton = pytest.importorskip("triton")
    with pretended_card(capability) as compiled:
        call_all(columns, dtype)
    assert [kernel.name for kernel in compiled] == ["read_int8", "add_int8"]
    most = 64 if parse(triton.__version__) >= parse("3.7") else 72  # of 1,024 threads on a processor; or 896
    for kernel in compiled:
        registers, spilled = registers_and_stack(kernel, tmp_path)
        assert spilled == 0, kernel.name
        assert registers <= most, kernel.name
        ptx = kernel.asm["ptx"]
        assert f".target sm_{capability}" in ptx
        if columns % 16 == 0:  # eight codes at once, and 16 bytes of floats
            assert re.search(r"ld\.global\.v2\.b32", ptx)
            assert re.search(r"(ld|st)\.global\.v4\.b32", ptx)
        conversions = set(re.findall(r"cvt\.\w+\.(?:b?f16\w*)\.f32", ptx))
        assert all(found.startswith("cvt.rn.") for found in conversions)


@pytest.mark.usefixtures("_own_cache")
def test_what_changes_with_steps_and_tiles_compiles_nothing() -> None:
    made: dict[str, set[Any]] = {}
    for seed, row, decay in ((0, 0, 1.0), (1, 1, 0.9), (2**40 + 16, 16, 0.0), (2**63 + 5, 352, 1)):
        with pretended_card(89) as compiled:
            call_all(4096, torch.bfloat16, seed, row, decay)
            call_all(11008, torch.bfloat16, seed, row, decay)
        for kernel in compiled:
            made.setdefault(kernel.name, set()).add(kernel.hash)
    assert {name: len(hashes) for name, hashes in made.items()} == {"read_int8": 1, "add_int8": 1}


@pytest.mark.usefixtures("_own_cache")
def test_offsets_have_64_bits() -> None:
    """The output head of a 7B model has 2^27 elements, an embedding of 256,000 × 8,192 nearly 2^31."""
    with pretended_card(89) as compiled:
        call_all(4096, torch.bfloat16)
    for kernel in compiled:
        offsets = re.findall(
            r"tt\.addptr .* : tensor<[^>]*!tt\.ptr<\w+>[^,]*, tensor<[0-9x]+x(i\d+)>", kernel.asm["ttir"]
        )
        assert "i64" in offsets
        # Columns by themselves, which are added to where a row begins.
        assert offsets.count("i32") <= offsets.count("i64")


# ---- fakes


class _Made(TorchDispatchMode):
    """Floating-point tensors that operations give."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[tuple[int, ...], torch.dtype]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and out.is_floating_point() and not func.is_view:
            self.found.append((tuple(out.shape), out.dtype))
        return out


@pytest.fixture
def _card_in_mind(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fakes stand for a card with our kernels, and nothing is launched."""
    monkeypatch.setattr(where, "_look", lambda tensor: True)
    monkeypatch.setattr(where, "_programs", None)
    with FakeTensorMode():
        yield


@pytest.mark.usefixtures("_card_in_mind")
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_a_plan_sees_the_tiles_of_the_kernels_and_nothing_else(dtype: torch.dtype) -> None:
    blocks = Int8Blocks(torch.zeros(64, 96, dtype=torch.int8), torch.ones(64, 3, dtype=torch.uint8))
    with _Made() as made:
        found = read_blocks(Int8Blocks(blocks.codes[:, 32:], blocks.exponents[:, 1:]), dtype)
    assert made.found == [((64, 64), dtype)]
    assert (found.shape, found.dtype, found.is_contiguous()) == ((64, 64), dtype, True)
    x, delta = torch.zeros(5, 96, dtype=dtype), torch.zeros(5, 64, dtype=dtype)
    with _Made() as made:
        int8_linear(x, blocks, None)
        times_weight(delta, blocks)
    assert {shape for shape, _ in made.found} == {(5, 64), (32, 96), (5, 32), (5, 96), (64, 32)}
    weight, skip = Int8Weight(*blocks), torch.zeros(())
    update = torch.zeros(64, 96, dtype=dtype)
    generator = torch.Generator().manual_seed(5)
    with _Made() as made:
        add_int8_(weight, update.__getitem__, alpha=-1.0, decay=0.9, skip=skip, generator=generator)
    assert made.found == []


def test_fakes_of_a_card_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "_programs", None)
    with FakeTensorMode():
        codes = torch.empty(8, 40, dtype=torch.int8, device=CUDA)
        exponents = torch.empty(8, 2, dtype=torch.uint8, device=CUDA)
        found = kernels.read_int8(codes, exponents, torch.bfloat16)
        assert (found.shape, found.dtype, found.device) == ((8, 40), torch.bfloat16, CUDA)
        kernels.add_int8_(codes, exponents, found, alpha=1.0, decay=1.0)


# ---- what they are given


def test_what_is_written_in_place_has_its_version_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own, "launch", lambda *args, **constants: None)
    blocks = weights((40, 64))
    before = [part._version for part in blocks]
    kernels.read_int8(*blocks, torch.float32)
    assert [part._version for part in blocks] == before
    kernels.add_int8_(blocks.codes[:7], blocks.exponents[:7], torch.zeros(7, 64), alpha=1.0, decay=1.0)
    assert all(part._version > old for part, old in zip(blocks, before, strict=True))


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda c, e, u: kernels.read_int8(c, e, torch.float64), "float32, bfloat16 or float16, but are torch.float64"),
        (lambda c, e, u: kernels.read_int8(c.float(), e, torch.float32), "rows of int8, each contiguous"),
        (lambda c, e, u: kernels.read_int8(c.mT, e, torch.float32), "rows of int8, each contiguous"),
        (lambda c, e, u: kernels.read_int8(c, e[:, :1], torch.float32), r"\(8, 2\) uint8 on cpu"),
        (lambda c, e, u: kernels.read_int8(c, e.char(), torch.float32), r"\(8, 2\) uint8 on cpu"),
        (lambda c, e, u: kernels.read_int8(c, e.mT.contiguous().mT, torch.float32), "in contiguous rows"),
        (lambda c, e, u: kernels.read_int8(c, e.to("meta"), torch.float32), "but are .* on meta"),
        (lambda c, e, u: kernels.add_int8_(c, e, u[:, :-1], alpha=1, decay=1), r"matrix, \(8, 40\), on cpu"),
        (lambda c, e, u: kernels.add_int8_(c, e, u.double(), alpha=1, decay=1), "bfloat16 or float16, but is"),
        (lambda c, e, u: kernels.add_int8_(c, e, u.to("meta"), alpha=1, decay=1), "on meta"),
        (lambda c, e, u: kernels.add_int8_(c, e, u, alpha=1, decay=1, skip=u), "skip has to be one number"),
        (
            lambda c, e, u: kernels.add_int8_(c.view(2, 4, 40), e.view(2, 4, 2), u.view(2, 4, 40), alpha=1, decay=1),
            "a matrix",
        ),
    ],
)
def test_what_a_kernel_cannot_take_is_refused_in_words(call: Callable[..., Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(torch.zeros(8, 40, dtype=torch.int8), torch.ones(8, 2, dtype=torch.uint8), torch.zeros(8, 40))


# ---- where they are wrong, or fail


@pytest.mark.parametrize("fault", ["fails", "is wrong"])
def test_plain_torch_takes_over_and_one_warning_says_so(
    fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def launch(*args: Any, **constants: Any) -> None:
        if fault == "fails":
            raise RuntimeError("ptxas is not there")

    monkeypatch.setattr(where, "_look", lambda tensor: True)
    monkeypatch.setattr(checks, "_verdicts", {})
    monkeypatch.setattr(checks, "_warned", set())
    monkeypatch.setattr(own, "launch", launch)
    blocks, update = weights((20, 70)), 1e-2 * torch.randn(20, 70)
    for _ in range(2):
        assert torch.equal(read_blocks(blocks, torch.float32), plain_read(blocks, torch.float32))
        ours, plain = (Int8Weight(*copy_of(blocks), torch.float32) for _ in range(2))
        add_int8_(ours, update.__getitem__, alpha=1.0, decay=0.9)
        with monkeypatch.context() as patch:
            patch.setattr(where, "_look", lambda tensor: False)
            add_int8_(plain, update.__getitem__, alpha=1.0, decay=0.9)
        assert torch.equal(ours.codes, plain.codes)
        assert torch.equal(ours.exponents, plain.exponents)
    messages = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(messages) == 2
    for name, message in zip(("read_int8", "add_int8_"), messages, strict=True):
        for part in (name, "hf_galore (Triton", "float32", "plain torch is used instead"):
            assert part in message
        assert "ptxas is not there" in message or fault == "is wrong"


def test_weights_in_float64_are_left_to_plain_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "_look", lambda tensor: True)
    monkeypatch.setattr(own, "launch", None)
    monkeypatch.setattr(products, "TILE_ELEMENTS", 700)
    blocks, update = weights((20, 70)), 1e-2 * torch.randn(20, 70)
    weight = Int8Weight(*copy_of(blocks), torch.float64)
    add_int8_(weight, update.__getitem__, alpha=1.0, decay=0.9)
    exact = 0.9 * plain_read(blocks, torch.float64) + update.double()
    assert torch.equal(weight.dequantized(), Int8Weight.from_float(exact).dequantized())
