"""bitsandbytes' kernels against plain torch, and what happens where one of them is wrong."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import pytest
import torch
from bitsandbytes import functional
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.integrations import bitsandbytes as kernels
from hf_galore.integrations import bitsandbytes_calls as calls
from hf_galore.integrations import bitsandbytes_checks as checks
from hf_galore.integrations.bitsandbytes import DTYPES, AdamStep, Moments8bit, Quantized
from hf_galore.lowrank.quantize import _equal_steps, dequantize_basis, quantize_basis
from hf_galore.plan.fakes import fake_training
from hf_galore.plan.tracking import StorageTracker
from hf_galore.rules.adam_8bit import codebooks
from tests.support.helpers import assert_identical, snapshot

pytestmark = pytest.mark.arithmetic

CPU = torch.device("cpu")
MOMENTS = ("exp_avg", "exp_avg_sq")
NAMES = tuple(checks.CHECKS)
ADAM = ("optimizer_update_8bit_blockwise", "optimizer_update_32bit")
# What bitsandbytes is given in float32 only: bases are made in float32, and moments are.
FROM_FLOAT32 = ("quantize_4bit", "quantize_blockwise")
NOW = AdamStep(step=3, betas=(0.9, 0.99), eps=1e-8, lr=1e-2, weight_decay=0.1)


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch: pytest.MonkeyPatch) -> None:
    """As at the start of a process."""
    monkeypatch.setattr(checks, "_verdicts", {})
    monkeypatch.setattr(checks, "_warned", set())


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class TorchFunctionCalls(TorchFunctionMode):
    """The names of torch's functions that are called within."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(func, "__name__", str(func)))
        return func(*args, **(kwargs or {}))


def owner_of(name: str) -> Any:
    """Where a kernel is called: one of them as an operation of torch, which cannot be replaced."""
    return calls if name == "quantize_4bit" else functional


def dtypes_of(name: str) -> tuple[torch.dtype, ...]:
    return (torch.float32,) if name in FROM_FLOAT32 else DTYPES


# ---- what we rely on

# The keywords that `bitsandbytes_calls` gives each function.
KEYWORDS = {
    "dequantize_4bit": set(),
    "quantize_blockwise": {"code", "blocksize"},
    "dequantize_blockwise": set(),
    "optimizer_update_8bit_blockwise": {
        *("optimizer_name", "g", "p", "state1", "state2", "beta1", "beta2", "beta3", "alpha", "eps", "step", "lr"),
        *("qmap1", "qmap2", "absmax1", "absmax2", "weight_decay", "gnorm_scale", "skip_zeros"),
    },
    "optimizer_update_32bit": {
        *("optimizer_name", "g", "p", "state1", "beta1", "eps", "step", "lr", "state2", "beta2", "weight_decay"),
        *("gnorm_scale", "unorm_vec", "max_unorm", "skip_zeros"),
    },
    "QuantState": {"absmax", "shape", "blocksize", "quant_type", "dtype", "code"},
    "create_linear_map": set(),
    "create_dynamic_map": {"signed"},
}


@pytest.mark.parametrize("name", KEYWORDS)
def test_bitsandbytes_is_as_we_need_it(name: str) -> None:
    """Fails first, and by name, when a new bitsandbytes moves something."""
    function = getattr(functional, name, None)
    assert function is not None, f"bitsandbytes.functional.{name} is gone"
    signature = inspect.signature(function)
    missing = KEYWORDS[name] - set(signature.parameters)
    assert not missing, f"bitsandbytes.functional.{name}{signature} takes no {sorted(missing)}"
    given = KEYWORDS[name] | ({"A", "quant_state"} if name in ("dequantize_4bit", "dequantize_blockwise") else set())
    given |= {"A"} if name in FROM_FLOAT32 else set()
    needed = {key for key, value in signature.parameters.items() if value.default is inspect.Parameter.empty}
    assert needed <= given, f"bitsandbytes.functional.{name}{signature} needs {sorted(needed - given)}"


