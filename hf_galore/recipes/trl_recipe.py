"""What recipes of `hf-galore sft` and `dpo` have in common: the keys of TRL's commands, the model, the data."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

from transformers import TrainingArguments, set_seed
from trl import (
    DatasetMixtureConfig,
    ModelConfig,
    ScriptArguments,
    get_dataset,
    get_peft_config,
)

from ..errors import UserError
from ..integrations.devices import keep_to_one_gpu, one_device_map
from ..log import logger
from .checks import check_arguments, check_model, check_training, say_if_emulated, say_if_widened
from .data_loading import load_named, reading
from .output_folder import OutputArguments
from .run_record import RecordedTrainer
from .templates import load_processing_class
from .weight_bits import check_weight_bits, quantization_of

Config = TypeVar("Config", bound=TrainingArguments)
_Trainer = TypeVar("_Trainer", bound=RecordedTrainer)


@dataclasses.dataclass(frozen=True)
class TrlRecipe(Generic[Config]):
    """What a recipe and the command line say, by the names of TRL's commands. Iterating gives the fields' values."""

    script: ScriptArguments
    training: Config
    model: ModelConfig
    dataset: DatasetMixtureConfig
    recipe: Path | None
    """The recipe's file, if there is one."""
    output: OutputArguments
    given: dict[str, Any]
    """What was said, by the file and the command line."""

    def __iter__(self) -> Iterator[Any]:
        return (getattr(self, field.name) for field in dataclasses.fields(self))

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
        """The dataset for the model card: what has a name on the Hub."""
        name: str | None = self.script.dataset_name
        return None if name is None or Path(name).exists() else name

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation's result is told by, the best first: by its loss alone."""
        return ()


class Checked(NamedTuple):
    """What checking a recipe has loaded: all but the weights."""

    train: Any
    evaluated: Any
    processing_class: Any
    """The tokenizer, or the processor that has it."""


def check_without_data(parsed: TrlRecipe[Any]) -> Any:
    """Check the arguments, the model's config and files, the disk, who is logged in, and the tokenizer.

    `output_dir` is there afterwards, and `resume_from_checkpoint` is the folder that it means.

    Returns:
        The tokenizer, or the processor that has it.

    Raises:
        UserError: something is wrong with one of them.
    """
    training, model = parsed.training, parsed.model
    given = training.model_init_kwargs or {}
    check_arguments(training)
    _say_if_no_adapters(model)
    config = check_model(model, trust_remote_code=training.trust_remote_code, variant=given.get("variant"))
    if not config.architectures:
        raise UserError(
            f"The config of model_name_or_path {parsed.model_name} names no architectures, which TRL loads it by. "
            'Add them to its config.json, as in "architectures": ["LlamaForCausalLM"].'
        )
    keep_to_one_gpu(training, say="device_map" not in given)
    say_if_widened(model, training, config, given=given)
    dtype = given.get("dtype", model.dtype) or "float32"  # TRL's choice
    say_if_emulated(training, dtype)
    check_weight_bits(model, training, dtype)
    check_training(
        training,
        parsed.output,
        config,
        dtype=dtype,
        max_length=training.max_length,
        adapters=model.use_peft or model.load_in_4bit or model.load_in_8bit,
    )
    return load_processing_class(
        str(parsed.model_name),
        revision=given.get("revision", model.model_revision),
        trust_remote_code=training.trust_remote_code,
    )


def _say_if_no_adapters(model: ModelConfig) -> None:
    """Warn where something is said of adapters that nobody makes: TRL trains all weights then."""
    if model.use_peft:
        return
    plain = ModelConfig()
    named = (field.name for field in dataclasses.fields(model))
    of_adapters = (name for name in named if name.startswith("lora_") or name in ("use_rslora", "use_dora"))
    given = [name for name in of_adapters if getattr(model, name) != getattr(plain, name)]
    if given:
        logger.warning(
            "%s: this is of LoRA's adapters, and use_peft is not set, so all weights are trained. For adapters give "
            "use_peft: true; or else leave it out.",
            ", ".join(given),
        )


def load_trainer(
    kind: type[_Trainer], model: str, training_args: Any, model_args: ModelConfig, loaded: Checked
) -> _Trainer:
    """Load a model, and make the Trainer of a recipe.

    The model is on one device, unless `model_init_kwargs` have a `device_map` or a launcher has started several
    processes.

    Args:
        kind: the Trainer's class.
        model: the model's name or folder.
        training_args: the Trainer's arguments. Their `model_init_kwargs` get what recipes say of it elsewhere.
        model_args: how it is loaded.
        loaded: the data and the tokenizer; without one TRL loads the model's.
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
    return kind(
        model=model,
        args=training_args,
        train_dataset=loaded.train,
        eval_dataset=loaded.evaluated,
        processing_class=loaded.processing_class,
        quantization_config=quantization_of(model_args),
        peft_config=get_peft_config(model_args),
    )


def load_splits(script_args: ScriptArguments, dataset_args: DatasetMixtureConfig, seed: int) -> Any:
    """Load the splits of the dataset, or of the mixture, that a recipe names.

    Args:
        script_args: the dataset.
        dataset_args: the mixture, and which part of it is held out.
        seed: of the choice of what is held out, which TRL leaves to chance: a resumed run would learn what it held out.

    Raises:
        UserError: it names none or both, or what it names cannot be loaded.
    """
    name = script_args.dataset_name
    if name and dataset_args.datasets:
        raise UserError(f"Both dataset_name ({name}) and datasets are given; leave one out.")
    if dataset_args.datasets:
        set_seed(seed)
        with reading("datasets"):
            return get_dataset(dataset_args)
    if not name:
        raise UserError("dataset_name is missing: give a dataset's name or folder, or a list of them as datasets.")
    return load_named(
        f"dataset_name {name}", name, config=script_args.dataset_config, streaming=script_args.dataset_streaming
    )
