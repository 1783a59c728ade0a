"""docs/examples/sentence_embeddings.py: a Trainer whose optimizer trains the weights of losses too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import TrainerCallback

from tests.support.examples import example
from tests.support.helpers import (
    assert_identical,
    assert_same_but_for_rounding,
    hooks_on,
    logged,
    optimizer_of,
    perturbed,
    snapshot,
)

pytest.importorskip("sentence_transformers")
from datasets import Dataset
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.evaluation import EmbeddingSimilarityEvaluator

program = example("sentence_embeddings")

# Bases unquantised: a code that rounding tips over is a difference of its own size.

ARGS = "rank=4, update_proj_gap=3, scale=1, proj_bits=16"
LAYERWISE = ("galore_adamw_layerwise", "galore_adamw_8bit_layerwise")


def labelled() -> Dataset:
    """Pairs of sentences with one of three labels."""
    pairs = program.tiny_pairs()
    rows = {
        "premise": pairs["anchor"],
        "hypothesis": pairs["positive"],
        "label": [row % 3 for row in range(len(pairs))],
    }
    return Dataset.from_dict(rows)


def one_loss(model: Any) -> tuple[Any, Any]:
    return program.tiny_pairs(), losses.MultipleNegativesRankingLoss(model)


def matryoshka(model: Any) -> tuple[Any, Any]:
    """Of parts of the embeddings, too."""
    return program.tiny_pairs(), losses.MatryoshkaLoss(model, losses.MultipleNegativesRankingLoss(model), [32, 16])


def with_weights(model: Any) -> tuple[Any, Any]:
    """A loss that has a classifier."""
    torch.manual_seed(1)
    return labelled(), losses.SoftmaxLoss(model, 32, 3)


def several(model: Any) -> tuple[Any, Any]:
    """A loss for each data set: a batch is of one, and the others' weights have no gradient."""
    (pairs, ranking), (rows, softmax) = one_loss(model), with_weights(model)
    return {"pairs": pairs, "rows": rows}, {"pairs": ranking, "rows": softmax}


def two_rankings(model: Any) -> tuple[Any, Any]:
    """Two data sets, and losses without weights."""
    pairs = program.tiny_pairs()
    loss = losses.MultipleNegativesRankingLoss(model)
    return {"first": pairs, "second": pairs.select(range(32))}, {"first": loss, "second": loss}


def in_parts(model: Any) -> tuple[Any, Any]:
    """Large batches in parts: each has a backward pass of its own inside of the loss's."""
    return program.tiny_pairs(), losses.CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)


def model() -> Any:
    """Without dropout, so that two runs see the same."""
    tiny = program.tiny_model()
    for module in tiny.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return tiny


def trainer(made: Any, setup: Any, folder: Path, optim: str, **others: Any) -> Any:
    data, loss = setup(made)
    common: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "dataloader_pin_memory": False,
        "learning_rate_mapping": {},
        "optim_args": ARGS,
    }
    return program.make_trainer(made, data, loss, str(folder), **{**common, "optim": optim, **others})


def ended(setup: Any, folder: Path, optim: str, *, near: bool = False, **others: Any) -> dict[str, Tensor]:
    made = perturbed(model()) if near else model()
    trainer(made, setup, folder, optim, **others).train()
    assert hooks_on(made) == 0
    return snapshot(made)


def assert_ends_as_plain(setup: Any, folder: Path, options: dict[str, Any]) -> None:
    """Layerwise ends where plain does, but for rounding."""
    found = ended(setup, folder, "galore_adamw_layerwise", **options)
    expected = ended(setup, folder, "galore_adamw", **options)
    nearby = ended(setup, folder, "galore_adamw", near=True, **options)
    start = snapshot(model())
    still = {name for name in start if "pooler" in name}  # BERT's own pooling, which nothing here uses
    assert {name for name, weight in expected.items() if torch.equal(weight, start[name])} == still
    assert_identical({name: found[name] for name in still}, {name: start[name] for name in still})
    for name in still:
        for end in (found, expected, nearby, start):
            del end[name]
    assert_same_but_for_rounding(found, expected, nearby, start)


