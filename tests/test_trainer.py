"""The six names under `Trainer` and `SFTTrainer`: what each step does to each weight, and what is left behind."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
)
from transformers import TrainingArguments as Arguments

from hf_galore.projection import Bases, low_rank_shape, project, side_of
from tests.helpers import (
    EXACT_ARGS,
    GAP,
    LAYERWISE,
    NAMES,
    OPTIM_ARGS,
    PLAIN,
    RANK,
    SCALE,
    VOCABULARY,
    argument_values,
    assert_identical,
    assert_same_but_for_rounding,
    hooks_on,
    logged,
    make_trainer,
    optimizer_of,
    perturbed,
    snapshot,
    tiny_llama,
    train,
)

COSINE: dict[str, Any] = {"lr_scheduler_type": "cosine", "warmup_steps": 3, "max_steps": 10}


class AtEachStep(TrainerCallback):
    """Keeps the weights before the first step and after every one."""

    def __init__(self) -> None:
        self.weights: list[dict[str, Tensor]] = []

    def on_train_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.weights.append(snapshot(kwargs["model"]))

    def on_step_end(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.weights.append(snapshot(kwargs["model"]))

    def moves(self) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
        """The weights before and after each step."""
        return zip(self.weights[:-1], self.weights[1:], strict=True)


def train_recorded(
    model: nn.Module, output_dir: Path, optim: str, cls: type[Trainer] = Trainer, **overrides: Any
) -> tuple[Trainer, AtEachStep]:
    trainer = make_trainer(model, output_dir, optim, cls, **overrides)
    recorder = AtEachStep()
    trainer.add_callback(recorder)
    trainer.train()
    return trainer, recorder


# ---- the six names


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = ["<pad>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    backend.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<pad>"
    )


def make_sft_trainer(model: PreTrainedModel, output_dir: Path, optim: str, **overrides: Any) -> Trainer:
    """`SFTTrainer` with its own defaults (checkpointed activations among them), but in float32."""
    from datasets import Dataset
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    rows = [{"text": " ".join(f"w{(7 * row + i) % (VOCABULARY - 3)}" for i in range(16))} for row in range(64)]
    return SFTTrainer(
        model=model,
        args=SFTConfig(**{**argument_values(output_dir, optim), "bf16": False, **overrides}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer(),
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("make", [make_trainer, make_sft_trainer], ids=["Trainer", "SFTTrainer"])
def test_trains(name: str, make: Any, tmp_path: Path) -> None:
    """The loss falls, every trainable tensor moves, frozen ones do not.

    Without hf_galore: on a machine without CUDA the 8-bit names ended in `AssertionError: Torch not compiled with CUDA
    enabled`, `galore_adafactor_layerwise` in `Cannot combine manual lr and relative_step=True`; with bitsandbytes
    0.50 parameters with 32-bit state, here all but the MLP and the head, might never move.
    """
    model = tiny_llama()
    frozen = {"model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"}
    for key in frozen:
        model.get_parameter(key).requires_grad_(False)
    before = snapshot(model)
    trainer = make(model, tmp_path, name, max_steps=12)
    trainer.train()
    losses = logged(trainer, "loss")
    assert len(losses) == 12
    # ln 128 = 4.85 is where it starts.
    assert losses[0] > 4.5
    assert losses[-1] < 3.5
    for key, param in model.named_parameters():
        assert torch.isfinite(param).all(), key
        assert torch.equal(param, before[key]) == (key in frozen), key
    assert all(norm > 0 for norm in logged(trainer, "grad_norm"))


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("make", [make_trainer, make_sft_trainer], ids=["Trainer", "SFTTrainer"])
def test_layerwise_gives_the_very_weights_of_plain(name: str, make: Any, tmp_path: Path) -> None:
    """Without hf_galore: a layerwise optimizer never saw the schedule. Here: four refreshes, decay, cosine, warmup."""
    runs = []
    for optim in (name, f"{name}_layerwise"):
        model = tiny_llama(tie_word_embeddings=True)
        trainer = make(model, tmp_path, optim, weight_decay=0.1, optim_args=EXACT_ARGS, **COSINE)
        trainer.train()
        runs.append((snapshot(model), optimizer_of(trainer).state_dict()["state"], logged(trainer, "loss")))
    assert_identical(runs[1], runs[0])


@pytest.mark.arithmetic
@pytest.mark.parametrize("name", PLAIN)
def test_layerwise_goes_where_plain_goes(name: str, tmp_path: Path) -> None:
    """With the projected backward, its default, which multiplies in another order than plain; over four bases."""

    def end(model: nn.Module, optim: str) -> dict[str, Tensor]:
        train(model, tmp_path, optim, weight_decay=0.1, optim_args=OPTIM_ARGS, **COSINE)
        return snapshot(model)

    def model() -> PreTrainedModel:
        return tiny_llama(tie_word_embeddings=True)

    found, expected, nearby = end(model(), f"{name}_layerwise"), end(model(), name), end(perturbed(model()), name)
    assert_same_but_for_rounding(found, expected, nearby, snapshot(model()))


# ---- the learning rate that a parameter really used


class DecaysAll(Trainer):
    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]


class NoGradient(Trainer):
    """Gradients of zero: all that a step does is to decay, W ← (1 − ηλ)W, which shows η."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss: Any = super().compute_loss(model, inputs, *args, **kwargs)
        return 0.0 * loss


