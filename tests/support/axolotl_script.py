"""Runs configurations of axolotl in a process of its own, which axolotl's patches stay in, and writes what came of it.

`python -m tests.support.axolotl_script FOLDER`: reads `FOLDER/jobs.json`, a list of jobs, and writes
`FOLDER/results.json`, by the jobs' names. A job is `{"name": ..., "do": a function below, "config": {...}}`.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import yaml
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import TrainDatasetMeta, load_datasets
from axolotl.core.trainers import AxolotlTrainer
from axolotl.train import setup_model_and_trainer, train
from axolotl.utils.dict import DictDefault
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_galore.integrations import trainer as integration

Config = dict[str, Any]


class OwnOptimizerTrainer(AxolotlTrainer):
    """Makes AdamW, whatever it is asked for."""

    def create_optimizer(self, model: Any = None) -> Any:
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=self.args.learning_rate)
        return self.optimizer


class GivenOptimizerTrainer(AxolotlTrainer):
    """Is given AdamW, as by another plugin: what optim asks for is not looked at."""

    def __init__(self, *args: Any, model: Any, **kwargs: Any) -> None:
        super().__init__(*args, model=model, optimizers=(torch.optim.AdamW(model.parameters()), None), **kwargs)


def loaded(config: Config) -> Any:
    """The configuration as axolotl makes it."""
    return load_cfg(DictDefault(config))


def check(config: Config) -> Config:
    """Only read it, as every command of axolotl does first."""
    loaded(config)
    return {"registered": integration.is_registered()}


def parts(config: Config) -> Config:
    """What this axolotl no longer has as it is needed."""
    from hf_galore.integrations.axolotl_trainer import moved_parts

    return {"moved": moved_parts()}


def check_where_transformers_has_moved(config: Config) -> Config:
    """Read it where what `register` replaces is not there."""
    integration.unregister()
    with mock.patch.object(integration, "moved_internals", return_value=["Trainer.log is gone"]):
        return check(config)


def run(config: Config) -> Config:
    """Train by axolotl."""
    cfg = loaded(config)
    _, _, trainer = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))
    return told(trainer)


def resume(config: Config) -> Config:
    """Go on from a checkpoint, of which the log is marked: a run from the start would end with the same weights."""
    file = Path(config["resume_from_checkpoint"], "trainer_state.json")
    state = json.loads(file.read_text("utf-8"))
    state["log_history"][0]["from_checkpoint"] = 1
    file.write_text(json.dumps(state), "utf-8")
    return run(config)


def run_beside_the_trainer(config: Config) -> Config:
    """Train by axolotl, and by transformers' Trainer with the same data, and compare the weights."""
    cfg = loaded(config)
    data = load_datasets(cfg=cfg)
    _, _, trainer = train(cfg=cfg, dataset_meta=data)
    asked = trainer.args
    keys = (
        *("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "max_grad_norm", "seed"),
        *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "lr_scheduler_type", "use_cpu"),
    )
    own = Trainer(
        model=AutoModelForCausalLM.from_pretrained(
            config["base_model"], dtype=torch.float32, attn_implementation=config["attn_implementation"]
        ),
        args=TrainingArguments(
            output_dir=tempfile.mkdtemp(),
            report_to="none",
            save_strategy="no",
            average_tokens_across_devices=False,
            **{key: getattr(asked, key) for key in keys},
        ),
        train_dataset=data.train_dataset,
        data_collator=trainer.data_collator,
    )
    own.train()
    weights = dict(own.model.named_parameters())
    differing = [name for name, param in trainer.model.named_parameters() if not torch.equal(param, weights[name])]
    return {**told(trainer), "differing": differing}


def measure(config: Config) -> Config:
    """Train three steps for their memory, with data as a plan has them."""
    from hf_galore.plan import planner
    from hf_galore.recipes import axolotl_planning

    cfg = loaded(config)
    rows, evaluated = axolotl_planning.full_rows(cfg, "cpu")
    found = planner.measure(lambda: setup_model_and_trainer(cfg, TrainDatasetMeta(rows, evaluated, 3))[0])
    return found.as_dict()


def plan(config: Config) -> Config:
    """What a plan says of the memory on a CPU."""
    from hf_galore.recipes.axolotl_planning import plan_axolotl

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.yaml")
        file.write_text(yaml.safe_dump(config), "utf-8")
        return plan_axolotl(file, target="cpu").as_dict()


def told(trainer: Any) -> Config:
    """What a trainer trained with, and what it logged."""
    from hf_galore.optim.optimizer import GaLoreOptimizer

    optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
    ours = isinstance(optimizer, GaLoreOptimizer)
    return {
        "optimizer": type(optimizer).__name__,
        "groups": [
            {"rank": group.get("rank"), "initial_lr": group["initial_lr"], "parameters": len(group["params"])}
            for group in optimizer.param_groups
        ],
        "targets": len(list(optimizer.targets())) if ours else 0,
        "callbacks": [type(callback).__name__ for callback in trainer.callback_handler.callbacks],
        "logs": [entry for entry in trainer.state.log_history if "loss" in entry],
    }


def result_of(job: Config) -> Config:
    do: Callable[[Config], Config] = globals()[job["do"]]
    try:
        return do(job["config"])
    except Exception as error:
        return {"error": type(error).__name__, "message": str(error)}


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    jobs = json.loads((folder / "jobs.json").read_text("utf-8"))
    results = {job["name"]: result_of(job) for job in jobs}
    (folder / "results.json").write_text(json.dumps(results, default=str), "utf-8")