@pytest.mark.parametrize(
    ("setup", "max_grad_norm"),
    [(one_loss, 0.0), (matryoshka, 1.0), (with_weights, 0.0), (several, 0.0), (several, 1.0)],
)
def test_layerwise_ends_where_plain_does(setup: Any, max_grad_norm: float, tmp_path: Path) -> None:
    clip = {"max_grad_norm": max_grad_norm, "optim_args": f"{ARGS}, projected_backward=true"}
    assert_ends_as_plain(setup, tmp_path, clip)


def test_a_loss_in_parts(tmp_path: Path) -> None:
    """Held, the parts add up; used at once there would be several updates a step, which is refused."""
    options = {"optim_args": f"{ARGS}, refresh=random"}
    assert_ends_as_plain(in_parts, tmp_path, options)
    with pytest.raises(RuntimeError, match=r"A second gradient arrived .*with a Trainer: max_grad_norm above 0"):
        ended(in_parts, tmp_path, "galore_adamw_layerwise", max_grad_norm=0.0)


@pytest.mark.parametrize("optim", LAYERWISE)
def test_learning_rates_by_name(optim: str, tmp_path: Path) -> None:
    """`learning_rate_mapping`: a group for each, decayed and not, that GaLore divides into targets and others."""
    made = trainer(
        model(),
        with_weights,
        tmp_path,
        optim,
        weight_decay=0.1,
        learning_rate_mapping={"classifier": 1e-2, r"embeddings\.": 1e-4},
    )
    made.create_optimizer()
    optimizer: Any = optimizer_of(made)
    rates = {name: group["lr"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {rates[name] for name in rates if "classifier" in name} == {1e-2}
    assert {rates[name] for name in rates if "embeddings" in name} == {1e-4}
    assert {rate for name, rate in rates.items() if "classifier" not in name and "embeddings" not in name} == {1e-3}
    assert len(optimizer.targets()) == 13
    decayed = {name: group["weight_decay"] for group in optimizer.param_groups for name in group["param_names"]}
    assert {decayed[name] for name in decayed if name.endswith("bias")} == {0.0}
    assert decayed["classifier.weight"] == 0.1
    optimizer.close()


class Looking(TrainerCallback):
    """Looks whether a layerwise optimizer's hooks are on the model."""

    def __init__(self) -> None:
        self.attached: list[bool] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.attached.append(kwargs["optimizer"].optimizer.hooks.attached)


@pytest.mark.parametrize("setup", [one_loss, several])
def test_training_a_second_time_is_layerwise_too(setup: Any, tmp_path: Path) -> None:
    """Several losses are one model while the optimizer is made, and nobody else keeps it: hooks did not come back."""
    made = trainer(model(), setup, tmp_path, "galore_adamw_layerwise", max_steps=2)
    looking = Looking()
    made.add_callback(looking)
    for _ in range(2):
        made.train()
    assert looking.attached == [True] * 4


@pytest.mark.parametrize("optim", LAYERWISE)
def test_a_resumed_run_is_the_uninterrupted_one(optim: str, tmp_path: Path) -> None:
    """With dropout; the example's rates, and bases in 4 bits. Weights of losses are in no checkpoint of theirs."""
    options: dict[str, Any] = {
        "save_strategy": "steps",
        "save_steps": 5,
        "learning_rate_mapping": {r"embeddings\.": 1e-4},
        "optim_args": "rank=4, update_proj_gap=3, scale=1",
    }
    whole, resumed = program.tiny_model(), program.tiny_model()
    trainer(whole, two_rankings, tmp_path, optim, **options).train()
    again = trainer(resumed, two_rankings, tmp_path, optim, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert_identical(snapshot(resumed), snapshot(whole))


def test_evaluation_changes_nothing(tmp_path: Path) -> None:
    pairs = program.tiny_pairs(8)
    scores = [row / 8 for row in range(8)]
    evaluator = EmbeddingSimilarityEvaluator(pairs["anchor"], pairs["positive"], scores, write_csv=False)
    expected = ended(one_loss, tmp_path, "galore_adamw_layerwise")
    made = trainer(model(), one_loss, tmp_path, "galore_adamw_layerwise")
    made.evaluator = evaluator
    made.eval_dataset = pairs
    made.args.eval_strategy, made.args.eval_steps = "steps", 2
    made.train()
    assert len(logged(made, "eval_loss")) == 4
    assert len(logged(made, "eval_spearman_cosine")) == 4
    assert_identical(snapshot(made.model), expected)