def test_kernels_that_are_checked_are_those_that_are_called() -> None:
    tables = {"QuantState", "create_linear_map", "create_dynamic_map"}
    assert set(NAMES) == (set(KEYWORDS) | {"quantize_4bit"}) - tables


def test_the_operation_of_bitsandbytes_is_as_we_need_it() -> None:
    found = str(torch.ops.bitsandbytes.quantize_4bit.default._schema)
    expected = "quantize_4bit(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)"
    assert found.endswith(expected), f"The operation is now {found}."


def test_quantising_a_basis_copies_nothing_from_the_host() -> None:
    """On a GPU that copy waits: a refresh waited twice. (The table of NormalFloat4 is made from a list.)"""
    values = torch.randn(64, 8)
    with TorchFunctionCalls() as calls_made:
        calls.quantize_4bit(values, 64)
    assert not {"tensor", "as_tensor"} & set(calls_made.names)
    with TorchFunctionCalls() as calls_made:
        functional.quantize_4bit(values, blocksize=64, quant_type="nf4")
    assert {"tensor", "as_tensor"} & set(calls_made.names), "bitsandbytes no longer does: call its own function again"


@pytest.mark.parametrize("table", [calls.linear_table(), *calls.dynamic_tables()])
def test_tables_are_256_ascending_values_up_to_1(table: Tensor) -> None:
    assert (table.dtype, table.shape, table[-1].item()) == (torch.float32, (256,), 1.0)
    assert bool((table.diff() >= 0).all())
    # That of equal steps has one for 0 and one next to it, which some processors round to 0.
    assert len(table.unique()) >= 255


# ---- on a GPU, in the order of the current stream

WRITING: dict[str, Callable[[Tensor], Any]] = {
    "quantize_4bit": lambda used: calls.quantize_4bit(used, 64),
    "quantize_8bit": lambda used: calls.quantize_8bit(used, used, 256),
    "adam_8bit_": lambda used: calls.adam_8bit_(used, used, Moments8bit(*[used] * 6), NOW),
    "adam_32bit_": lambda used: calls.adam_32bit_(used, used, used, used, NOW),
}


class Streams:
    """What happens on a pretended card, in order; a tensor on it is `used`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, current: str) -> None:
        self.order: list[str] = []
        self.used = mock.Mock(spec=Tensor, device=torch.device("cuda", 0))
        streams = {name: mock.Mock() for name in ("default", "current")}
        for name, stream in streams.items():
            stream.wait_stream.side_effect = lambda other, name=name: self.order.append(
                f"{name} waits for {next(key for key, value in streams.items() if value is other)}"
            )
        monkeypatch.setattr(torch.cuda, "default_stream", lambda device: streams["default"])
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[current])
        monkeypatch.setattr(calls, "increment_version", lambda tensors: None)
        library = mock.Mock()
        library.quantize_blockwise.side_effect = self.kernel
        library.optimizer_update_8bit_blockwise.side_effect = self.kernel
        library.optimizer_update_32bit.side_effect = self.kernel
        monkeypatch.setattr(calls, "functional", lambda: library)
        monkeypatch.setattr(torch, "ops", mock.Mock(**{"bitsandbytes.quantize_4bit.side_effect": self.kernel}))
        self.fails = False

    def kernel(self, *args: Any, **kwargs: Any) -> Any:
        self.order.append("kernel")
        if self.fails:
            raise RuntimeError("out of order")
        return mock.Mock(), mock.Mock()


@pytest.mark.parametrize("name", WRITING)
def test_kernels_on_the_default_stream_are_ordered_with_another(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By events, which the host does not wait for: else they read what has not been written yet."""
    card = Streams(monkeypatch, "current")
    WRITING[name](card.used)
    assert card.order == ["default waits for current", "kernel", "current waits for default"]


