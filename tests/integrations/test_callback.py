"""What the callback adds to the Trainer's log, and when."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, cast

import pytest
from torch import Tensor
from transformers import Trainer, TrainerCallback

from hf_galore import GaLoreAdamW, GaLoreCallback
from hf_galore.integrations.callback import callbacks_of, galore_callback
from hf_galore.integrations.signatures import signature_of
from hf_galore.optim.optimizer import GaLoreOptimizer
from tests.support.helpers import (
    GAP,
    NAMES,
    RANK,
    Counting,
    arguments,
    logged,
    make_trainer,
    optimizer_of,
    tiny_llama,
    train,
)

OF_REFRESHES = {"captured_energy_min", "captured_energy_median", "refresh_seconds"}


def galore_keys(entry: dict[str, Any]) -> set[str]:
    return {key.removeprefix("galore/") for key in entry if key.startswith("galore/")}


def test_a_trainer_is_as_we_need_it(tmp_path: Path) -> None:
    """Fails first, and by name, when a new transformers moves something."""
    mine = GaLoreCallback()
    trainer = make_trainer(tiny_llama(), tmp_path, "galore_adamw")
    found = getattr(getattr(trainer, "callback_handler", None), "callbacks", None)
    assert isinstance(found, list), f"Trainer.callback_handler.callbacks is {found!r}, not a list"
    trainer.add_callback(mine)
    assert any(each is mine for each in callbacks_of(trainer)), "Trainer.add_callback adds to another place"
    assert galore_callback(trainer) is mine
    callbacks_of(trainer).clear()
    assert galore_callback(trainer) is mine  # it was a copy
    for name in ("on_train_begin", "on_log", "on_train_end", "on_pre_optimizer_step"):
        expected = "(self, args, state, control, **kwargs)"
        signature = signature_of(getattr(TrainerCallback, name))
        assert signature == expected, f"TrainerCallback.{name}{expected} is now {name}{signature}"


@pytest.mark.parametrize("name", NAMES)
def test_it_is_added_by_itself_and_logs_each_step(name: str, tmp_path: Path) -> None:
    trainer = train(tiny_llama(), tmp_path, name, max_steps=2 * GAP + 1)
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(entries) == 2 * GAP + 1
    first, *later = entries
    assert galore_keys(first) == OF_REFRESHES | {"refreshes", "moment_mib", "basis_mib", "targets", "full_rank"}
    assert (first["galore/targets"], first["galore/full_rank"]) == (14, 7)
    assert first["galore/refreshes"] == 14  # the first step makes all bases
    # Staggered, 14 matrices over a gap of 3: each step refreshes some, each matrix once a gap.
    assert all(galore_keys(entry) == OF_REFRESHES | {"refreshes", "overlap_median"} for entry in later)
    assert later[GAP - 1]["galore/refreshes"] == 28
    assert later[2 * GAP - 1]["galore/refreshes"] == 42
    for entry in entries:
        assert 0.5 < entry["galore/captured_energy_min"] <= entry["galore/captured_energy_median"] <= 1
        assert 0 < entry["galore/refresh_seconds"] < 60
        # Two random subspaces of 64 dimensions would overlap by RANK / 64.
        assert RANK / 64 < entry.get("galore/overlap_median", 1) <= 1.0001


def test_steps_without_a_refresh_log_no_figures_of_one(tmp_path: Path) -> None:
    args = f"rank={RANK}, update_proj_gap=3, stagger=false"
    trainer = train(tiny_llama(), tmp_path, "galore_adamw", max_steps=4, optim_args=args)
    kinds = [galore_keys(entry) for entry in trainer.state.log_history if "loss" in entry]
    assert kinds[1] == kinds[2] == {"refreshes"}
    assert kinds[3] == OF_REFRESHES | {"refreshes", "overlap_median"}


def test_between_logging_steps_refreshes_add_up(tmp_path: Path) -> None:
    trainer = train(tiny_llama(), tmp_path, "galore_adamw", max_steps=6, logging_steps=3)
    assert logged(trainer, "galore/refreshes") == [14 + 9, 14 + 14 + 9]


def test_it_counts_what_laziness_saves(tmp_path: Path) -> None:
    """From one step to the next these subspaces move little."""
    args = "rank=16, update_proj_gap=1, lazy_refresh=true"
    trainer = train(tiny_llama(), tmp_path, "galore_adamw", max_steps=12, optim_args=args)
    done, saved = (logged(trainer, f"galore/{key}") for key in ("refreshes", "refreshes_saved"))
    assert [a + b for a, b in zip(done, saved, strict=True)] == [14 * (step + 1) for step in range(12)]
    assert saved[-1] > 0


def test_bytes_are_those_of_the_state(tmp_path: Path) -> None:
    trainer = train(tiny_llama(), tmp_path, "galore_adamw_8bit", max_steps=1, optim_args=f"rank={RANK}")
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    states = optimizer_of(trainer).state.values()

    def mib(prefix: str) -> float:
        tensors = [value for state in states for key, value in state.items() if key.startswith(prefix)]
        return sum(int(value.numel() * value.element_size()) for value in tensors) / 2**20

    assert entry["galore/basis_mib"] == mib("basis") > 0
    assert entry["galore/moment_mib"] == mib("exp_avg") > 0


def test_energy_is_that_of_the_gradient(tmp_path: Path) -> None:
    """Against the gradients of the first step, which a plain optimizer leaves where they are."""

    class Keeping(TrainerCallback):
        energies: tuple[float, ...] = ()

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer: GaLoreOptimizer = kwargs["optimizer"].optimizer
            self.energies = tuple(
                energy(param, optimizer, group)
                for group in optimizer.param_groups
                for param in group["params"]
                if "rank" in group
            )

    def energy(param: Tensor, optimizer: GaLoreOptimizer, group: dict[str, Any]) -> float:
        gradient = cast("Tensor", param.grad)
        left, right = optimizer.bases_of(param, group)
        low_rank = gradient @ right if right is not None else cast("Tensor", left).mT @ gradient
        return float(low_rank.square().sum() / gradient.square().sum())

    trainer = make_trainer(tiny_llama(), tmp_path, "galore_adamw", max_steps=1)
    keeping = Keeping()
    trainer.add_callback(keeping)
    trainer.train()
    assert logged(trainer, "galore/captured_energy_min") == [pytest.approx(min(keeping.energies), rel=1e-5)]


@pytest.mark.arithmetic
def test_the_estimate_from_factors_is_near_the_energy(tmp_path: Path) -> None:
    """The projected backward has no gradient to take the norm of; 16 random columns stand for what was not captured."""
    energies = []
    for projected_backward in ("false", "true"):
        args = f"rank={RANK}, projected_backward={projected_backward}"
        trainer = train(tiny_llama(), tmp_path, "galore_adamw", max_steps=1, optim_args=args)
        energies.append(logged(trainer, "galore/captured_energy_median")[0])
    exact, estimated = energies
    assert exact != estimated
    # The part that is missing is known to √(2/16) = 35 % at worst, of one number; a median over 14 is closer.
    assert 1 - estimated == pytest.approx(1 - exact, rel=0.35)


def test_the_figures_reach_whatever_reports(tmp_path: Path) -> None:
    class Reporter(TrainerCallback):
        def __init__(self) -> None:
            self.seen: list[dict[str, float]] = []

        def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.append(dict(kwargs["logs"]))

    reporter = Reporter()
    trainer = make_trainer(tiny_llama(), tmp_path, "galore_adamw", max_steps=2, eval_strategy="epoch")
    trainer.callback_handler.callbacks.insert(0, reporter)  # where TensorBoard's and W&B's are
    trainer.train()
    with_loss = [entry for entry in reporter.seen if "loss" in entry]
    assert [entry["galore/refreshes"] for entry in with_loss] == [14, 19]
    assert all(not galore_keys(entry) for entry in reporter.seen if "loss" not in entry)


def test_a_resumed_run_goes_on_counting(tmp_path: Path) -> None:
    saved: dict[str, Any] = {"save_strategy": "steps", "save_steps": 4}
    train(tiny_llama(), tmp_path, "galore_adamw", max_steps=4, **saved)
    trainer = make_trainer(tiny_llama(1), tmp_path, "galore_adamw", max_steps=GAP * 2 + 1, **saved)
    trainer.train(resume_from_checkpoint=True)
    assert logged(trainer, "galore/refreshes")[-1] == 42


@pytest.mark.parametrize("by_hand", [False, True])
def test_it_is_added_once_for_an_optimizer_made_by_hand(by_hand: bool, tmp_path: Path) -> None:
    """Before: only by hand."""
    model = tiny_llama()
    weights = [param for name, param in model.named_parameters() if "mlp" in name]
    optimizer = GaLoreAdamW([{"params": weights, "rank": RANK}])
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, "adamw_torch", max_steps=1, optim_target_modules=None, optim_args=None),
        train_dataset=Counting(),
        optimizers=(optimizer, None),
        callbacks=[GaLoreCallback()] if by_hand else None,
    )
    trainer.train()
    assert logged(trainer, "galore/targets") == [6]
    assert sum(isinstance(callback, GaLoreCallback) for callback in trainer.callback_handler.callbacks) == 1


def test_other_optimizers_log_what_they_did(tmp_path: Path) -> None:
    trainer = train(tiny_llama(), tmp_path, "adamw_torch", max_steps=1, optim_target_modules=None, optim_args=None)
    assert not any(galore_keys(entry) for entry in trainer.state.log_history)
    assert all(math.isfinite(loss) for loss in logged(trainer, "loss"))