class DecaysAllWithoutGradient(NoGradient, DecaysAll):
    pass


@pytest.mark.parametrize("name", NAMES)
def test_decay_uses_the_logged_learning_rate_for_every_parameter(name: str, tmp_path: Path) -> None:
    """Without hf_galore: weight decay ignored; layerwise, no schedule: every parameter used the peak rate."""
    overrides: dict[str, Any] = {"learning_rate": 0.1, "weight_decay": 1.0, **COSINE}
    trainer, recorder = train_recorded(tiny_llama(), tmp_path, name, DecaysAllWithoutGradient, **overrides)
    rates = logged(trainer, "learning_rate")
    assert len(set(rates)) == len(rates) == 10  # a constant rate would show nothing
    for rate, (before, after) in zip(rates, recorder.moves(), strict=True):
        for key in before:
            used = 1.0 - (after[key].double().norm() / before[key].double().norm()).item()
            assert used == pytest.approx(rate, abs=1e-6), key  # float32 rounds the weights to 6e-8 of themselves


@pytest.mark.parametrize("name", NAMES)
def test_norms_and_biases_do_not_decay(name: str, tmp_path: Path) -> None:
    """Without hf_galore: the 8-bit one decays everything by 0.01, norms and embeddings too."""
    model = tiny_llama(attention_bias=True)
    with torch.no_grad():
        for key, param in model.named_parameters():
            if key.endswith("bias"):
                param.normal_()  # transformers starts them at zero
    before = snapshot(model)
    train(model, tmp_path, name, NoGradient, weight_decay=0.5, max_steps=3)
    for key, param in model.named_parameters():
        undecayed = "norm" in key or key.endswith("bias")
        assert torch.equal(param, before[key]) == undecayed, key


