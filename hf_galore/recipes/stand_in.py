"""A recipe's Trainer with stand-ins for what a plan can do without: the data, the tokenizer, the model's config."""

from __future__ import annotations

import contextlib
import copy
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import ModelConfig, SFTConfig

from ..errors import UserError
from ..integrations.trl_dpo import check_release, prepared_data
from ..plan.rehearsal import STEPS
from . import dpo, glue, pretrain, sft
from .any_recipe import Arguments
from .checks import galore_config
from .embedded_model import embedded
from .folders import configs_folder, known_models
from .glue_tasks import REGRESSION, TASKS
from .kinds import is_quickstart_recipe
from .trl_recipe import Checked, load_trainer


class Prepared(NamedTuple):
    """A recipe that is ready to be planned."""

    make_trainer: Callable[[], Trainer]
    """To be called where tensors are fake."""
    tokens_per_step: int
    notes: list[str]
    """What stands in for what."""


class Shape(NamedTuple):
    """What a search for settings has to know of a model."""

    layers: int
    smaller_side: int
    """Of most of its matrices: no rank above it projects them."""


class _Model(NamedTuple):
    name: str
    """Where its config is: a folder, or its name on the Hub."""
    config: Any
    tokenizer: Any
    notes: list[str]


def prepare(arguments: Arguments, layers: int | None = None) -> Prepared:
    """Prepare the Trainer that the recipe's command would make, for data of full length.

    The arguments are changed for that: they are of no use for a training afterwards.

    Raises:
        UserError: there is no such model, or something cannot be planned.
    """
    training = arguments.training
    galore_config(training)  # read now, for its mistakes
    if isinstance(arguments.model, ModelConfig) and (arguments.model.load_in_4bit or arguments.model.load_in_8bit):
        raise UserError("load_in_4bit and load_in_8bit: a model with quantized weights cannot be planned.")
    length = arguments.glue.max_length if isinstance(arguments, glue.Arguments) else arguments.training.max_length
    if length is None:
        raise UserError("max_length is empty: a plan is for sequences of that many tokens. Give it a number.")
    model = _find_model(arguments)
    _simplify(training)
    per_step = training.per_device_train_batch_size * training.gradient_accumulation_steps
    sizes = (STEPS * per_step, training.per_device_eval_batch_size if training.eval_strategy != "no" else 0)
    if isinstance(arguments, glue.Arguments):
        make = _glue_maker(arguments, model, length, sizes, layers)
    elif isinstance(arguments, dpo.Arguments):
        make = _preference_maker(arguments, model, length, sizes, layers)
        per_step *= 2  # a pair is two sequences
    else:
        make = _language_model_maker(arguments, model, length, sizes, layers)
    return Prepared(make, per_step * length, model.notes)


def _language_model_maker(
    arguments: sft.Arguments | pretrain.Arguments,
    model: _Model,
    length: int,
    sizes: tuple[int, int],
    layers: int | None,
) -> Callable[[], Trainer]:
    training = arguments.training
    packing = training.packing if training.eval_packing is None else training.eval_packing
    train, evaluated = _rows(sizes[0], length, training.packing), _rows(sizes[1], length, packing) if sizes[1] else None
    data = Checked(train, evaluated, model.tokenizer)

    def make_trainer() -> Trainer:
        if isinstance(arguments, pretrain.Arguments):
            config = copy.deepcopy(model.config) if layers is None else _cut(model.config, layers)
            return pretrain.make_pretraining_trainer(config, model.tokenizer, arguments, train, evaluated)
        with _folder_of(model, layers) as name:
            return load_trainer(sft.RecordedSFTTrainer, name, arguments.training, arguments.model, data)

    return make_trainer


def _preference_maker(
    arguments: dpo.Arguments, model: _Model, length: int, sizes: tuple[int, int], layers: int | None
) -> Callable[[], Trainer]:
    check_release()
    training = arguments.training
    dpo.check_options(training)
    # Of the prompt a single token, and so every position that there can be counts.
    pairs = datasets.Dataset.from_dict(
        {"prompt_ids": [[1]], "chosen_ids": [[1] * (length - 1)], "rejected_ids": [[1] * (length - 1)]}
    )
    train, evaluated = pairs.select([0] * sizes[0]), pairs.select([0] * sizes[1]) if sizes[1] else None
    data = Checked(train, evaluated, model.tokenizer)

    def make_trainer() -> Trainer:
        with _folder_of(model, layers) as name, prepared_data():
            return load_trainer(dpo.RecordedDPOTrainer, name, training, arguments.model, data)

    return make_trainer


def _glue_maker(
    arguments: glue.Arguments, model: _Model, length: int, sizes: tuple[int, int], layers: int | None
) -> Callable[[], Trainer]:
    task = TASKS.get(arguments.glue.task_name or "")
    is_regression = task is not None and task.metrics == REGRESSION
    labels = None if is_regression else ["0", "1"]  # a head of three rows is no larger to speak of
    row = {"input_ids": [[1] * length], "attention_mask": [[1] * length], "labels": [0.0 if is_regression else 0]}
    rows = datasets.Dataset.from_dict(row)
    train, evaluated = rows.select([0] * sizes[0]), rows.select([0] * sizes[1])

    def make_trainer() -> Trainer:
        with _folder_of(model, layers) as name:
            return glue.make_glue_trainer(name, arguments, labels, (), train, evaluated, model.tokenizer)

    return make_trainer


