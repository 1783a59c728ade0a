"""Which kernel is used: ours, else bitsandbytes', else plain torch; a wrong one is named once and left."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hf_galore import kernels
from hf_galore.integrations import bitsandbytes as facade
from hf_galore.integrations import bitsandbytes_calls as calls
from hf_galore.integrations import bitsandbytes_checks as checks
from hf_galore.kernels import adam, blockwise, where
from hf_galore.lowrank import blockwise as plain
from hf_galore.lowrank.blockwise import AdamStep, Moments8bit, Quantized
from tests.support.own_kernels import LATER, moments_8bit

NAMES = ("quantize_4bit", "dequantize_4bit", "quantize_8bit", "dequantize_8bit")
ADAM = ("adam_8bit_direction", "adam_8bit_", "adam_32bit_direction", "adam_32bit_")


def adam_8bit_(weight: Tensor, gradient: Tensor, moments: Moments8bit, now: AdamStep, norm: Tensor) -> None:
    plain.plain_adam_8bit_(weight, gradient, moments, now)


def adam_8bit_direction(gradient: Tensor, moments: Moments8bit, now: AdamStep, norm: Tensor) -> Tensor:
    direction = torch.zeros_like(gradient)
    plain.plain_adam_8bit_(direction, gradient, moments, now._replace(lr=-1.0, weight_decay=0.0))
    return direction


def adam_32bit_(weight: Tensor, gradient: Tensor, first: Tensor, second: Tensor, now: AdamStep, norm: Tensor) -> None:
    plain.plain_adam_(weight, gradient, first, second, now)


def adam_32bit_direction(gradient: Tensor, first: Tensor, second: Tensor, now: AdamStep, norm: Tensor) -> Tensor:
    direction = torch.zeros_like(gradient)
    plain.plain_adam_(direction, gradient, first, second, now._replace(lr=-1.0, weight_decay=0.0))
    return direction


STAND_INS: dict[str, Any] = {
    **{name: getattr(plain, f"plain_{name}") for name in NAMES},
    "adam_8bit_": adam_8bit_,
    "adam_8bit_direction": adam_8bit_direction,
    "adam_32bit_": adam_32bit_,
    "adam_32bit_direction": adam_32bit_direction,
}


class Used:
    """Kernels that were called."""

    def __init__(self) -> None:
        self.names: list[str] = []
        self.fault: str | None = None

    def __call__(self, owner: str, name: str, original: Any) -> Any:
        def call(*args: Any) -> Any:
            self.names.append(f"{owner} {name}")
            if owner == "ours" and self.fault == "fails":
                raise RuntimeError("ptxas is not there")
            out = original(*args)
            if owner == "ours" and self.fault == "is wrong":
                if name.endswith("direction") or name.startswith("dequantize"):
                    out = out * 1.1
                elif name.startswith("quantize"):
                    out.codes.view(-1)[0] ^= 0x60
                else:
                    args[0].mul_(1.1).add_(0.1)
            return out

        return call


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> Used:
    """Our kernels, stood in for by plain torch, serve on this CPU; none has been checked."""
    found = Used()
    monkeypatch.setattr(where, "_look", lambda tensor: True)
    monkeypatch.setattr(checks, "_verdicts", {})
    monkeypatch.setattr(checks, "_warned", set())
    for name, stand_in in STAND_INS.items():
        monkeypatch.setattr(adam if name in ADAM else blockwise, name, found("ours", name, stand_in))
    for name in NAMES:
        monkeypatch.setattr(calls, name, found("bitsandbytes", name, getattr(calls, name)))
        monkeypatch.setattr(facade, f"plain_{name}", found("plain", name, getattr(plain, f"plain_{name}")))
    return found


def call(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """One use of a kernel for blockwise 4 or 8 bits."""
    values, table = torch.randn(33, 7), calls.linear_table()
    if name == "quantize_4bit":
        return facade.quantize_4bit(values, 64)
    if name == "quantize_8bit":
        return facade.quantize_8bit(values, table, 256)
    if name == "dequantize_4bit":
        kept = plain.plain_quantize_4bit(values, 64)
        return facade.dequantize_4bit(Quantized(kept.codes, kept.absmax.to(torch.bfloat16)), 64, (33, 7), dtype)
    return facade.dequantize_8bit(plain.plain_quantize_8bit(values, table, 256), table, 256, dtype)


def warnings_in(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("name", NAMES)
def test_ours_comes_first(name: str, used: Used, caplog: pytest.LogCaptureFixture) -> None:
    call(name)
    assert used.names[-1] == f"ours {name}"
    assert not [one for one in used.names if not one.startswith("ours")]
    assert warnings_in(caplog) == []


@pytest.mark.parametrize("fault", ["fails", "is wrong"])
@pytest.mark.parametrize("name", NAMES)
def test_bitsandbytes_takes_over_and_one_warning_says_so(
    name: str, fault: str, used: Used, caplog: pytest.LogCaptureFixture
) -> None:
    used.fault = fault
    for _ in range(3):
        call(name)
        assert used.names[-1] == f"bitsandbytes {name}"
    (message,) = warnings_in(caplog)
    problem = "fails (RuntimeError: ptxas is not there)" if fault == "fails" else "gives wrong results"
    for part in (name, "hf_galore (Triton", problem, "float32", "CPU", "bitsandbytes or plain torch is used instead"):
        assert part in message


@pytest.mark.parametrize("name", NAMES)
def test_plain_torch_comes_last(
    name: str, used: Used, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    used.fault = "fails"
    monkeypatch.setattr(checks, "is_right", lambda *args: False)
    call(name)
    assert used.names[-1] == f"plain {name}"


@pytest.mark.parametrize("fault", [None, "fails", "is wrong"])
@pytest.mark.parametrize("name", ADAM)
def test_a_kernel_of_adam_is_asked_for(
    name: str, fault: str | None, used: Used, caplog: pytest.LogCaptureFixture
) -> None:
    used.fault = fault
    for dtype in kernels.DTYPES:
        assert facade.fused(name, torch.zeros(3), dtype) == (fault is None)
    assert len(warnings_in(caplog)) == (0 if fault is None else 3)
    assert not facade.fused(name, torch.zeros(3), torch.float64)


def test_where_ours_do_not_serve_none_is_checked(used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(where, "_look", lambda tensor: False)
    for name in NAMES:
        call(name)
        assert used.names[-1] == f"bitsandbytes {name}"
        assert not facade.fused(name, torch.zeros(3), torch.float32)
    assert not [one for one in used.names if one.startswith("ours")]


def test_fakes_that_stand_for_a_card_are_not_checked(used: Used) -> None:
    used.fault = "is wrong"
    with FakeTensorMode():
        assert all(facade.fused(name, torch.zeros(3), torch.float32) for name in (*NAMES, *ADAM))
    assert not used.names
    assert not checks._verdicts


def test_scales_in_bfloat16_are_read_by_all(used: Used, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases keep theirs so: what bitsandbytes needs a copy for, ours reads as it is."""
    kept = plain.plain_quantize_4bit(torch.randn(33, 7), 64)
    kept = Quantized(kept.codes, kept.absmax.to(torch.bfloat16))
    expected = plain.plain_dequantize_4bit(kept, 64, (33, 7), torch.float32)
    assert torch.equal(facade.dequantize_4bit(kept, 64, (33, 7), torch.float32), expected)
    used.fault = "fails"
    checks._verdicts.clear()
    assert torch.equal(facade.dequantize_4bit(kept, 64, (33, 7), torch.float32), expected)
    monkeypatch.setattr(checks, "is_right", lambda *args: False)
    assert torch.equal(facade.dequantize_4bit(kept, 64, (33, 7), torch.float32), expected)
    assert [one.split()[0] for one in used.names if one.endswith(" dequantize_4bit")][-1] == "plain"


def test_bitsandbytes_raises_the_version_of_what_it_writes() -> None:
    weight, gradient, moments = torch.zeros(300), torch.ones(300), moments_8bit((300,))
    in_32 = torch.zeros(300), torch.zeros(300)
    written = (weight, *moments[:4], *in_32)
    before = [tensor._version for tensor in written]
    facade.adam_8bit_(weight, gradient, moments, LATER)
    facade.adam_32bit_(weight, gradient, *in_32, LATER)
    assert all(tensor._version > old for tensor, old in zip(written, before, strict=True))
    assert weight._version >= before[0] + 2
