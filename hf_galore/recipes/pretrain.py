"""A recipe of `hf-galore pretrain`: a model from scratch, its keys, and the Trainer that they describe."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed
from trl import ScriptArguments, SFTConfig, SFTTrainer

from ..config import nearest
from ..errors import UserError
from ..integrations.devices import keep_to_one_gpu
from ..integrations.int8_model import quantize_weights_
from ..log import logger
from .checks import check_arguments, check_training
from .folders import configs_folder, known_models
from .output_folder import OutputArguments
from .parser import parse_into
from .run_record import RecordedTrainer
from .stream_position import keep_position
from .templates import check_tokenizer_files
from .text_data import load_text
from .weight_bits import CHOICES, HELP, check_weight_bits


@dataclasses.dataclass
class PretrainArguments:
    """The model to make, and what is held out."""

    config_name: str | None = dataclasses.field(
        default=None,
        metadata={
            "help": "Shape of the model: a folder with a config.json, a model's name on the Hub, or a config that "
            "comes with hf_galore, such as llama_60m. The vocabulary is the tokenizer's."
        },
    )
    tokenizer_name: str | None = dataclasses.field(
        default=None, metadata={"help": "Tokenizer: a folder, or a model's name on the Hub."}
    )
    dtype: str = dataclasses.field(
        default="float32",
        metadata={"help": "Type of the weights.", "choices": ["float32", "bfloat16", "float16"]},
    )
    attn_implementation: str | None = dataclasses.field(
        default=None, metadata={"help": "Attention: sdpa, flash_attention_2, eager, ..."}
    )
    max_eval_tokens: int | None = dataclasses.field(
        default=None, metadata={"help": "Evaluate on no more than this many of the held-out tokens."}
    )
    weight_bits: int = dataclasses.field(default=16, metadata={"help": HELP, "choices": CHOICES})
    held_out: float = dataclasses.field(
        default=0.01,
        metadata={"help": "Part of the documents that is held out, where the data have no split dataset_test_split."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.held_out <= 0.5:
            raise ValueError(f"held_out has to be above 0 and at most 0.5, but is {self.held_out}.")
        if self.max_eval_tokens is not None and self.max_eval_tokens < 1:
            raise ValueError(f"max_eval_tokens has to be at least 1, but is {self.max_eval_tokens}.")


DATACLASSES = (ScriptArguments, SFTConfig, PretrainArguments, OutputArguments)
"""Their fields are the keys of a recipe."""


class Arguments(NamedTuple):
    """What a recipe and the command line say."""

    script: ScriptArguments
    training: SFTConfig
    model: PretrainArguments
    recipe: Path | None
    """The recipe's file, if there is one."""
    output: OutputArguments
    given: dict[str, Any]
    """What was said, by the file and the command line."""

    @property
    def command(self) -> str:
        """The command of `hf-galore` that this is for."""
        return "pretrain"

    @property
    def model_name(self) -> str | None:
        """The name or folder of the model's config."""
        return self.model.config_name

    @property
    def data_name(self) -> str | None:
        """The dataset's name or folder."""
        name: str | None = self.script.dataset_name
        return name

    @property
    def hub_dataset(self) -> str | None:
        """The dataset for the model card: what has a name on the Hub."""
        return None if self.data_name is None or Path(self.data_name).exists() else self.data_name

    def check(self) -> Checked:
        """Check all that can be checked before the weights are made; see `check`."""
        return check(self)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What an evaluation's result is told by, the best first: by its loss alone."""
        return ()

    def make_trainer(self, checked: Checked | None = None) -> PretrainingTrainer:
        """Make the Trainer; see `make_trainer`."""
        return make_trainer(self, checked)


class PretrainingTrainer(RecordedTrainer, SFTTrainer):  # type: ignore[misc, unused-ignore]
    """An SFTTrainer that leaves a record of its run, and logs perplexities."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with `perplexity` and `eval_perplexity`: e to the power of the mean loss of a token."""
        for key in ("loss", "eval_loss"):
            if key in logs:
                logs[key.replace("loss", "perplexity")] = _exp(logs[key])
        super().log(logs, start_time)


def parse(arguments: Sequence[str], prog: str, about: str) -> Arguments:
    """Read a command's arguments, with the arguments and errors of `parser.parse_into`."""
    (script, training, model, output), path, given = parse_into(DATACLASSES, arguments, prog, about)
    return Arguments(script, training, model, path, output, given)


