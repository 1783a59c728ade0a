"""Runs of LLaMA-Factory in a process of their own: `python -m tests.support.llamafactory_jobs JOBS OUTCOMES`.

The first file has, by name, a kind of run and the settings of a configuration; the second gets what came of them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llamafactory.hparams.parser as parser
import llamafactory.train.sft.workflow as workflow
from llamafactory.train.tuner import run_exp
from transformers import AutoModelForCausalLM, Trainer

import hf_galore


class _Made(Exception):  # noqa: N818  (no error)
    """Leaves LLaMA-Factory with the trainer that it has made."""


def trainer_of(settings: dict[str, Any]) -> Any:
    """The trainer that LLaMA-Factory makes of a configuration, before it trains."""
    theirs = workflow.CustomSeq2SeqTrainer

    def make(**keywords: Any) -> Any:
        raise _Made(theirs(**keywords))

    workflow.CustomSeq2SeqTrainer = make
    try:
        run_exp(settings)
    except _Made as made:
        return made.args[0]
    finally:
        workflow.CustomSeq2SeqTrainer = theirs
    raise AssertionError("LLaMA-Factory has made no trainer.")


def run(settings: dict[str, Any]) -> None:
    """As `llamafactory-cli train` does."""
    run_exp(settings)


def run_plain(settings: dict[str, Any]) -> None:
    """The Trainer itself, with LLaMA-Factory's arguments and batches."""
    theirs = trainer_of(settings)
    model = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"])
    sets = {"train_dataset": theirs.train_dataset, "eval_dataset": theirs.eval_dataset}
    trainer = Trainer(model=model, args=theirs.args, data_collator=theirs.data_collator, **sets)
    trainer.train()
    trainer.save_model()


def plan(settings: dict[str, Any]) -> dict[str, Any]:
    """A plan for a 24 GB card, on a machine that has none."""
    parser.is_torch_bf16_gpu_available = lambda: True
    return hf_galore.plan(lambda: trainer_of(settings), vram="24GB").as_dict()


def plan_and_measure(settings: dict[str, Any]) -> list[int]:
    """The peak of a CPU run, planned and measured."""
    planned = hf_galore.plan(lambda: trainer_of(settings), target="cpu")
    return [planned.peak_bytes, hf_galore.measure(lambda: trainer_of(settings)).peak_bytes]


def without_checks_of_packages(settings: dict[str, Any]) -> None:
    """As where all is installed that a setting of LLaMA-Factory's asks for."""
    parser._check_extra_dependencies = lambda *_: None
    run_exp(settings)


KINDS: dict[str, Callable[[dict[str, Any]], Any]] = {
    function.__name__: function for function in (run, run_plain, plan, plan_and_measure, without_checks_of_packages)
}


def _outcome(kind: str, settings: dict[str, Any]) -> Any:
    try:
        return KINDS[kind](settings)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def main(jobs: Path, written: Path) -> None:
    """Do each job; an error is an outcome too."""
    outcomes = {name: _outcome(*job) for name, job in json.loads(jobs.read_text("utf-8")).items()}
    written.write_text(json.dumps(outcomes), "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
