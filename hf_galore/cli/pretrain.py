"""`hf-galore pretrain`: train a language model from scratch, on text."""

from __future__ import annotations

from collections.abc import Sequence

from ..recipes import pretrain
from ..recipes.run_record import RecordedTrainer
from .options import need_recipe
from .training_command import train_and_say

PROG = "hf-galore pretrain"
ABOUT = """Train a language model from scratch: its shape from a config, random weights, text from a dataset or from any
folder of text files. The file holds 'key: value' lines, with the keys below. Options on the command line come after the
file and override it."""


def run(arguments: Sequence[str]) -> int:
    """`hf-galore pretrain --config FILE [--key value ...]`.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C.
    """
    need_recipe(arguments, "pretrain/llama_60m_c4.yaml")
    return train_and_say(PROG, arguments, pretrain.parse(arguments, PROG, ABOUT), _closing_line)


def _closing_line(trainer: RecordedTrainer) -> str:
    perplexities = [entry["eval_perplexity"] for entry in trainer.state.log_history if "eval_perplexity" in entry]
    held_out = f", held-out perplexity {perplexities[-1]:.2f}" if perplexities else ""
    return f"{trainer.state.num_input_tokens_seen:,} tokens seen{held_out}. The model is in {trainer.args.output_dir}."
