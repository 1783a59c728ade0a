"""A recipe of `hf-galore sft`: the keys of `trl sft`, and the Trainer that they describe."""

from __future__ import annotations

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

from trl import (
    DatasetMixtureConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
)

from ..errors import UserError
from ..log import logger
from .data_loading import split_of
from .folders import recipes_folder
from .output_folder import OutputArguments
from .parser import parse_into
from .rows import prepare_rows
from .run_record import RecordedTrainer
from .templates import check_conversations, template_of
from .trl_recipe import Checked, TrlRecipe, check_without_data, load_splits, load_trainer
from .weight_bits import ModelArguments

DATACLASSES = (ScriptArguments, SFTConfig, ModelArguments, DatasetMixtureConfig, OutputArguments)
"""Their fields are the keys of a recipe, as of `trl sft`, but for the last one's and `weight_bits`."""


class Arguments(TrlRecipe[SFTConfig]):
    """What a recipe and the command line say, by the names of `trl sft`."""

    @property
    def command(self) -> str:
        """The command of `hf-galore` that this is for."""
        return "sft"

    def check(self) -> Checked:
        """Check all that can be checked before the weights are loaded; see `check`."""
        return check(self)

    def make_trainer(self, checked: Checked | None = None) -> RecordedSFTTrainer:
        """Make the Trainer; see `make_trainer`."""
        return make_trainer(self, checked)


class RecordedSFTTrainer(RecordedTrainer, SFTTrainer):  # type: ignore[misc, unused-ignore]
    """An SFTTrainer that leaves a record of its run."""


def parse(arguments: Sequence[str], prog: str, about: str) -> Arguments:
    """Read a command's arguments, with the arguments and errors of `parser.parse_into`."""
    (script, training, model, dataset, output), path, given = parse_into(DATACLASSES, arguments, prog, about)
    _find_template(training, path)
    if "chat_template_path" in given:
        given["chat_template_path"] = training.chat_template_path  # found from any folder
    return Arguments(script, training, model, dataset, path, output, given)


def _find_template(training: SFTConfig, recipe: Path | None) -> None:
    """Let a recipe name a template beside it or in a folder beside its own, from whatever folder it is run.

    A copy of a recipe that comes with hf_galore finds what that names. In an installed package the folder of recipes
    has another name.
    """
    name = training.chat_template_path
    if name is None or Path(name).exists():
        return
    places = [] if recipe is None else [folder / name for folder in recipe.resolve().parents[:2]]
    if Path(name).parts[:1] == ("recipes",):
        places.append(recipes_folder() / Path(name).relative_to("recipes"))
    for place in places:
        if place.exists():
            training.chat_template_path = str(place)
            return


def check(parsed: Arguments) -> Checked:
    """Check the arguments, the model's config, the tokenizer and every row of the data; the cheapest first.

    `output_dir` is there afterwards, and `resume_from_checkpoint` is the folder that it means.

    Raises:
        UserError: something in the arguments or in the data is wrong.
    """
    training = parsed.training
    processing_class = check_without_data(parsed)
    template = template_of(training, processing_class)
    splits = load_splits(parsed.script, parsed.dataset, training.seed)

    def split(name: str, key: str) -> Any:
        rows = split_of(splits, name, key)
        if (training.dataset_kwargs or {}).get("skip_prepare_dataset"):
            return rows
        rows = prepare_rows(
            rows,
            name,
            given=f"dataset_name {parsed.data_name}",
            text_field=training.dataset_text_field,
            assistant_only=training.assistant_only_loss,
            template=template,
        )
        check_conversations(training, processing_class, template, str(parsed.model_name), next(iter(rows)))
        return rows

    train = split(parsed.script.dataset_train_split, "dataset_train_split")
    evaluated = None
    if training.eval_strategy != "no":
        evaluated = split(parsed.script.dataset_test_split, "dataset_test_split")
    return Checked(train, evaluated, processing_class)


def make_trainer(parsed: Arguments, checked: Checked | None = None) -> RecordedSFTTrainer:
    """Check a recipe, load the model, and make the Trainer.

    Args:
        parsed: the recipe.
        checked: what checking it has loaded, where that is done.

    Raises:
        UserError: something in the arguments or in the data is wrong.
    """
    checked = checked or check(parsed)
    trainer = load_trainer(RecordedSFTTrainer, str(parsed.model_name), parsed.training, parsed.model, checked)
    _say_what_is_left_out(parsed.training, "training", checked.train, trainer.train_dataset)
    if checked.evaluated is not None:
        _say_what_is_left_out(parsed.training, "evaluation", checked.evaluated, trainer.eval_dataset)
    return trainer


def _say_what_is_left_out(training: SFTConfig, purpose: str, before: Any, after: Any) -> None:
    """Say how many rows TRL leaves out without a word: those of which no token to learn is left once they are cut.

    Args:
        training: says where rows are cut.
        purpose: what the rows are for.
        before: the rows as loaded.
        after: the rows that the Trainer has.

    Raises:
        UserError: none is left.
    """
    if not isinstance(before, Sized) or not isinstance(after, Sized):  # read as it goes
        return
    why = f"no token to learn is left within max_length {training.max_length}"
    if len(after) == 0:
        raise UserError(f"all {len(before)} rows for {purpose} are left out: {why}. Give a larger one.")
    if not training.packing and len(after) < len(before):
        logger.warning("%d of %d rows for %s are left out: %s.", len(before) - len(after), len(before), purpose, why)