@pytest.mark.parametrize("name", [name for name in NAMES if "adamw" in name])
def test_updates_use_the_logged_learning_rate_and_the_given_betas(name: str, tmp_path: Path) -> None:
    """Without hf_galore: betas and epsilon ignored, layerwise schedules never applied.

    With β₁ = β₂ = 0 and no ε, N is the sign of the gradient: a full-rank element moves by η, and a target by a matrix
    of norm η·scale·√(elements of R), since its basis is orthonormal.
    """
    model = tiny_llama()
    overrides: dict[str, Any] = {"adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 1e-30, **COSINE}
    trainer, recorder = train_recorded(model, tmp_path, name, **overrides)
    rates = logged(trainer, "learning_rate")
    assert len(set(rates)) == len(rates) == 10
    for rate, (before, after) in zip(rates, recorder.moves(), strict=True):
        for key in before:
            move = (after[key] - before[key]).double()
            if "proj" in key:
                shape = tuple(move.shape)
                elements = torch.Size(low_rank_shape(shape, side_of(shape, "std"), RANK)).numel()
                used = move.norm().item() / (SCALE * elements**0.5)
            else:
                used = move.abs().max().item()
            # Weights of up to 1 are rounded to 1.2e-7, moves are 1e-3 and more; bases are orthonormal to 1e-5.
            assert used == pytest.approx(rate, rel=2e-4, abs=1e-9), key


class ConstantGradient(Trainer):
    """A loss that is linear in the weights: each gradient, each basis and so each N is the same in every step."""

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        products = [(param * torch.randn(param.shape, generator=generator)).sum() for param in model.parameters()]
        return torch.stack(products).sum()


@pytest.mark.parametrize("name", [name for name in NAMES if "adafactor" in name])
def test_adafactor_updates_use_the_logged_learning_rate(name: str, tmp_path: Path) -> None:
    """Without hf_galore: `galore_adafactor_layerwise` did not start, and no layerwise schedule was ever applied.

    With N the same in every step, the moves are as the rates; a vector's N is the sign of its gradient.
    """
    trainer, recorder = train_recorded(tiny_llama(), tmp_path, name, ConstantGradient, **COSINE)
    rates = logged(trainer, "learning_rate")
    peak = rates.index(max(rates))
    moves = [{key: (after[key] - before[key]).double() for key in before} for before, after in recorder.moves()]
    for rate, move in zip(rates, moves, strict=True):
        for key, moved in move.items():
            # Weights of up to 1 are rounded to 1.2e-7, moves are 1e-3 and more.
            expected = moves[peak][key].norm().item() * rate / rates[peak]
            assert moved.norm().item() == pytest.approx(expected, rel=2e-4, abs=1e-9), key
            if moved.ndim == 1:
                assert moved.abs().max().item() == pytest.approx(rate, rel=2e-4, abs=1e-9), key


# ---- the logged norm


class WithTwin(Trainer):
    """Computes each step's gradient on a second model, which no optimizer and no hook knows, and keeps its norm."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        twin = tiny_llama(1, tie_word_embeddings=True).train()
        twin.load_state_dict(model.state_dict())
        twin(**self._prepare_inputs(inputs)).loss.backward()
        loss: Tensor = super().training_step(model, inputs, *args, **kwargs)

        gradients, low_rank = [], []
        for param, own in zip(twin.parameters(), model.parameters(), strict=True):
            assert param.grad is not None
            state = optimizer_of(self).state[own]
            gradients.append(param.grad.norm())
            # By now a refresh that was due has happened.
            bases = Bases(state.get("basis_left"), state.get("basis_right"))
            low_rank.append(project(param.grad, bases).norm())
        if not hasattr(self, "norms"):
            self.norms: list[float] = []
            self.low_rank_norms: list[float] = []
        self.norms.append(torch.stack(gradients).norm().item())
        self.low_rank_norms.append(torch.stack(low_rank).norm().item())
        return loss


@pytest.mark.parametrize("name", NAMES)
def test_the_logged_norm_is_that_of_the_whole_gradient(name: str, tmp_path: Path) -> None:
    """Without hf_galore: layerwise logged 0.0. A tied weight counts once, with both its gradients summed."""
    trainer = train(tiny_llama(tie_word_embeddings=True), tmp_path, name, WithTwin, optim_args=EXACT_ARGS)
    assert isinstance(trainer, WithTwin)
    found = logged(trainer, "grad_norm")
    assert len(set(trainer.norms)) == len(found) == 8
    assert found == pytest.approx(trainer.norms, rel=1e-5)  # sums in another order


@pytest.mark.parametrize("name", LAYERWISE)
def test_the_logged_norm_is_that_of_the_low_rank_gradient_where_there_is_no_other(name: str, tmp_path: Path) -> None:
    """The projected backward builds no gradient of a target, on any step but a refresh."""
    trainer = train(tiny_llama(tie_word_embeddings=True), tmp_path, name, WithTwin)
    assert isinstance(trainer, WithTwin)
    found = logged(trainer, "grad_norm")
    assert found == pytest.approx(trainer.low_rank_norms, rel=1e-5)
    # Rank 16 keeps nearly all of a gradient of 64 tokens in the step that it is taken from, and less later.
    assert min(low / whole for low, whole in zip(trainer.low_rank_norms, trainer.norms, strict=True)) < 0.9


# ---- hooks


class InterruptedRunError(Exception):
    pass


class Interrupt(TrainerCallback):
    """Ends a run between the backward pass and the end of its second step."""

    def on_optimizer_step(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._look(kwargs["model"])


@pytest.mark.parametrize("name", NAMES)
def test_weights_stay_where_they_are_and_gradients_full_rank(name: str, tmp_path: Path) -> None:
    """Without hf_galore: the 8-bit step replaces the parameter's storage and leaves a low-rank `p.grad`."""
    model = tiny_llama()
    parameters = {key: id(param) for key, param in model.named_parameters()}
    trainer = make_trainer(model, tmp_path, name)
    storages = Storages()
    trainer.add_callback(storages)
    trainer.train()
    assert {key: len(addresses) for key, addresses in storages.addresses.items()} == dict.fromkeys(parameters, 1)
    assert {key: id(param) for key, param in model.named_parameters()} == parameters
    assert storages.misshapen == []
    # Layerwise gradients are gone before the optimizer's step.
    assert (storages.gradients == 0) == (name in LAYERWISE)


class NewTensors(TorchDispatchMode):
    """The shapes of the tensors that operations return in storages that were not there before."""

    def __init__(self, known: list[Tensor]) -> None:
        super().__init__()
        self._known = {tensor.untyped_storage().data_ptr() for tensor in known}
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor) and tensor.untyped_storage().data_ptr() not in self._known:
                self.shapes.append(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit"])
def test_a_step_makes_no_tensor_of_a_targets_size(name: str, tmp_path: Path) -> None:
    """Without hf_galore: the 8-bit step clones the weight. (Between refreshes: a factorisation works on a copy.)"""
    model = tiny_llama()
    trainer = make_trainer(model, tmp_path, name, optim_args="rank=8, update_proj_gap=100")
    optimizer = trainer.create_optimizer()
    tokens = torch.arange(32).reshape(2, 16)
    for _ in range(2):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        gradients = [param.grad for param in model.parameters() if param.grad is not None]
        known = [*model.parameters(), *gradients, *(t for state in optimizer.state.values() for t in state.values())]
        with NewTensors(known) as new:
            optimizer.step()
    targets = {tuple(param.shape) for key, param in model.named_parameters() if "proj" in key}
    assert targets == {(64, 64), (256, 64), (64, 256)}
    assert {(8, 256), (256, 8)} <= set(new.shapes)  # low-rank ones are seen
    assert targets & set(new.shapes) == set()


@pytest.mark.parametrize("name", NAMES)
def test_state_owns_no_more_memory_than_it_shows(name: str, tmp_path: Path) -> None:
    """Without hf_galore: with float32 weights P is a view that keeps the whole U or Vh alive."""
    trainer = train(tiny_llama(), tmp_path, name, max_steps=GAP + 2)
    tensors = [tensor for state in optimizer_of(trainer).state.values() for tensor in state.values()]
    assert len(tensors) > 21 * 2
    for tensor in tensors:
        assert tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()


# ---- the bits of embeddings' moments


@pytest.mark.parametrize(
    ("bits", "quantized"), [("", False), (", embedding_bits=32", False), (", embedding_bits=8", True)]
)
def test_embedding_bits(bits: str, quantized: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = train(model, tmp_path, "galore_adamw_8bit_layerwise", optim_args=OPTIM_ARGS + bits, max_steps=2)
    state = optimizer_of(trainer).state
    assert ("exp_avg_absmax" in state[model.model.embed_tokens.weight]) is quantized
    assert "exp_avg_absmax" in state[model.lm_head.weight], "the head is no embedding"


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adafactor_layerwise"])
def test_embedding_bits_are_for_the_8_bit_optimizers(optim: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"embedding_bits=8 is for the 8-bit optimizers, and '{optim}' is none"):
        train(tiny_llama(), tmp_path, optim, optim_args=OPTIM_ARGS + ", embedding_bits=8")
