"""A steady training step asks nothing of the device but what the Trainer and TRL ask of it themselves.

Under fake tensors a number that is read has to be answered for: the questions are counted. (On a GPU each of them waits
for all that has been launched.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from trl import SFTTrainer

from hf_galore.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.plan.fakes import Fakes, fake_training
from hf_galore.plan.rehearsal import STEPS, rehearse
from hf_galore.rules.adam_8bit import codebooks
from tests.support.helpers import RANK, tiny_llama
from tests.support.planning import sft

GALORE = (
    "galore_adamw",
    "galore_adamw_8bit",
    "galore_adafactor",
    "galore_adamw_layerwise",
    "galore_adamw_8bit_layerwise",
    "galore_adafactor_layerwise",
)
SITUATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2},
    "clipped": {"max_grad_norm": 1.0},
    "checkpointed": {"activation_checkpointing": True},
}


def is_question(func: Any, args: Any) -> bool:
    """Whether an operation has to wait for the device: its result is on the host, or has a shape that depends on it.

    Counters of the optimizers are tensors of the host, whose numbers fakes know.
    """
    name = str(func)
    if "_local_scalar_dense" in name:
        return getattr(args[0], "constant", None) is None
    asks = ("is_nonzero", "aten.nonzero", "aten.equal", "masked_select", "_unique")
    return any(word in name for word in asks) or ("linalg" in name and "norm" not in name)


def questions(make_trainer: Callable[[], SFTTrainer], monkeypatch: pytest.MonkeyPatch) -> dict[int, Counter[str]]:
    """What each step of a training asks, and how often."""
    found: dict[int, Counter[str]] = {}
    present = [0]
    original = Fakes.call

    def call(self: Fakes, func: Any, args: Any, kwargs: Any) -> Any:
        if is_question(func, args):
            found.setdefault(present[0], Counter())[str(func)] += 1
        return original(self, func, args, kwargs)

    monkeypatch.setattr(Fakes, "call", call)
    # On a CPU it looks at once whether updates were skipped; on a GPU, when the Trainer logs.
    monkeypatch.setattr(GaLoreOptimizer, "warn_of_skipped", lambda self: None)
    with fake_training("cuda") as faked:
        rehearse(make_trainer(), faked, lambda phase, step: present.__setitem__(0, step))
    monkeypatch.undo()
    return found


@pytest.mark.parametrize(
    ("optim", "situation", "more"),
    [(optim, "plain", "") for optim in GALORE]
    + [(optim, s, "") for optim in ("galore_adamw", "galore_adamw_8bit_layerwise") for s in SITUATIONS if s != "plain"]
    + [("galore_adamw_8bit_layerwise", "plain", ", rule=muon, scale=auto")]
    + [("galore_adamw_8bit_layerwise", "plain", f", {option}") for option in ("residual=fira", "scaling=channel")]
    + [("galore_adamw", "clipped", f", {option}") for option in ("residual=sign", "scaling=tensor")]
    + [("galore_adamw", "plain", ", rule=muon, residual=normuon, residual_bits=8")],
)
def test_a_steady_step_asks_no_more_than_with_adamw(
    optim: str, situation: str, more: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = questions(sft(tmp_path, "adamw_torch_fused", **SITUATIONS[situation]), monkeypatch)
    options: dict[str, Any] = {"optim_args": f"rank={RANK}, update_proj_gap=200{more}"}  # no refresh in the third step
    found = questions(sft(tmp_path, optim, **options, **SITUATIONS[situation]), monkeypatch)
    assert usual[STEPS], "the Trainer reads the loss"
    assert found[STEPS] == usual[STEPS]
    # The first step refreshes all bases, with a factorisation and a read for each; random projections are only drawn.
    assert sum(found[1].values()) > sum(usual[1].values())
    assert any("linalg" in name for name in found[1]) == ("scaling" not in more)


class OnTheHost:
    """What a device has handed over: its numbers are there."""

    def __init__(self, values: Tensor) -> None:
        self._numbers = len(values)

    def unbind(self) -> list[OnTheHost]:
        return [OnTheHost(torch.empty(1)) for _ in range(self._numbers)]

    def item(self) -> float:
        return 0.5  # finite, above 0, and what a share of something may be


@pytest.mark.parametrize("refresh", ["subspace", "random"])
@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
@pytest.mark.parametrize("way", [{}, {"layerwise": True}, {"layerwise": True, "hold_gradients": True}], ids=str)
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor])
def test_a_refresh_waits_once(
    cls: Any, way: dict[str, Any], moments: str, refresh: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: Counter[str] = Counter()
    original = Fakes.call

    def call(self: Fakes, func: Any, args: Any, kwargs: Any) -> Any:
        # Factorisations by products are asked for nothing, unlike those that TRL's or torch's own code may call.
        if is_question(func, args) and "cholesky_ex" not in str(func) and "solve_triangular" not in str(func):
            asked[str(func)] += 1
        return original(self, func, args, kwargs)

    def handed_over(self: Tensor) -> OnTheHost:
        asked["cpu"] += 1
        return OnTheHost(self)

    with fake_training("cuda"):
        codebooks(torch.device("cpu"))  # made once, on the host
        model = tiny_llama()
        group = {"rank": RANK, "moments": moments, "refresh": refresh, "update_proj_gap": 10**6, "stagger": False}
        targets = [module.weight for name, module in model.named_modules() if name.endswith("_proj")]
        optimizer = cls(model.parameters(), lr=1e-3, param_options=dict.fromkeys(targets, group), module=model, **way)
        for refreshes in (targets, targets[:3], []):
            optimizer.refresh_next(refreshes)
            loss = model(input_ids=torch.zeros(2, 8, dtype=torch.int64)).logits.sum()
            asked.clear()
            with monkeypatch.context() as patch:
                patch.setattr(Fakes, "call", call)
                patch.setattr(Tensor, "cpu", handed_over)
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
            assert asked == Counter({"cpu": len(refreshes)} if refreshes else {})


class OnACard(Tensor):
    """A counter that has been moved to a GPU: the host waits for each number that it reads there."""

    waits = 0

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 0)

    def item(self) -> Any:
        OnACard.waits += 1
        return super().item()

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        OnACard.waits += 1
        return self.as_subclass(Tensor)


@pytest.mark.parametrize("way", [{}, {"layerwise": True}], ids=["plain", "layerwise"])
@pytest.mark.parametrize("moments", ["keep", "reset"])
def test_counters_that_somebody_has_moved_are_taken_back_once(way: dict[str, Any], moments: str) -> None:
    """Lightning moves all of an optimizer's state to the model's device, but for `step`; others move that too."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16)
    model = torch.nn.Sequential(layer, torch.nn.LayerNorm(16))
    group = {"rank": 4, "lazy_refresh": True, "moments": moments, "update_proj_gap": 2}
    optimizer = GaLoreAdamW(model.parameters(), param_options={layer.weight: group}, module=model, **way)
    found = []
    for number in range(5):
        if number == 1:
            for state in optimizer.state.values():
                for key, value in state.items():
                    if value.ndim == 0:
                        state[key] = value.as_subclass(OnACard)
        OnACard.waits = 0
        model(torch.randn(3, 16)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(OnACard.waits)
    # Once for each counter: four of the target's, and the `step` of each of three other parameters.
    assert found == [0, 7, 0, 0, 0]
    assert not any(isinstance(value, OnACard) for state in optimizer.state.values() for value in state.values())
