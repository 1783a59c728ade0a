"""The host waits for the card nowhere in a steady step, and once in a refresh."""

from __future__ import annotations

import warnings
from typing import Any

import pytest

from hf_galore.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from tests.support.card import ON_CARD, SMALL, SMALL_RANK, llama, options_of, sized, targets, tokens, wait, waiting

WAYS: dict[str, dict[str, Any]] = {
    "plain": {},
    "layerwise": {"layerwise": True},
    "held": {"layerwise": True, "hold_gradients": True},
}
CLASSES = [GaLoreAdamW, GaLoreAdamW8bit, GaLoreAdafactor]


def small(layers: int) -> Any:
    width: dict[str, Any] = sized({"hidden_size": 512, "intermediate_size": 1376}, {})
    return llama(layers, **{**SMALL, **width})


class Training:
    """A small Llama in bfloat16 that refreshes on request only, after its first step."""

    def __init__(self, cls: type[Any], way: str, **group: Any) -> None:
        self.model = small(2)
        options = options_of(self.model, sized(128, SMALL_RANK), update_proj_gap=10**6, stagger=False, **group)
        self.optimizer = cls(
            self.model.parameters(), lr=1e-3, weight_decay=0.1, param_options=options, module=self.model, **WAYS[way]
        )
        for _ in range(2):
            self.step("default")

    def step(self, mode: str, clip: float | None = None) -> None:
        """The backward pass and the update are watched; what the model does before is its own affair."""
        ids = tokens(self.model, 4, 64)
        loss = self.model(input_ids=ids, labels=ids).loss
        wait()
        with waiting(mode):
            loss.backward()
            if clip is not None:
                self.optimizer.clip_grad_norm_(clip)
            self.optimizer.step()
            self.optimizer.zero_grad()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", CLASSES)
def test_a_steady_step_does_not_wait(cls: type[Any], way: str) -> None:
    training = Training(cls, way)
    for _ in range(2):
        training.step("error")


@pytest.mark.parametrize("way", WAYS)
def test_a_steady_step_of_muon_does_not_wait(way: str) -> None:
    training = Training(GaLoreAdamW8bit, way, rule="muon", scale="auto")
    for _ in range(2):
        training.step("error")


@pytest.mark.parametrize("way", ["plain", "held"])
def test_clipping_does_not_wait(way: str) -> None:
    training = Training(GaLoreAdamW8bit, way)
    training.step("default", clip=1.0)
    training.step("error", clip=1.0)


@pytest.mark.parametrize("moments", ["keep", "rotate", "reset"])
def test_a_refresh_waits_once(moments: str) -> None:
    training = Training(GaLoreAdamW8bit, "layerwise", moments=moments)
    refreshed = targets(training.model)[:3]
    training.optimizer.refresh_next(refreshed)
    training.step("default")  # kernels are checked when they are first used
    before = training.optimizer.refresh_figures()["refreshes"]
    training.optimizer.refresh_next(refreshed)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        training.step("warn")
    waits = [str(warning.message) for warning in caught if "synchronizing" in str(warning.message)]
    assert training.optimizer.refresh_figures()["refreshes"] == before + len(refreshed)
    assert len(waits) <= len(refreshed), f"{len(waits)} waits in {len(refreshed)} refreshes"
    if ON_CARD:
        assert waits, "torch did not count"


def test_figures_wait_as_often_for_many_parameters_as_for_few() -> None:
    """What a Trainer asks at each log."""
    counts = []
    for layers in (1, 3):
        model = small(layers)
        optimizer = GaLoreAdamW8bit(
            model.parameters(), param_options=options_of(model, sized(128, SMALL_RANK)), module=model, layerwise=True
        )
        ids = tokens(model, 2, 32)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        wait()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with waiting("warn"):
                optimizer.warn_of_skipped()
        counts.append(sum("synchronizing" in str(warning.message) for warning in caught))
        optimizer.close()
    assert counts[0] == counts[1] <= 1, counts
