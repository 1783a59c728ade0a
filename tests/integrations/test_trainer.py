"""The six names under `Trainer` and `SFTTrainer`: what each step does to each weight, and what is left behind."""

from __future__ import annotations

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

from hf_galore.lowrank.projection import Bases, low_rank_shape, project, side_of
from tests.support.helpers import (
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
from tests.support.interrupted import AfterTwoSteps, BeforeUpdate, train_until

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

    def training_step(self, model: nn.Module, inputs: dict[str, Any], items: Any = None) -> Tensor:
        twin = tiny_llama(1, tie_word_embeddings=True).train()
        twin.load_state_dict(model.state_dict())
        # Releases of transformers divide by different numbers of labels: by as many as the step below is told.
        twin(**self._prepare_inputs(inputs), num_items_in_batch=items).loss.backward()
        loss: Tensor = super().training_step(model, inputs, items)

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
def test_the_logged_norm_is_estimated_where_there_is_no_gradient(name: str, tmp_path: Path) -> None:
    """The projected backward builds no gradient of a target, on any step but a refresh."""
    trainer = train(tiny_llama(tie_word_embeddings=True), tmp_path, name, WithTwin)
    assert isinstance(trainer, WithTwin)
    assert logged(trainer, "grad_norm") == pytest.approx(trainer.norms, rel=0.04)
    assert logged(trainer, "grad_norm") != pytest.approx(trainer.low_rank_norms, rel=0.04)


@pytest.mark.parametrize("name", LAYERWISE)
def test_without_probes_the_logged_norm_is_that_of_the_low_rank_gradient(name: str, tmp_path: Path) -> None:
    """And so it was."""
    optim_args = f"{OPTIM_ARGS}, norm_probes=0"
    trainer = train(tiny_llama(tie_word_embeddings=True), tmp_path, name, WithTwin, optim_args=optim_args)
    assert isinstance(trainer, WithTwin)
    found = logged(trainer, "grad_norm")
    assert found == pytest.approx(trainer.low_rank_norms, rel=1e-5)
    # Rank 16 keeps nearly all of a gradient of 64 tokens in the step that it is taken from, and less later.
    assert min(low / whole for low, whole in zip(trainer.low_rank_norms, trainer.norms, strict=True)) < 0.9


# ---- hooks


def interrupted_trainer(model: nn.Module, output_dir: Path, name: str) -> Trainer:
    """A trainer whose run ended in an exception."""
    trainer = train_until(BeforeUpdate(), make_trainer(model, output_dir, name))
    assert trainer.state.global_step == 1
    return trainer


@pytest.mark.parametrize("name", NAMES)
def test_no_hook_is_left_after_training(name: str, tmp_path: Path) -> None:
    """Without hf_galore: hooks stay on the model. A backward pass after training is nobody's step."""
    model = tiny_llama()
    before, kinds = hooks_on(model), [type(module) for module in model.modules()]
    during: list[int] = []

    class Count(TrainerCallback):
        def on_step_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
            during.append(hooks_on(model))

    trainer = make_trainer(model, tmp_path, name, max_steps=2)
    trainer.add_callback(Count())
    trainer.train()
    assert hooks_on(model) == before
    assert [type(module) for module in model.modules()] == kinds
    assert (min(during) > before) == (name in LAYERWISE)  # that they are counted at all

    trained = snapshot(model)
    tokens = torch.arange(12).reshape(1, 12)
    model(input_ids=tokens, labels=tokens).loss.backward()
    assert_identical(snapshot(model), trained)
    assert all(param.grad is not None for param in model.parameters())


@pytest.mark.parametrize("second", ["adamw_torch", "galore_adamw", "galore_adamw_8bit_layerwise"])
@pytest.mark.parametrize("interrupted", [False, True], ids=["after a finished run", "after an interrupted run"])
@pytest.mark.parametrize("first", ["galore_adamw_layerwise"])
def test_a_second_trainer_does_its_own_updates_only(first: str, second: str, interrupted: bool, tmp_path: Path) -> None:
    """Without hf_galore: a later trainer on the same model ran 66 updates instead of 3. The first is alive here."""
    model = tiny_llama()
    earlier = interrupted_trainer(model, tmp_path, first) if interrupted else train(model, tmp_path, first, max_steps=2)
    fresh = tiny_llama(1)
    fresh.load_state_dict(model.state_dict())

    trainer = train(model, tmp_path, second, max_steps=4)
    alone = train(fresh, tmp_path, second, max_steps=4)
    assert_identical(snapshot(model), snapshot(fresh))
    assert_identical(optimizer_of(trainer).state_dict()["state"], optimizer_of(alone).state_dict()["state"])
    steps = [state["step"].item() for state in optimizer_of(trainer).state.values()]
    assert steps == [4] * len(list(model.parameters()))
    assert {state["step"].item() for state in optimizer_of(earlier).state.values()} <= {1, 2}
    assert hooks_on(model) == 0


@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("interrupted", [False, True], ids=["finished", "interrupted"])
def test_the_same_trainer_trains_again(plain: str, interrupted: bool, tmp_path: Path) -> None:
    """Its second run is that of the plain optimizer, schedule and all."""

    def run(name: str) -> dict[str, Tensor]:
        model = tiny_llama()
        trainer = make_trainer(model, tmp_path, name, optim_args=EXACT_ARGS, **COSINE)
        if interrupted:
            # Between two steps: in the middle of one, a layerwise run is already a step further.
            train_until(AfterTwoSteps(), trainer)
        else:
            trainer.train()
        first = snapshot(model)
        trainer.train()
        assert not torch.equal(first["lm_head.weight"], model.lm_head.weight)
        assert hooks_on(model) == 0
        return snapshot(model)

    assert_identical(run(f"{plain}_layerwise"), run(plain))


@pytest.mark.parametrize("name", LAYERWISE)
def test_no_hook_is_left_after_an_interruption(name: str, tmp_path: Path) -> None:
    """Without this the next optimizer of a notebook would find its gradients gone."""
    model = tiny_llama()
    kinds = [type(module) for module in model.modules()]
    trainer = interrupted_trainer(model, tmp_path, name)
    assert hooks_on(model) == 0
    assert [type(module) for module in model.modules()] == kinds

    optimizer = torch.optim.AdamW(model.parameters())
    before = snapshot(model)
    tokens = torch.arange(32).reshape(2, 16)
    model(input_ids=tokens, labels=tokens).loss.backward()
    optimizer.step()
    assert [key for key, param in model.named_parameters() if torch.equal(param, before[key])] == []
    assert trainer.optimizer is not None  # alive


def test_a_batch_that_does_not_fit_is_tried_again_smaller(tmp_path: Path) -> None:
    """`auto_find_batch_size` runs the training loop again, after an exception, with the optimizer that is there."""
    sizes: list[int] = []

    class Small(Trainer):
        def training_step(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            sizes.append(len(inputs["input_ids"]))
            if sizes[-1] > 3:
                raise RuntimeError("CUDA out of memory.")
            assert (hooks_on(model) > 0) == (optim in LAYERWISE)
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
            return loss

    ends = []
    for optim in ("galore_adamw", "galore_adamw_layerwise"):
        sizes.clear()
        model = tiny_llama()
        train(model, tmp_path, optim, Small, optim_args=EXACT_ARGS, max_steps=4, auto_find_batch_size=True)
        assert sizes == [4, 3, 3, 3, 3]
        assert hooks_on(model) == 0
        ends.append(snapshot(model))
    assert_identical(ends[1], ends[0])


def test_hooks_go_with_their_trainer(tmp_path: Path) -> None:
    """A trainer that has not begun has its hooks on; nothing but the trainer keeps them there."""
    model = tiny_llama()
    kinds = [type(module) for module in model.modules()]
    trainer = make_trainer(model, tmp_path, "galore_adamw_layerwise")
    trainer.create_optimizer()
    assert hooks_on(model) > 0
    del trainer
    gc.collect()
    assert hooks_on(model) == 0
    assert [type(module) for module in model.modules()] == kinds


def test_hooks_do_not_keep_the_model(tmp_path: Path) -> None:
    model = tiny_llama()
    trainer = make_trainer(model, tmp_path, "galore_adamw_layerwise")
    trainer.create_optimizer()
    alive = weakref.ref(model)
    del model, trainer
    gc.collect()
    assert alive() is None


# ---- parameters with several uses


class Shared(nn.Module):
    """A language model that runs one block three times, each run a checkpointed segment."""

    def __init__(self, use_reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, 32)
        self.block = nn.Sequential(nn.Linear(32, 48), nn.Tanh(), nn.Linear(48, 32))
        self.head = nn.Linear(32, VOCABULARY, bias=False)
        self.use_reentrant = use_reentrant

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        hidden = self.embed(input_ids)
        for _ in range(3):
            if self.use_reentrant is None:
                run = self.block(hidden)
            else:
                run = checkpoint(self.block, hidden, use_reentrant=self.use_reentrant)
            hidden = hidden + run
        logits = self.head(hidden)[:, :-1]
        return {"loss": nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())}


@pytest.mark.arithmetic
@pytest.mark.parametrize("plain", PLAIN)
@pytest.mark.parametrize("projected_backward", [True, False], ids=["projected backward", "gradients built"])
def test_a_parameter_shared_by_checkpointed_segments_takes_one_step(
    plain: str, projected_backward: bool, tmp_path: Path
) -> None:
    """Without hf_galore: layerwise with `use_reentrant=True` took one optimizer step per use."""

    def end(model: nn.Module, name: str, optim_args: str) -> dict[str, Tensor]:
        trainer = train(
            model, tmp_path, name, optim_args=optim_args, optim_target_modules=["block"], weight_decay=0.1, **COSINE
        )
        assert [state["step"].item() for state in optimizer_of(trainer).state.values()] == [10] * 6
        return snapshot(model)

    start = snapshot(Shared(None))
    expected, nearby = (end(model, plain, OPTIM_ARGS) for model in (Shared(None), perturbed(Shared(None))))
    layerwise_args = f"{OPTIM_ARGS}, projected_backward={projected_backward}"
    for use_reentrant in (True, False):
        # Not the same bits: the low-rank gradients of the three runs are added, instead of their sum projected.
        found = end(Shared(use_reentrant), f"{plain}_layerwise", layerwise_args)
        assert_same_but_for_rounding(found, expected, nearby, start)


@pytest.mark.parametrize("name", ["galore_adamw", "galore_adamw_8bit", *LAYERWISE[:2]])
def test_a_tied_parameter_is_updated_once(name: str, tmp_path: Path) -> None:
    """With the sign of the gradient for N (see above), an update's norm counts the updates."""
    model = tiny_llama(tie_word_embeddings=True)
    overrides: dict[str, Any] = {"adam_beta1": 0.0, "adam_beta2": 0.0, "adam_epsilon": 1e-30, "max_steps": 4}
    trainer, recorder = train_recorded(model, tmp_path, name, optim_target_modules=["lm_head"], **overrides)
    key = "model.embed_tokens.weight"
    for rate, (before, after) in zip(logged(trainer, "learning_rate"), recorder.moves(), strict=True):
        move = (after[key] - before[key]).norm().item()
        assert move == pytest.approx(rate * SCALE * (VOCABULARY * RANK) ** 0.5, rel=2e-4)  # as above
    assert optimizer_of(trainer).state[model.lm_head.weight]["step"].item() == 4


# ---- what a step leaves alone


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_between_steps_changes_nothing(name: str, tmp_path: Path) -> None:
    runs = []
    settings: list[dict[str, Any]] = [{}, {"eval_strategy": "steps", "eval_steps": 1}]
    for overrides in settings:
        model = tiny_llama()
        trainer = train(model, tmp_path, name, **overrides)
        assert len(logged(trainer, "eval_loss")) == (8 if overrides else 0)
        runs.append((snapshot(model), logged(trainer, "loss"), logged(trainer, "grad_norm")))
    assert_identical(runs[1], runs[0])


class Storages(TrainerCallback):
    """Where each weight lies and what shape its gradient has, at every moment that a callback sees."""

    def __init__(self) -> None:
        self.addresses: defaultdict[str, set[int]] = defaultdict(set)
        self.misshapen: list[str] = []
        self.gradients = 0

    def _look(self, model: nn.Module) -> None:
        for name, param in model.named_parameters():
            self.addresses[name].add(param.data_ptr())
            if param.grad is not None:
                self.gradients += param.grad.numel() > 0
                if param.grad.shape != param.shape:
                    self.misshapen.append(name)

    def on_step_begin(self, args: Arguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._look(kwargs["model"])

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
