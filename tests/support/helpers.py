"""A tiny model, its data and its arguments, and comparisons that allow no tolerance."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import hf_galore  # noqa: F401  (registers the names that everything here is for)
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.optim.target import Target

PLAIN = ("galore_adamw", "galore_adamw_8bit", "galore_adafactor")
LAYERWISE = tuple(f"{name}_layerwise" for name in PLAIN)
NAMES = PLAIN + LAYERWISE

# Rank 16 of the tiny model's 64: the low-rank gradients of its MLP have 4,096 elements, from where 8-bit moments are
# really in 8 bits; those of its attention have fewer. A gap of 3 puts several refreshes into a short run.
RANK, GAP, SCALE = 16, 3, 0.5
# Bases unquantised, because most tests compare runs that differ by rounding: a code that rounding tips over is a
# difference of its own size.
OPTIM_ARGS = f"rank={RANK}, update_proj_gap={GAP}, scale={SCALE}, proj_bits=16"
# Layerwise as plain computes it: the gradient first, then its projection, with the same rounding.
EXACT_ARGS = f"{OPTIM_ARGS}, projected_backward=false"
VOCABULARY = 128


def tiny_llama(seed: int = 0, **overrides: Any) -> LlamaForCausalLM:
    """Two layers of 64, 14 matrices to project, no dropout."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**{**settings, **overrides}))


class Counting(Dataset[dict[str, Tensor]]):
    """Sequences that count upwards from different numbers: quickly learnt, and no two batches alike."""

    def __init__(self, rows: int = 64, length: int = 16) -> None:
        start = torch.arange(rows).unsqueeze(1) * 7
        self._rows = 3 + (start + torch.arange(length)) % (VOCABULARY - 3)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if index >= len(self):
            raise IndexError(index)
        return {"input_ids": self._rows[index], "labels": self._rows[index]}


def arguments(output_dir: Path, optim: Any, **overrides: Any) -> TrainingArguments:
    """Arguments that any of the six names accepts, on the CPU, with every step logged and nothing saved."""
    return TrainingArguments(**{**argument_values(output_dir, optim), **overrides})


def argument_values(output_dir: Path, optim: Any) -> dict[str, Any]:
    """What `arguments` gives `TrainingArguments` where nothing overrides it."""
    return {
        "output_dir": str(output_dir),
        "optim": optim,
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": OPTIM_ARGS,
        "learning_rate": 1e-2,
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "max_grad_norm": 0.0,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
    }


def make_trainer(
    model: nn.Module, output_dir: Path, optim: Any, cls: type[Trainer] = Trainer, **overrides: Any
) -> Trainer:
    """A trainer of `model` on `Counting` data; `overrides` are training arguments."""
    return cls(
        model=model,
        args=arguments(output_dir, optim, **overrides),
        train_dataset=Counting(),
        eval_dataset=Counting(8),
    )


def train(model: nn.Module, output_dir: Path, optim: Any, cls: type[Trainer] = Trainer, **overrides: Any) -> Trainer:
    """The trainer, after its run."""
    trainer = make_trainer(model, output_dir, optim, cls, **overrides)
    trainer.train()
    return trainer


