"""A recipe of `hf-galore dpo`: the keys of `trl dpo`, and the Trainer that they describe."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from trl import (
    DatasetMixtureConfig,
    DPOConfig,
    DPOTrainer,
    ScriptArguments,
)

from ..config import nearest
from ..errors import UserError
from .data_loading import first_row, reporting_unreadable, split_of
from .output_folder import OutputArguments
from .parser import parse_into
from .rows import message_problem, numbered_rows
from .run_record import RecordedTrainer
from .trl_recipe import Checked, TrlRecipe, check_without_data, load_splits, load_trainer
from .weight_bits import ModelArguments

DATACLASSES = (ScriptArguments, DPOConfig, ModelArguments, DatasetMixtureConfig, OutputArguments)
"""Their fields are the keys of a recipe, as of `trl dpo`, but for the last one's and `weight_bits`."""

_NEEDS = (
    "DPO needs 'chosen' and 'rejected', an answer that is preferred to another, and 'prompt' where they do not begin "
    "with it: all of them texts, or all of them conversations, which are lists of role and content."
)


_COLUMNS = ("prompt", "chosen", "rejected")


class Arguments(TrlRecipe[DPOConfig]):
    """What a recipe and the command line say, by the names of `trl dpo`."""

    @property
    def command(self) -> str:
        """The command of `hf-galore` that this is for."""
        return "dpo"

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation's result is told by, the best first: how often what is preferred is preferred."""
        return ("rewards/accuracies",)

    def check(self) -> Checked:
        """Check all that can be checked before the weights are loaded; see `check`."""
        return check(self)

    def make_trainer(self, checked: Checked | None = None) -> RecordedDPOTrainer:
        """Make the Trainer; see `make_trainer`."""
        return make_trainer(self, checked)


class RecordedDPOTrainer(RecordedTrainer, DPOTrainer):  # type: ignore[misc, unused-ignore]
    """A DPOTrainer that leaves a record of its run."""


def parse(arguments: Sequence[str], prog: str, about: str) -> Arguments:
    """Read a command's arguments, with the arguments and errors of `parser.parse_into`."""
    (script, training, model, dataset, output), path, given = parse_into(DATACLASSES, arguments, prog, about)
    return Arguments(script, training, model, dataset, path, output, given)


def check(parsed: Arguments) -> Checked:
    """Check the arguments, the model's config, the tokenizer and every row of the data; the cheapest first.

    `output_dir` is there afterwards, and `resume_from_checkpoint` is the folder that it means.

    Raises:
        UserError: something in the arguments or in the data is wrong.
    """
    training = parsed.training
    check_options(training, streaming=parsed.script.dataset_streaming)
    processing_class = check_without_data(parsed)
    splits = load_splits(parsed.script, parsed.dataset, training.seed)
    train = _split(splits, parsed.script.dataset_train_split, "dataset_train_split", parsed, processing_class)
    evaluated = None
    if training.eval_strategy != "no":
        evaluated = _split(splits, parsed.script.dataset_test_split, "dataset_test_split", parsed, processing_class)
    return Checked(train, evaluated, processing_class)


def make_trainer(parsed: Arguments, checked: Checked | None = None) -> RecordedDPOTrainer:
    """Check a recipe, load the model, and make the Trainer.

    The reference is the model as it is loaded: a copy of it in memory, or with `precompute_ref_log_probs` what it says
    of the data, computed before the first step. A model of which adapters are trained is its own reference.

    Args:
        parsed: the recipe.
        checked: what checking it has loaded, where that is done.

    Raises:
        UserError: something in the arguments or in the data is wrong.
    """
    return load_trainer(
        RecordedDPOTrainer, str(parsed.model_name), parsed.training, parsed.model, checked or check(parsed)
    )


# ---- what TRL would say late, or ignore


def check_options(training: DPOConfig, *, streaming: bool = False) -> None:
    """Check options that TRL's DPOTrainer checks when the model has been loaded, or at the first step, or not at all.

    Raises:
        UserError: they do not go together, or one of them is of no effect.
    """
    known = re.findall(r"'(\w+)'", DPOConfig.__dataclass_fields__["loss_type"].metadata["help"])
    for name in training.loss_type:
        if "sigmoid" in known and name not in known:
            raise UserError(f"loss_type {name!r} has to be one of {', '.join(known)}.{nearest(name, known)}")
    if getattr(training, "padding_free", False):
        raise UserError("padding_free has no effect with TRL's DPOTrainer, which pads all the same. Leave it out.")
    beforehand = "precompute_ref_log_probs goes through all data once before the first step"
    if training.precompute_ref_log_probs and streaming:
        raise UserError(f"{beforehand}, which a stream has no end for. Leave out dataset_streaming or the former.")
    if not training.sync_ref_model:
        return
    if training.precompute_ref_log_probs:
        raise UserError(f"sync_ref_model changes the reference while it trains; {beforehand}. Leave out one of them.")
    if training.resume_from_checkpoint:
        raise UserError(
            "resume_from_checkpoint: a checkpoint does not hold the reference, which sync_ref_model has changed since "
            "the run began. Such a run cannot go on; begin anew, with another --output_dir."
        )


# ---- data


def _split(splits: Any, name: str, key: str, parsed: Arguments, processing_class: Any) -> Any:
    split, where = split_of(splits, name, key), f"The dataset's split {name!r}"
    first = first_row(split, where)
    if first is None:
        raise UserError(f"{where} is empty.")
    check_pair(first, where)
    if not isinstance(first["chosen"], str) and processing_class.chat_template is None:
        raise UserError(
            f"model_name_or_path {parsed.model_name} has no chat template, which conversations need. DPO begins where "
            "a model has learnt to answer: give one that has, such as the output_dir of a run of hf-galore sft."
        )
    if hasattr(split, "__len__"):
        with reporting_unreadable(where):
            for number, row in numbered_rows(split, [name for name in _COLUMNS if name in first]):
                check_pair(row, where, number)
    return split


def check_pair(row: Mapping[str, Any], where: str, number: int = 1) -> None:
    """Check that a row of data is a pair of answers of which one is preferred.

    Args:
        row: the row.
        where: how an error begins that says what the row has.
        number: the row's, counted from 1.

    Raises:
        UserError: it is none.
    """
    if not {"chosen", "rejected"} <= set(row):
        hint = (
            " Data with 'messages' or 'completion' are for hf-galore sft."
            if {"messages", "completion"} & set(row)
            else ""
        )
        raise UserError(f"{where} has the columns {', '.join(row)}. {_NEEDS}{hint}")
    found = {name: _kind(row[name]) for name in _COLUMNS if name in row}
    if len(set(found.values())) > 1 or None in found.values():
        told = ", ".join(f"{name} is {kind or f'of {type(row[name]).__name__}'}" for name, kind in found.items())
        hint = ""
        if found.get("prompt") == "a text" and found["chosen"] == found["rejected"] == "a conversation":
            hint = " Where the conversations begin with the prompt, leave out the column 'prompt'."
        which = "a first row" if number == 1 else f"a row, number {number},"
        raise UserError(f"{where} has {which} of which {told}. {_NEEDS}{hint}")


def _kind(value: Any) -> str | None:
    if isinstance(value, str):
        return "a text"
    if isinstance(value, list) and value and all(message_problem(one) is None for one in value):
        return "a conversation"
    return None