@pytest.mark.parametrize("name", WRITING)
def test_a_kernel_that_fails_leaves_the_streams_in_order(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Streams(monkeypatch, "current")
    card.fails = True
    with pytest.raises(RuntimeError, match="out of order"):
        WRITING[name](card.used)
    assert card.order[-1] == "current waits for default"


@pytest.mark.parametrize("name", WRITING)
def test_on_the_default_stream_nothing_waits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    card = Streams(monkeypatch, "default")
    WRITING[name](card.used)
    assert card.order == ["kernel"]


# ---- plain torch is what the kernels compute


@pytest.mark.parametrize("numel", [1, 2, 63, 64, 65, 255, 257, 1000, 5001])
def test_plain_4_bits_are_bitsandbytes(numel: int) -> None:
    values = torch.randn(numel)
    kept, plain = calls.quantize_4bit(values, 64), kernels.plain_quantize_4bit(values, 64)
    assert kept.codes.shape == plain.codes.shape
    assert torch.equal(kept.absmax, plain.absmax)
    # Each half byte apart: an element in the middle between two values, by rounding, may get either.
    for found, expected in ((kept.codes >> 4, plain.codes >> 4), (kept.codes & 15, plain.codes & 15)):
        apart = (found.int() - expected.int()).abs()
        assert apart.max() <= 1
        assert apart.sum() <= max(1, numel // 1000)
    for dtype in DTYPES:
        expected = kernels.plain_dequantize_4bit(kept, 64, (numel,), dtype)
        assert torch.equal(calls.dequantize_4bit(kept, 64, (numel,), dtype), expected)


@pytest.mark.parametrize("numel", [1, 2, 255, 256, 257, 1000, 5001])
@pytest.mark.parametrize("kind", ["basis", "exp_avg", "exp_avg_sq"])
def test_plain_8_bits_are_bitsandbytes(kind: str, numel: int) -> None:
    table = {"basis": _equal_steps(CPU), **dict(zip(MOMENTS, codebooks(CPU), strict=True))}[kind]
    values = torch.randn(numel)
    if kind == "exp_avg_sq":
        values = values.square()
    kept, plain = (use(values, table, 256) for use in (calls.quantize_8bit, kernels.plain_quantize_8bit))
    assert torch.equal(kept.absmax, plain.absmax)
    # The CPU's kernel looks codes up by 16 bits of an element: so near to the middle it may get the farther of two, and
    # near 0, where the dynamic codes' steps are finer than that, one some codes away.
    scaled = values / plain.absmax.repeat_interleave(256)[:numel]
    distance, least = ((table[codes.int()] - scaled).abs() for codes in (kept.codes, plain.codes))
    assert (distance - least).max() <= 2**-15
    apart = (kept.codes.int() - plain.codes.int()).abs()[scaled.abs() > 0.01]
    assert apart.max() <= 1
    assert apart.sum() <= max(1, numel // 100)
    for dtype in DTYPES:
        expected = kernels.plain_dequantize_8bit(kept, table, 256, dtype)
        assert torch.equal(calls.dequantize_8bit(kept, table, 256, dtype), expected)


def moments_8bit(exp_avg: Tensor, exp_avg_sq: Tensor) -> Moments8bit:
    signed, unsigned = codebooks(CPU)
    first, second = (
        kernels.plain_quantize_8bit(exp_avg, signed, 256),
        kernels.plain_quantize_8bit(exp_avg_sq, unsigned, 256),
    )
    return Moments8bit(*first, *second, signed, unsigned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1,), (33, 7), (70, 96)])
def test_plain_adam_is_bitsandbytes(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight, gradient = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    exp_avg, exp_avg_sq = torch.randn(shape), torch.rand(shape) + 0.1
    rounding = 1.01 * torch.finfo(dtype).eps  # the last bit of a weight, where the order of float32 operations shows
    found, expected = weight.clone(), weight.clone()
    calls.adam_32bit_(found, gradient, exp_avg.clone(), exp_avg_sq.clone(), NOW)
    kernels.plain_adam_(expected, gradient, exp_avg.clone(), exp_avg_sq.clone(), NOW)
    torch.testing.assert_close(found, expected, rtol=max(rounding, 1e-6), atol=1e-7)
    found, expected = weight.clone(), weight.clone()
    theirs, plain = moments_8bit(exp_avg, exp_avg_sq), moments_8bit(exp_avg, exp_avg_sq)
    calls.adam_8bit_(found, gradient, theirs, NOW)
    kernels.plain_adam_8bit_(expected, gradient, plain, NOW)
    torch.testing.assert_close(found, expected, rtol=max(rounding, 1e-6), atol=1e-7)
    torch.testing.assert_close(theirs.exp_avg_absmax, plain.exp_avg_absmax)
    torch.testing.assert_close(theirs.exp_avg_sq_absmax, plain.exp_avg_sq_absmax)
    for codes, others in ((theirs.exp_avg, plain.exp_avg), (theirs.exp_avg_sq, plain.exp_avg_sq)):
        assert (codes != others).sum() <= max(1, codes.numel() // 100)  # ties: moments differ in their last bit


def test_plain_adam_decays_in_one_rounding_with_the_update() -> None:
    """In bfloat16 1 − ηλ = 1 − 10⁻³ alone would change nothing: half a step of a weight of 1 is 2⁻⁹."""
    weight = torch.ones(1000, dtype=torch.bfloat16)
    now = AdamStep(step=1, betas=(0.9, 0.999), eps=1e-8, lr=1.5e-3, weight_decay=0.5)
    kernels.plain_adam_(weight, torch.ones_like(weight), torch.zeros(1000), torch.zeros(1000), now)
    assert torch.equal(weight, torch.full_like(weight, 1 - 2**-8))  # of 1 − 0.00075 − 0.0015


@pytest.mark.parametrize("rows", [512, 2048])
@pytest.mark.parametrize("rank", [16, 32, 48, 80, 96, 112, 160, 288])
def test_a_basis_of_any_rank_comes_back(rank: int, rows: int) -> None:
    """bitsandbytes 0.50.2 gives these back 0.15 to 0.43 off as matrices, on CPUs with AVX-512."""
    basis = torch.linalg.qr(torch.randn(rows, rank))[0]
    kept = quantize_basis(basis, 4, torch.float32)
    for dtype in DTYPES:
        found = dequantize_basis(kept, basis.shape, 4, dtype)
        assert (found.float() - basis).norm() / basis.norm() < 0.101


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    "shape", [(1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (5, 13), (1, 65), (65, 1), (257, 1), (9, 96)]
)
def test_any_shape_is_kept(
    shape: tuple[int, int], bits: Any, dtype: torch.dtype, plain: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if plain:
        monkeypatch.setattr(checks, "is_right", lambda *args: False)
    basis = torch.randn(shape)
    found = dequantize_basis(quantize_basis(basis, bits, dtype), shape, bits, dtype)
    assert (found.shape, found.dtype) == (shape, dtype)
    assert found.is_contiguous()
    # Half the widest step, 0.152 of NormalFloat4's values and 1/254 of equal ones; and what bfloat16 rounds off, of a
    # scale too.
    assert (found - basis).abs().max() <= {4: 0.16, 8: 0.01}[bits] * basis.abs().max()
    largest = basis.abs().argmax()
    assert found.view(-1)[largest].sign() == basis.view(-1)[largest].sign()


# ---- a kernel that is wrong


def wrong(name: str, only: torch.dtype | None = None) -> Callable[..., Any]:
    """The kernel, with a result that is off by a little; or only in one dtype."""
    original = getattr(owner_of(name), name)

    def broken(*args: Any, **kwargs: Any) -> Any:
        if name in ADAM:
            if only in (None, kwargs["p"].dtype):
                kwargs["lr"] *= 1.05
            return original(*args, **kwargs)
        out = original(*args, **kwargs)
        if isinstance(out, Tensor):
            if only in (None, out.dtype):
                out.view(-1)[-1] += 0.05
        else:
            codes = out[0].view(-1)
            codes[0] = codes[0] ^ 0x60  # two to six values further
        return out

    return broken


@pytest.mark.parametrize("name", NAMES)
def test_right_kernels_are_used_and_nothing_is_said(name: str, caplog: pytest.LogCaptureFixture) -> None:
    for dtype in DTYPES:
        assert checks.is_right(name, torch.zeros(1), dtype)
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_kernel_is_named_once(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(owner_of(name), name, wrong(name))
    for dtype in dtypes_of(name):
        caplog.clear()
        assert [checks.is_right(name, torch.zeros(1), dtype) for _ in range(3)] == [False] * 3
        (message,) = warnings_in(caplog)
        for part in (name, "CPU", str(dtype).removeprefix("torch."), "bitsandbytes 0.", "plain torch is used instead"):
            assert part in message


@pytest.mark.parametrize("only", DTYPES)
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FROM_FLOAT32])
def test_a_kernel_wrong_in_one_dtype_is_right_in_the_others(
    name: str, only: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(owner_of(name), name, wrong(name, only))
    assert {dtype: checks.is_right(name, torch.zeros(1), dtype) for dtype in DTYPES} == {
        dtype: dtype != only for dtype in DTYPES
    }
    assert len(warnings_in(caplog)) == 1


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_that_fails_is_not_used_and_its_error_is_named(
    name: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("no such symbol")

    monkeypatch.setattr(owner_of(name), name, failing)
    assert not checks.is_right(name, torch.zeros(1), torch.float32)
    (message,) = warnings_in(caplog)
    assert "fails (NotImplementedError: no such symbol)" in message


def test_no_memory_is_not_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(calls, "quantize_4bit", full)
    with pytest.raises(torch.OutOfMemoryError):
        checks.is_right("quantize_4bit", torch.zeros(1), torch.float32)
    assert not checks._verdicts


def test_rows_that_a_kernel_gets_wrong_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """As bitsandbytes 0.50.2 gets them wrong: but for multiples of 64, each row's scales are those of another place."""

    def by_rows(kept: Quantized, block: int, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        values = kernels.plain_dequantize_4bit(kept, block, shape, dtype)
        if shape[-1] % 16 == 0 and shape[-1] % 64 != 0:
            values[1:, -(shape[-1] % 64) :] *= 1.3
        return values

    monkeypatch.setattr(calls, "dequantize_4bit", by_rows)
    for dtype in DTYPES:
        assert not checks.is_right("dequantize_4bit", torch.zeros(1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAM)
@pytest.mark.parametrize(
    "fault",
    [{"weight_decay": 0.0}, {"step": 10**6}, {"eps": 0.0}, {"beta1": 0.8}, {"beta2": 0.99}, {"gnorm_scale": 1.02}],
    ids=lambda fault: next(iter(fault)),
)
def test_what_adam_may_get_wrong_is_seen(
    fault: dict[str, Any], name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = getattr(owner_of(name), name)
    monkeypatch.setattr(owner_of(name), name, lambda **kwargs: original(**{**kwargs, **fault}))
    assert not checks.is_right(name, torch.zeros(1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ADAM)
def test_decay_after_the_update_and_in_its_own_rounding_is_right(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes' kernels for GPUs decay so."""
    original = getattr(owner_of(name), name)

    def after(**kwargs: Any) -> None:
        original(**{**kwargs, "weight_decay": 0.0})
        kwargs["p"].mul_(1 - kwargs["lr"] * kwargs["weight_decay"])

    monkeypatch.setattr(owner_of(name), name, after)
    assert checks.is_right(name, torch.zeros(1), dtype)


# ---- in an optimizer


def trained(cls: type[GaLoreAdamW], dtype: torch.dtype, **options: Any) -> tuple[Any, ...]:
    """Weights and state after steps with refreshes, of two targets, one of 16 bases and one of 96, and two others."""
    torch.manual_seed(1)
    shapes = ((300, 128), (128, 300), (120, 60), (50,))
    params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    defaults: dict[str, Any] = {"update_proj_gap": 2, "proj_bits": 4, "moments": "rotate", "stagger": False}
    optimizer = cls(
        [
            {"params": params[:1], "rank": 16, **defaults, **options},
            {"params": params[1:2], "rank": 96, **defaults, **options},
            {"params": params[2:]},
        ],
        lr=1e-2,
        weight_decay=0.1,
    )
    for _ in range(5):
        for param in params:
            param.grad = torch.randn_like(param)
        optimizer.step()
    return [param.detach() for param in params], optimizer.state_dict()["state"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_is_as_with_bases_that_plain_torch_reads(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    found = trained(GaLoreAdamW, dtype)
    original = checks.is_right
    monkeypatch.setattr(checks, "is_right", lambda name, *args: name != "dequantize_4bit" and original(name, *args))
    assert_identical(found, trained(GaLoreAdamW, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4])
def test_training_with_wrong_kernels_is_training_with_plain_torch(
    bits: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in NAMES:
        monkeypatch.setattr(owner_of(name), name, wrong(name))
    found = trained(GaLoreAdamW8bit, dtype, proj_bits=bits)
    messages = [message for message in warnings_in(caplog) if message.startswith("The kernel")]
    # Both updates, and what carries moments through a refresh; of bases two more, or one more where they have another
    # dtype than moments.
    expected = 4 + (2 if bits == 4 else dtype != torch.float32)
    assert len(messages) == len(set(messages)) == expected
    monkeypatch.undo()
    monkeypatch.setattr(checks, "is_right", lambda *args: False)
    assert_identical(found, trained(GaLoreAdamW8bit, dtype, proj_bits=bits))


# ---- a check leaves no trace


@pytest.fixture(params=["autocast", "bfloat16 by default", "meta by default", "inference", "deterministic"])
def _surroundings(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.param == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            yield
    elif request.param == "bfloat16 by default":
        torch.set_default_dtype(torch.bfloat16)
        yield
        torch.set_default_dtype(torch.float32)
    elif request.param == "meta by default":
        with torch.device("meta"):
            yield
    elif request.param == "inference":
        with torch.inference_mode():
            yield
    else:
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_surroundings")
@pytest.mark.parametrize("name", NAMES)
def test_a_check_minds_nothing_around_it(name: str) -> None:
    for dtype in DTYPES:
        assert checks.is_right(name, torch.zeros(1, device="cpu"), dtype)


@pytest.mark.parametrize("name", NAMES)
def test_a_check_draws_no_random_numbers_and_is_not_counted(name: str) -> None:
    state = torch.get_rng_state()
    with StorageTracker(CPU) as tracker:
        checks.is_right(name, torch.zeros(0), torch.float32)
        assert tracker.peaks() == []
    assert torch.equal(torch.get_rng_state(), state)
    assert list(checks._verdicts) == [(name, CPU, torch.float32)]


def test_fakes_and_meta_tensors_are_not_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        monkeypatch.setattr(owner_of(name), name, wrong(name))
    with fake_training("cpu"):
        assert all(checks.is_right(name, torch.zeros(3), torch.float32) for name in NAMES)
    assert all(checks.is_right(name, torch.zeros(3, device="meta"), torch.float32) for name in NAMES)
    assert not checks._verdicts


def test_a_check_in_a_backward_pass_leaves_the_gradients_alone() -> None:
    layer = nn.Linear(5, 3)
    layer.weight.register_hook(lambda gradient: gradient * checks.is_right("quantize_4bit", gradient, torch.float32))
    layer(torch.ones(2, 5)).sum().backward()
    assert torch.equal(layer.weight.grad, torch.full((3, 5), 2.0))  # type: ignore[arg-type]
    assert set(snapshot(layer)) == {"weight", "bias"}
