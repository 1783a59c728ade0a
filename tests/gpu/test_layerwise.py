"""Every way through the backward pass ends with the same weights, in the situations that a Trainer makes on a card."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hf_galore.optim import GaLoreAdafactor, GaLoreAdamW, GaLoreAdamW8bit
from tests.support.card import DEVICE, SMALL, SMALL_RANK, llama, options_of, sized, tokens, wait
from tests.support.helpers import assert_same_but_for_rounding, perturbed, snapshot

WAYS: dict[str, dict[str, Any]] = {
    "projected backward": {"projected_backward": True},
    "layerwise by hooks": {"layerwise": True, "projected_backward": False},
    "layerwise": {"layerwise": True},
    "layerwise, held": {"layerwise": True, "hold_gradients": True},
}
# 8-bit moments and 4-bit bases turn rounding into steps of their own size: compared in 32 bits.
EXACT = {"proj_bits": 16, "update_proj_gap": 3, "scale": 0.5}


def small(dtype: torch.dtype = torch.float32, **overrides: Any) -> Any:
    width = sized({"hidden_size": 256, "intermediate_size": 688}, {})
    return llama(2, dtype, **{**SMALL, **width, **overrides})


def trained(
    model: Any,
    *,
    cls: type[Any] = GaLoreAdamW,
    steps: int = 6,
    lr: float = 1e-3,
    run: Callable[[Any, Tensor], Tensor] | None = None,
    group: dict[str, Any] | None = None,
    **options: Any,
) -> tuple[dict[str, Tensor], list[float]]:
    """Weights and losses after some steps of one batch each."""
    optimizer = cls(
        model.parameters(),
        lr=lr,
        weight_decay=0.1,
        param_options=options_of(model, sized(64, SMALL_RANK), **(group or EXACT)),
        module=model,
        **options,
    )
    losses = []
    for step in range(steps):
        ids = tokens(model, 4, 32, seed=step)
        loss = model(input_ids=ids, labels=ids).loss if run is None else run(model, ids)
        losses.append(loss.detach())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    optimizer.close()
    wait()
    return snapshot(model), [loss.item() for loss in losses]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cls", [GaLoreAdamW, GaLoreAdafactor])
def test_all_ways_lead_to_the_same_weights(cls: type[Any], way: str) -> None:
    template = small()
    start = snapshot(template)
    expected, _ = trained(copy.deepcopy(template), cls=cls)
    nearby, _ = trained(perturbed_on_device(copy.deepcopy(template)), cls=cls)
    found, _ = trained(copy.deepcopy(template), cls=cls, **WAYS[way])
    assert_same_but_for_rounding(found, expected, nearby, start)


def perturbed_on_device(model: nn.Module) -> nn.Module:
    return perturbed(model.cpu()).to(DEVICE)


def test_micro_batches_add_up_to_their_batch() -> None:
    """In projected, low-rank sums; the basis of each target is that of its first micro-batch."""
    template = small()
    start = snapshot(template)

    def end(model: Any, parts: int) -> dict[str, Tensor]:
        options = {**EXACT, "update_proj_gap": 100}
        optimizer = GaLoreAdamW(
            model.parameters(),
            lr=1e-3,
            param_options=options_of(model, sized(64, SMALL_RANK), **options),
            module=model,
            projected_backward=True,
        )
        for step in range(3):
            # All micro-batches of the first step are alike, or else their first would give another basis than all. They
            # have more tokens than the rank: a gradient of lower rank gets a basis with columns of zeros.
            ids = tokens(model, 1, 128).repeat(8, 1) if step == 0 else tokens(model, 8, 128, seed=step)
            for part in ids.chunk(parts):
                (model(input_ids=part, labels=part).loss / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.close()
        return snapshot(model)

    expected, found = (end(copy.deepcopy(template), parts) for parts in (1, 8))
    nearby = end(perturbed_on_device(copy.deepcopy(template)), 1)
    # Eight sums of low-rank gradients round more often than one.
    assert_same_but_for_rounding(found, expected, nearby, start, times=10)


def checkpointed(reentrant: bool) -> Callable[[Any, Tensor], Tensor]:
    def run(model: Any, ids: Tensor) -> Tensor:
        if not model.is_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            if reentrant:
                model.enable_input_require_grads()
        model.train()
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss

    return run


def under_autocast(model: Any, ids: Tensor) -> Tensor:
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        loss: Tensor = model(input_ids=ids, labels=ids).loss
        return loss


def twice(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss + model(input_ids=ids.flip(1), labels=ids.flip(1)).loss
    return loss


def compiled(model: Any, ids: Tensor) -> Tensor:
    loss: Tensor = torch.compile(model, backend="aot_eager")(input_ids=ids, labels=ids).loss
    return loss


SITUATIONS: dict[str, tuple[dict[str, Any], Callable[[Any, Tensor], Tensor] | None]] = {
    "checkpointing": ({}, checkpointed(False)),
    "reentrant checkpointing": ({}, checkpointed(True)),
    "autocast": ({}, under_autocast),
    "each module twice": ({}, twice),
    "tied head": ({"tie_word_embeddings": True}, None),
    "bfloat16": ({"dtype": torch.bfloat16}, None),
    "compiled": ({}, compiled),
}


@pytest.mark.parametrize("situation", SITUATIONS)
def test_losses_are_those_of_plain_training(situation: str) -> None:
    overrides, run = SITUATIONS[situation]
    template = small(**overrides)
    _, expected = trained(copy.deepcopy(template), run=run)
    _, found = trained(copy.deepcopy(template), run=run, layerwise=True)
    assert expected[-1] != expected[0]
    torch.testing.assert_close(found, expected, rtol=5e-3 if situation in ("autocast", "bfloat16") else 1e-3, atol=0)
    if situation == "compiled":
        torch._dynamo.reset()


def test_8_bits_learn_a_batch_layerwise() -> None:
    """With 4-bit bases, 8-bit moments and bfloat16 weights, as in the recipes."""
    model = small(torch.bfloat16)
    ids = tokens(model, 4, 32)
    _, losses = trained(
        model,
        cls=GaLoreAdamW8bit,
        steps=30,
        lr=1e-2,
        group={"update_proj_gap": 10, "scale": 0.5},
        run=lambda model, _: model(input_ids=ids, labels=ids).loss,
        layerwise=True,
    )
    assert losses[-1] < losses[0] / 2, losses


def test_out_of_memory_in_a_backward_pass_leaves_nothing_behind() -> None:
    model = small()
    optimizer = GaLoreAdamW8bit(
        model.parameters(),
        lr=1e-3,
        param_options=options_of(model, sized(64, SMALL_RANK)),
        module=model,
        layerwise=True,
        hold_gradients=True,
    )

    def step(ids: Tensor) -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    step(tokens(model, 4, 32))
    before = torch.cuda.memory_allocated() if DEVICE.type == "cuda" else 0

    def too_much(_: Tensor) -> None:
        torch.empty(2**50, dtype=torch.uint8, device=DEVICE)

    # The second layer's targets have had their gradients by then.
    handle = model.model.layers[0].register_full_backward_pre_hook(lambda module, gradient: too_much(gradient[0]))
    with pytest.raises(RuntimeError, match="memory"):
        step(tokens(model, 16, 32, seed=1))
    handle.remove()
    optimizer.zero_grad()
    if DEVICE.type == "cuda":
        assert torch.cuda.memory_allocated() <= before + 2**20
    losses = [step(tokens(model, 2, 32, seed=2)) for _ in range(10)]
    assert losses[-1] < losses[0], losses
