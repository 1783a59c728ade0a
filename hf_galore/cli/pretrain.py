"""`hf-galore pretrain`: train a language model from scratch, on text."""

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
from ..log import logger
from . import recipe
from .checkpoints import stop
from .errors import UserError
from .run_record import RecordedTrainer
from .stream_position import keep_position
from .text_data import load_text
from .training import check_arguments, run_recorded

PROG = "hf-galore pretrain"
ABOUT = """Train a language model from scratch: its shape from a config, random weights, text from a dataset or from any
folder of text files. The file holds 'key: value' lines, with the keys below. Options on the command line come after the
file and override it."""


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
    held_out: float = dataclasses.field(
        default=0.01,
        metadata={"help": "Part of the documents that is held out, where the data have no split dataset_test_split."},
    )

    def __post_init__(self) -> None:
        if not 0 < self.held_out <= 0.5:
            raise ValueError(f"held_out has to be above 0 and at most 0.5, but is {self.held_out}.")
        if self.max_eval_tokens is not None and self.max_eval_tokens < 1:
            raise ValueError(f"max_eval_tokens has to be at least 1, but is {self.max_eval_tokens}.")


class Arguments(NamedTuple):
    """What a recipe and the command line say."""

    script: ScriptArguments
    training: SFTConfig
    model: PretrainArguments
    recipe: Path | None


class PretrainingTrainer(RecordedTrainer, SFTTrainer):  # type: ignore[misc, unused-ignore]
    """An SFTTrainer that leaves a record of its run, and logs perplexities."""

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With `perplexity` and `eval_perplexity`, e to the mean loss of a token."""
        for key in ("loss", "eval_loss"):
            if key in logs:
                logs[key.replace("loss", "perplexity")] = _exp(logs[key])
        super().log(logs, start_time)


def run(arguments: Sequence[str]) -> int:
    """`hf-galore pretrain --config FILE [--key value ...]`.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C.
    """
    if not arguments:
        raise UserError("give a recipe: --config pretrain/llama_60m_c4.yaml, and --key value to override what it says.")
    parsed = parse(arguments)
    try:
        trainer = run_pretrain(parsed)
    except KeyboardInterrupt:
        stop(PROG, arguments, parsed.training.output_dir)
    trainer.accelerator.print(_closing_line(trainer))
    trainer.end()
    return 0


def parse(arguments: Sequence[str], prog: str = PROG, about: str = ABOUT) -> Arguments:
    """Read the command's arguments, with the errors of `recipe.parse`."""
    (script, training, model), path = recipe.parse_into(
        (ScriptArguments, SFTConfig, PretrainArguments), arguments, prog, about
    )
    return Arguments(script, training, model, path)


def run_pretrain(parsed: Arguments) -> PretrainingTrainer:
    """Make the model, load the text, train, save.

    Returns:
        The trainer after training; model and tokenizer have been saved to `output_dir`.

    Raises:
        UserError: something in the arguments is wrong. No file or folder is left behind then.
    """
    return run_recorded(
        parsed,
        lambda: make_trainer(parsed),
        command=PROG,
        model=str(parsed.model.config_name),
        data=parsed.script.dataset_name,
        dataset_name=parsed.script.dataset_name,
    )


def make_trainer(parsed: Arguments) -> PretrainingTrainer:
    """The first half of `run_pretrain`: everything up to the training."""
    script, training, model_args = parsed.script, parsed.training, parsed.model
    check_arguments(training)
    if script.dataset_streaming and training.max_steps <= 0:
        raise UserError("dataset_streaming: nobody knows how long a stream is. Set max_steps.")
    config, tokenizer = load_config(model_args), load_tokenizer(model_args)
    evaluate = training.eval_strategy != "no"
    train, held_out = load_text(script, training.dataset_text_field, model_args.held_out, evaluate=evaluate)
    trainer = make_pretraining_trainer(config, tokenizer, parsed, train, held_out)
    if held_out is not None and model_args.max_eval_tokens is not None:
        trainer.eval_dataset = _first_tokens(trainer.eval_dataset, model_args.max_eval_tokens, training.max_length)
    keep_position(trainer, training.resume_from_checkpoint)
    return trainer


def make_pretraining_trainer(
    config: Any, tokenizer: Any, parsed: Arguments, train: Any, held_out: Any
) -> PretrainingTrainer:
    """The Trainer of a model with random weights, of a config whose vocabulary is set to the tokenizer's."""
    training, model_args = parsed.training, parsed.model
    if training.device.type == "cpu":
        training.dataloader_pin_memory = False  # there is no device to copy to
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
    return PretrainingTrainer(
        model=model, args=training, train_dataset=train, eval_dataset=held_out, processing_class=tokenizer
    )


# ---- model and data


def load_config(model_args: PretrainArguments) -> Any:
    """The config that `config_name` means.

    Raises:
        UserError: there is none.
    """
    name = model_args.config_name
    if not name:
        raise UserError("config_name is missing: give a config's folder or name, such as llama_60m.")
    bundled = recipe.configs_folder() / name
    own = bundled if (bundled / "config.json").is_file() and not Path(name).exists() else name
    try:
        return AutoConfig.from_pretrained(own)
    except (OSError, ValueError) as error:
        known = recipe.known_models()
        raise UserError(
            f"config_name {name} cannot be loaded: {error} Configs that come with hf_galore: {', '.join(known)}."
            f"{nearest(name, known)}"
        ) from error


def load_tokenizer(model_args: PretrainArguments) -> Any:
    """The tokenizer that `tokenizer_name` means.

    Raises:
        UserError: there is none, or it has no token for the end of a document.
    """
    name = model_args.tokenizer_name
    if not name:
        raise UserError("tokenizer_name is missing: give a tokenizer's folder, or a model's name on the Hub.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, ImportError) as error:
        raise UserError(f"tokenizer_name {name} cannot be loaded: {error}") from error
    if tokenizer.eos_token is None:
        raise UserError(f"tokenizer_name {name} has no eos_token, which ends a document. Give another one.")
    return tokenizer


def _first_tokens(rows: Any, tokens: int, max_length: int | None) -> Any:
    """So many rows that they have no more than `tokens` tokens; one at least."""
    count = max(1, tokens // (max_length or 1))
    return rows.select(range(min(count, len(rows)))) if hasattr(rows, "__len__") else rows.take(count)


def _exp(loss: float) -> float:
    return math.exp(loss) if loss < 700 else math.inf


def _closing_line(trainer: PretrainingTrainer) -> str:
    perplexities = [entry["eval_perplexity"] for entry in trainer.state.log_history if "eval_perplexity" in entry]
    held_out = f", held-out perplexity {perplexities[-1]:.2f}" if perplexities else ""
    return f"{trainer.state.num_input_tokens_seen:,} tokens seen{held_out}. The model is in {trainer.args.output_dir}."