class Checked(NamedTuple):
    """What checking a recipe has loaded: all but the weights."""

    config: Any
    tokenizer: Any
    train: Any
    held_out: Any


def check(parsed: Arguments) -> Checked:
    """Check the arguments, the model's config and the tokenizer, and load the text; the cheapest first.

    `output_dir` is there afterwards, and `resume_from_checkpoint` is the folder that it means.

    Raises:
        UserError: something in the arguments or in the data is wrong.
    """
    script, training, model_args = parsed.script, parsed.training, parsed.model
    check_arguments(training)
    if script.dataset_streaming and training.max_steps <= 0:
        raise UserError("dataset_streaming: nobody knows how long a stream is. Set max_steps.")
    check_weight_bits(model_args, training, model_args.dtype)
    config = load_config(model_args)
    keep_to_one_gpu(training)
    check_training(
        training,
        parsed.output,
        config,
        dtype=model_args.dtype,
        auto_class=AutoModelForCausalLM,
        max_length=training.max_length,
    )
    tokenizer = load_tokenizer(model_args)
    evaluate = training.eval_strategy != "no"
    return Checked(
        config,
        tokenizer,
        *load_text(script, training.dataset_text_field, model_args.held_out, evaluate=evaluate),
    )


def make_trainer(parsed: Arguments, checked: Checked | None = None) -> PretrainingTrainer:
    """Check a recipe, make the model, and make the Trainer.

    Args:
        parsed: the recipe.
        checked: what checking it has loaded, where that is done.

    Raises:
        UserError: something in the arguments or in the data is wrong.
    """
    training, model_args = parsed.training, parsed.model
    config, tokenizer, train, held_out = checked or check(parsed)
    trainer = make_pretraining_trainer(config, tokenizer, parsed, train, held_out)
    if held_out is not None and model_args.max_eval_tokens is not None:
        trainer.eval_dataset = _first_tokens(trainer.eval_dataset, model_args.max_eval_tokens, training.max_length)
    keep_position(trainer, training.resume_from_checkpoint)
    return trainer


def make_pretraining_trainer(
    config: Any, tokenizer: Any, parsed: Arguments, train: Any, held_out: Any
) -> PretrainingTrainer:
    """Make the Trainer of a model with random weights, of a config whose vocabulary is set to the tokenizer's."""
    training, model_args = parsed.training, parsed.model
    keep_to_one_gpu(training)
    if config.vocab_size != len(tokenizer):
        logger.info("The model's vocabulary is the tokenizer's: %d, not %d.", len(tokenizer), config.vocab_size)
        config.vocab_size = len(tokenizer)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    attention = model_args.attn_implementation
    set_seed(training.seed)
    model = AutoModelForCausalLM.from_config(
        config,
        dtype=getattr(torch, model_args.dtype),
        **({} if attention is None else {"attn_implementation": attention}),
    )
    if model_args.weight_bits == 8:
        quantize_weights_(model)
    return PretrainingTrainer(
        model=model, args=training, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
    )


# ---- model and data


def load_config(model_args: PretrainArguments) -> Any:
    """Load the config that `config_name` means.

    Raises:
        UserError: there is none.
    """
    name = model_args.config_name
    if not name:
        raise UserError("config_name is missing: give a config's folder or name, such as llama_60m.")
    bundled = configs_folder() / name
    own = bundled if (bundled / "config.json").is_file() and not Path(name).exists() else name
    try:
        return AutoConfig.from_pretrained(own)
    except (OSError, ValueError) as error:
        known = known_models()
        raise UserError(
            f"config_name {name} cannot be loaded: {error} Configs that come with hf_galore: {', '.join(known)}."
            f"{nearest(name, known)}"
        ) from error


def load_tokenizer(model_args: PretrainArguments) -> Any:
    """Load the tokenizer that `tokenizer_name` means.

    Raises:
        UserError: there is none, or it has no token for the end of a document.
    """
    name = model_args.tokenizer_name
    if not name:
        raise UserError("tokenizer_name is missing: give a tokenizer's folder, or a model's name on the Hub.")
    check_tokenizer_files(name, "tokenizer_name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"tokenizer_name {name} cannot be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer_name {name} has no eos_token, which ends a document. Give another one.")
    return tokenizer


def _first_tokens(rows: Any, tokens: int, max_length: int | None) -> Any:
    """As many rows as have no more than `tokens` tokens in all; at least one."""
    count = max(1, tokens // (max_length or 1))
    return rows.select(range(min(count, len(rows)))) if hasattr(rows, "__len__") else rows.take(count)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf
