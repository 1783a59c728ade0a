"""A recipe of `hf-galore sft`: the keys of `trl sft`, and the Trainer that they describe."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    SFTConfig,
    SFTTrainer,
    get_dataset,
    get_peft_config,
    get_quantization_config,
)

from ..errors import UserError
from ..integrations.devices import keep_to_one_gpu, one_device_map
from .checks import check_arguments, check_model, say_if_widened
from .data_loading import load_dataset, split_of
from .folders import recipes_folder
from .output_folder import OutputArguments
from .parser import parse_into
from .run_record import RecordedTrainer

DATACLASSES = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig, OutputArguments)
"""Their fields are the keys of a recipe, as of `trl sft`, but for the last one's."""


class Arguments(NamedTuple):
    """What a recipe and the command line say, by the names of `trl sft`."""

    script: ScriptArguments
    training: SFTConfig
    model: ModelConfig
    dataset: DatasetMixtureConfig
    recipe: Path | None
    """The recipe's file, if there is one."""
    output: OutputArguments
    given: dict[str, Any]
    """What was said, by the file and the command line."""

    @property
    def command(self) -> str:
        """The command of `hf-galore` that this is for."""
        return "sft"

    @property
    def model_name(self) -> str | None:
        """The model's name or folder."""
        name: str | None = self.model.model_name_or_path
        return name

    @property
    def data_name(self) -> str:
        """The names or folders of the datasets."""
        if self.dataset.datasets:
            return ", ".join(str(one.path) for one in self.dataset.datasets)
        return str(self.script.dataset_name)

    @property
    def hub_dataset(self) -> str | None:
        """The dataset for the model card."""
        name: str | None = self.script.dataset_name
        return name

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation's result is told by, the best first: by its loss alone."""
        return ()

    def make_trainer(self) -> RecordedSFTTrainer:
        """Make the Trainer; see `make_trainer`."""
        return make_trainer(self)


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
    if name is None or recipe is None or Path(name).exists():
        return
    places = [folder / name for folder in recipe.resolve().parents[:2]]
    if Path(name).parts[:1] == ("recipes",):
        places.append(recipes_folder() / Path(name).relative_to("recipes"))
    for place in places:
        if place.exists():
            training.chat_template_path = str(place)
            return


def make_trainer(parsed: Arguments) -> RecordedSFTTrainer:
    """Check the arguments, load model and data, and make the Trainer.

    Raises:
        UserError: something in the arguments is wrong.
    """
    training = parsed.training
    check_arguments(training)
    config = check_model(parsed.model, trust_remote_code=training.trust_remote_code)
    say_if_widened(parsed.model, training, config, given=training.model_init_kwargs)
    splits = _load_splits(parsed.script, parsed.dataset)
    train = _split(splits, parsed.script.dataset_train_split, "dataset_train_split", training)
    evaluated = None
    if training.eval_strategy != "no":
        evaluated = _split(splits, parsed.script.dataset_test_split, "dataset_test_split", training)
    return make_sft_trainer(str(parsed.model_name), training, parsed.model, train, evaluated)


def make_sft_trainer(
    model: str,
    training_args: SFTConfig,
    model_args: ModelConfig,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any = None,
) -> RecordedSFTTrainer:
    """Make the Trainer of a recipe for a model, by name or folder, and data that have been loaded.

    It trains on one device, unless `model_init_kwargs` have a `device_map` or a launcher has started several processes.
    """
    given = training_args.model_init_kwargs or {}
    keep_to_one_gpu(training_args, say="device_map" not in given)
    device_map = one_device_map(training_args)
    training_args.model_init_kwargs = {
        "revision": model_args.model_revision,
        "trust_remote_code": training_args.trust_remote_code,
        "attn_implementation": model_args.attn_implementation,
        "dtype": model_args.dtype,
        **({} if device_map is None else {"device_map": device_map}),
        **given,
    }
    return RecordedSFTTrainer(
        model=model,
        args=training_args,
        train_dataset=train_dataset,
        eval_dataset=eval_dataset,
        processing_class=processing_class,
        quantization_config=get_quantization_config(model_args),
        peft_config=get_peft_config(model_args),
    )


# ---- data


def _load_splits(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig) -> Any:
    name = script_args.dataset_name
    if name and dataset_args.datasets:
        raise UserError(f"Both dataset_name ({name}) and datasets are given; leave one out.")
    if dataset_args.datasets:
        return get_dataset(dataset_args)
    if not name:
        raise UserError("dataset_name is missing: give a dataset's name or folder, or a list of them as datasets.")
    streaming = script_args.dataset_streaming
    return load_dataset(f"dataset_name {name}", name, name=script_args.dataset_config, streaming=streaming)


def _split(splits: Any, name: str, key: str, training_args: SFTConfig) -> Any:
    split = split_of(splits, name, key)
    columns = split.column_names
    if columns is None:  # a stream does not know its columns beforehand
        return split
    text = training_args.dataset_text_field
    usable = ({"messages"}, {"conversations"}, {"prompt", "completion"}, {text}, {"input_ids"})
    if not any(needed <= set(columns) for needed in usable):
        raise UserError(
            f"The dataset's split {name!r} has the columns {', '.join(columns)}. It needs 'messages' (lists of "
            f"role and content), 'prompt' and 'completion', {text!r} (dataset_text_field), or 'input_ids'."
        )
    return split