@contextlib.contextmanager
def _folder_of(model: _Model, layers: int | None) -> Iterator[str]:
    """The folder or name of a model's config; with `layers`, of a copy that has so many layers."""
    if layers is None:
        yield model.name
        return
    with tempfile.TemporaryDirectory() as folder:
        _cut(model.config, layers).save_pretrained(folder)
        yield folder


def _simplify(training: TrainingArguments) -> None:
    """Switch off what takes no memory on the device, and would need data, a tokenizer or the Hub."""
    training.report_to = []
    training.push_to_hub = False
    if isinstance(training, SFTConfig):
        training.dataset_kwargs = {**(training.dataset_kwargs or {}), "skip_prepare_dataset": True}
        training.assistant_only_loss = False  # every position counts: the most that there can be
        training.completion_only_loss = None
        training.eos_token = training.pad_token = None


def _rows(count: int, length: int, packed: bool) -> datasets.Dataset:
    """Rows of `length` tokens; packed ones hold two documents, which are not to see each other."""
    row: dict[str, list[Any]] = {"input_ids": [[1] * length], "labels": [[1] * length]}
    if packed:
        row["seq_lengths"] = [[length // 2, length - length // 2]]
    return datasets.Dataset.from_dict(row).select([0] * count)


# ---- the model's config and tokenizer


def shape_of(arguments: Arguments) -> Shape:
    """The shape of a recipe's model.

    Raises:
        UserError: there is no such model.
    """
    text = _find_model(arguments).config.get_text_config()
    return Shape(text.num_hidden_layers, text.hidden_size)


def _cut(config: Any, layers: int) -> Any:
    """The config with so many layers."""
    cut = copy.deepcopy(config)
    text = cut.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None):
        text.layer_types = text.layer_types[:layers]
    return cut


def _find_model(arguments: Arguments) -> _Model:
    """Find the config and a tokenizer: on this machine, or among those of hf_galore, or else on the Hub."""
    notes: list[str] = []
    name = tokenizer_name = arguments.model_name
    key = "model_name_or_path"
    options: dict[str, Any] = {}
    if isinstance(arguments, pretrain.Arguments):
        key, tokenizer_name = "config_name", arguments.model.tokenizer_name
    else:
        options["revision"] = arguments.model.model_revision
    if isinstance(arguments, (sft.Arguments, dpo.Arguments)):
        options["trust_remote_code"] = arguments.training.trust_remote_code
    if name is None and is_quickstart_recipe(arguments.recipe):
        name = tokenizer_name = str(embedded().model)  # which the quickstart trains
    if name is None:
        raise UserError(f"{key} is missing: give a model's name or folder.")
    place, config = find_config(key, name, options, notes)
    bundled = place != name  # what is not on this machine is not worth asking the Hub for
    found = None if tokenizer_name is None else find_tokenizer(tokenizer_name, {**options, "local_files_only": bundled})
    if found is None and not bundled:
        notes.append(f"The tokenizer of {name} is not there; its vocabulary is taken to be as large as the model's.")
    tokenizer = tokenizer_for(config) if found is None else found
    if not config.architectures:
        raise UserError(f"{key} {name}: its config.json does not say its architectures. Add them.")
    return _Model(place, config, tokenizer, notes)


def find_config(key: str, name: str, options: dict[str, Any], notes: list[str]) -> tuple[str, Any]:
    """Find the config of a model: on this machine, or among those of hf_galore, or else on the Hub.

    Args:
        key: what gave the name, for messages.
        name: its folder, or its name on the Hub.
        options: what `from_pretrained` takes.
        notes: where one is added, if it is not the one of that name on this machine.

    Returns:
        Where it is, and the config.

    Raises:
        UserError: there is none.
    """
    try:
        return name, AutoConfig.from_pretrained(name, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        bundled = configs_folder() / name
        if (bundled / "config.json").is_file():
            if "/" in name:  # on the Hub there may be another by now
                notes.append(f"The config of {name} is the one that comes with hf_galore: it is not on this machine.")
            return str(bundled), AutoConfig.from_pretrained(bundled)
        if Path(name).exists():
            raise UserError(f"{key} {name} cannot be loaded: {error}") from error
    try:
        return name, AutoConfig.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        known = ", ".join(known_models())
        raise UserError(
            f"{key} {name}: its config is neither on this machine nor to be had from the Hub ({error}) nor among those "
            f"that come with hf_galore ({known}). Give a folder with its config.json."
        ) from error


def find_tokenizer(name: str, options: dict[str, Any]) -> Any:
    """Find a model's tokenizer; `None` where there is none."""
    # transformers would make a folder without a tokenizer one with hardly a token.
    files = ("tokenizer", "vocab", "spiece")
    if Path(name).is_dir() and not any(path.name.startswith(files) for path in Path(name).iterdir()):
        return None
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError):
        return None


def tokenizer_for(config: Any) -> PreTrainedTokenizerFast:
    """Make a tokenizer with as many tokens as the model has rows: a template may add some to it."""
    size = config.get_text_config().vocab_size
    vocabulary = {f"<{index}>": index for index in range(size)}
    tokenizer = _Tokenizer(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")), eos_token="<1>", pad_token="<2>"
    )
    tokenizer.words = vocabulary
    return tokenizer


class _Tokenizer(PreTrainedTokenizerFast):  # type: ignore[misc, unused-ignore]
    """A tokenizer that has its vocabulary at hand: TRL asks for all of it once for each token that a template adds."""

    words: Mapping[str, int] = types.MappingProxyType({})

    def get_vocab(self) -> dict[str, int]:
        """All tokens, those that were added too."""
        return {**self.words, **self.added_tokens_encoder}
