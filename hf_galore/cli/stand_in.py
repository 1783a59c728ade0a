"""A recipe's Trainer with stand-ins for what a plan can do without: the data, the tokenizer, the model's config."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast, Trainer
from trl import SFTConfig

from hf_galore.rehearsal import STEPS

from . import recipe
from .errors import UserError
from .sft import galore_config, make_sft_trainer


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


def parse(arguments: Sequence[str], prog: str, about: str) -> recipe.Arguments:
    """Read a command's arguments as `recipe.parse` does, with the same errors; there need not be a GPU.

    Without one transformers refuses bf16, unless it is told that a CPU is meant. That comes last, after what anybody
    else may have said about `use_cpu`.
    """
    on_cpu = [] if torch.cuda.is_available() else ["--use_cpu", "true"]
    return recipe.parse([*arguments, *on_cpu], prog, about)


def prepare(arguments: recipe.Arguments, layers: int | None = None) -> Prepared:
    """A Trainer as `hf-galore sft` would make it, for data of full length.

    The arguments are changed for that: they are of no use for a training afterwards.

    Raises:
        UserError: there is no such model, or something cannot be planned.
    """
    training, model_args = arguments.training, arguments.model
    galore_config(training)  # read now, for its mistakes
    if model_args.load_in_4bit or model_args.load_in_8bit:
        raise UserError("load_in_4bit and load_in_8bit: a model with quantized weights cannot be planned.")
    length = training.max_length
    if length is None:
        raise UserError("max_length is empty: a plan is for sequences of that many tokens. Give it a number.")
    model = _find_model(arguments)
    _simplify(training)
    batch, accumulation = training.per_device_train_batch_size, training.gradient_accumulation_steps
    train = _rows(STEPS * batch * accumulation, length, training.packing)
    packing = training.packing if training.eval_packing is None else training.eval_packing
    evaluated = _rows(training.per_device_eval_batch_size, length, packing) if training.eval_strategy != "no" else None

    def make_trainer() -> Trainer:
        if layers is None:
            return make_sft_trainer(model.name, training, model_args, train, evaluated, model.tokenizer)
        with tempfile.TemporaryDirectory() as folder:
            _cut(model.config, layers).save_pretrained(folder)
            return make_sft_trainer(folder, training, model_args, train, evaluated, model.tokenizer)

    return Prepared(make_trainer, batch * accumulation * length, model.notes)


def _simplify(training: SFTConfig) -> None:
    """Put aside what takes no memory on the device, and would want what is not there."""
    training.dataset_kwargs = {**(training.dataset_kwargs or {}), "skip_prepare_dataset": True}
    training.assistant_only_loss = False  # every position counts: the most that there can be
    training.completion_only_loss = None
    training.eos_token = training.pad_token = None
    training.report_to = []
    training.push_to_hub = False


def _rows(count: int, length: int, packed: bool) -> datasets.Dataset:
    """Rows of `length` tokens; packed ones hold two documents, which are not to see each other."""
    row: dict[str, list[Any]] = {"input_ids": [[1] * length], "labels": [[1] * length]}
    if packed:
        row["seq_lengths"] = [[length // 2, length - length // 2]]
    return datasets.Dataset.from_dict(row).select([0] * count)


# ---- the model's config and tokenizer


def configs_folder() -> Path:
    """The configs of the recipes' models that come with hf_galore, in folders of their names on the Hub."""
    return recipe.recipes_folder() / "configs"


def shape_of(arguments: recipe.Arguments) -> Shape:
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


def _find_model(arguments: recipe.Arguments) -> _Model:
    """Where the config is to be read from, and a tokenizer: from this machine, or our own, or else from the Hub."""
    model_args, training = arguments.model, arguments.training
    if model_args.model_name_or_path is None:
        raise UserError("model_name_or_path is missing: give a model's name or folder.")
    name = model_args.model_name_or_path
    options = {"revision": model_args.model_revision, "trust_remote_code": training.trust_remote_code}
    notes: list[str] = []
    try:
        config = AutoConfig.from_pretrained(name, local_files_only=True, **options)
    except (OSError, ValueError) as error:
        bundled = configs_folder() / name
        if (bundled / "config.json").is_file():
            notes.append(f"The config of {name} is the one that comes with hf_galore: it is not on this machine.")
            config = AutoConfig.from_pretrained(bundled)
            return _Model(str(bundled), config, _tokenizer(config), notes)
        if Path(name).exists():
            raise UserError(f"model_name_or_path {name} cannot be loaded: {error}") from error
        try:
            config = AutoConfig.from_pretrained(name, **options)
        except (OSError, ValueError) as error:
            known = ", ".join(known_models())
            raise UserError(
                f"model_name_or_path {name}: its config is neither on this machine nor to be had from the Hub "
                f"({error}) nor among those that come with hf_galore ({known}). Give a folder with its config.json."
            ) from error
    # transformers would make a folder without a tokenizer one with hardly a token.
    missing = Path(name).is_dir() and not any(Path(name).glob(f"{kind}*") for kind in ("tokenizer", "vocab", "spiece"))
    try:
        tokenizer = None if missing else AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError, ImportError):
        tokenizer = None
    if tokenizer is None:
        notes.append(f"The tokenizer of {name} is not there; its vocabulary is taken to be as large as the model's.")
        tokenizer = _tokenizer(config)
    if not config.architectures:
        raise UserError(f"model_name_or_path {name}: its config.json does not say its architectures. Add them.")
    return _Model(name, config, tokenizer, notes)


def known_models() -> list[str]:
    """The models whose configs come with hf_galore."""
    return sorted(str(path.parent.relative_to(configs_folder())) for path in configs_folder().rglob("config.json"))


def _tokenizer(config: Any) -> PreTrainedTokenizerFast:
    """A tokenizer that nobody asks for tokens: what counts is how many it has, where a template adds some."""
    size = config.get_text_config().vocab_size
    vocabulary = {f"<{index}>": index for index in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="<0>")), eos_token="<1>", pad_token="<2>"
    )