def optimizer_of(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer inside accelerate's wrapper."""
    optimizer: Any = trainer.optimizer
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    return inner


def target_of(optimizer: torch.optim.Optimizer, param: Tensor) -> Target:
    """The target that a parameter is to a GaLore optimizer."""
    assert isinstance(optimizer, GaLoreOptimizer)
    target = optimizer.trained(param)
    assert isinstance(target, Target)
    return target


def logged(trainer: Trainer, key: str) -> list[float]:
    """The values that training logged under `key`, one a step."""
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    """The parameters by name, copied."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def hooks_on(model: nn.Module) -> int:
    """Hooks of every kind on the parameters and modules of `model`."""
    kinds = [key for key in vars(nn.Module()) if key.endswith("_hooks")]
    on_modules = sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)
    on_parameters = sum(
        len(getattr(param, kind, None) or ())
        for param in model.parameters()
        for kind in ("_backward_hooks", "_post_accumulate_grad_hooks")
    )
    return on_modules + on_parameters


def assert_identical(found: Any, expected: Any, path: str = "") -> None:
    """Nested containers of tensors and plain values are the same, tensors bit for bit and in dtype."""
    assert type(found) is type(expected), f"{path}: {type(found)} is not {type(expected)}"
    if isinstance(expected, Tensor):
        assert found.dtype == expected.dtype, f"{path}: {found.dtype} is not {expected.dtype}"
        assert found.shape == expected.shape, f"{path}: {found.shape} is not {expected.shape}"
        difference = (found.double() - expected.double()).abs()
        assert torch.equal(found, expected), f"{path} differs by up to {difference.max().item():.3g}"
    elif isinstance(expected, Mapping):
        assert list(found) == list(expected), path
        for key, value in expected.items():
            assert_identical(found[key], value, f"{path}/{key}")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(found) == len(expected), path
        for index, (left, right) in enumerate(zip(found, expected, strict=True)):
            assert_identical(left, right, f"{path}/{index}")
    else:
        assert found == expected, f"{path}: {found!r} is not {expected!r}"


def assert_a_bad_gradient_changes_nothing(optimizer: torch.optim.Optimizer, weight: Tensor, gradient: Tensor) -> None:
    """A step with a gradient that is not finite in one place leaves weight and state as they are, but for its count."""
    before = {key: value.clone() for key, value in optimizer.state[weight].items() if key != "step"}
    old = weight.detach().clone()
    for value in (math.nan, math.inf):
        weight.grad = gradient.clone()
        weight.grad.view(-1)[7] = value
        optimizer.step()
        assert torch.equal(weight.detach(), old)
        for key, value_before in before.items():
            assert torch.equal(optimizer.state[weight][key], value_before), key


def fraction_apart(found: Tensor, expected: Tensor, start: Tensor) -> float:
    """How far two ends of a tensor are apart, as a fraction of the way that the second went from `start`."""
    way = (expected - start).norm()
    assert way > 0, "it went nowhere"
    return float((found - expected).norm() / way)


def assert_same_path(
    found: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor], tolerance: float
) -> None:
    """Both ended in the same place, to a fraction of the way that each tensor went from `start`."""
    for name, weight in expected.items():
        fraction = fraction_apart(found[name], weight, start[name])
        assert fraction <= tolerance, f"{name} ends {fraction:.3g} of its way apart"


# Of each weight: about what float32 rounds off, 6e-8.
PERTURBATION = 1e-7


def perturbed(model: nn.Module) -> nn.Module:
    """The model, each of its weights moved by 1e-7 of itself, up or down."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for param in model.parameters():
            signs = torch.randint(2, param.shape, generator=generator).mul_(2).sub_(1)
            param.mul_(1 + PERTURBATION * signs.to(param.dtype))
    return model


def assert_same_but_for_rounding(
    found: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    nearby: Mapping[str, Tensor],
    start: Mapping[str, Tensor],
    times: float = 4.0,
) -> None:
    """Two ways of training end as near to each other as rounding alone lets them.

    Refreshes and Adam magnify rounding, by how much depends on the run and the processor: so no constant is the limit,
    but what the second way makes of weights that are perturbed by about a rounding. Of the tensors that is the one that
    moves the most, as a fraction of its way: in which of them rounding shows most is chance.

    Args:
        found: the weights that one way ends with.
        expected: the other's.
        nearby: that other's again, from weights that are `perturbed`.
        start: the weights that were not perturbed.
        times: the first way may round more often.
    """
    limit = max(fraction_apart(nearby[name], weight, start[name]) for name, weight in expected.items())
    assert limit > 0, "The perturbation did not reach the training."
    assert_same_path(found, expected, start, times * limit + PERTURBATION)


def copied(value: Any) -> Any:
    """A deep copy: what `state_dict()` gives shares its tensors with the optimizer."""
    return copy.deepcopy(value)
