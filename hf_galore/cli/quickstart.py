"""`hf-galore quickstart`: a chat model trained with GaLore, from nothing, and what came of it."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import torch
import transformers
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments
from trl import SFTTrainer

from ..errors import UserError
from ..integrations.older import end
from ..recipes import sft
from ..recipes.checkpoints import last_checkpoint
from ..recipes.config_file import key_of, keys_given
from ..recipes.embedded_model import conversations, embedded, is_asked_in, split
from ..recipes.folders import recipes_folder
from ..recipes.kinds import QUICKSTART
from ..recipes.run_record import optimizer_bytes
from ..recipes.sft import RecordedSFTTrainer
from ..recipes.stopping import StopAfterStep
from ..recipes.training import run_recorded, with_callbacks
from . import ranks
from .interrupts import finishing_the_step
from .progress import ProgressLine
from .training_command import dry_run, how_to_go_on

PROG = "hf-galore quickstart"
ABOUT = """Train a small chat model on this machine, without downloads, and talk to it. It does what
recipes/quickstart.yaml says, with a model and data that it makes; every key below can override that."""

# The last of them is in the held-out part.
QUESTIONS = ("My computer won't turn on.", "Tell me a joke", "Who are you?")
LONGEST_ANSWER = 48  # tokens

# What the quickstart itself decides.
_OWN = ("config", "model_name_or_path", "dataset_name", "datasets")


class Answer(NamedTuple):
    """What a model says to a question."""

    question: str
    answer: str


def run(arguments: Sequence[str]) -> int:
    """`hf-galore quickstart [--key value ...]`.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C or SIGTERM.
    """
    for item in arguments:
        if item.startswith("--") and key_of(item) in _OWN:
            raise UserError(f"{item} is not for the quickstart, which makes its own. For yours: hf-galore sft --help.")
    console = Console()
    # Parsed without model and data first: a mistake, or --help, is found before anything is made.
    given = sft.parse(["--config", str(_recipe()), *arguments], PROG, ABOUT)
    if given.output.dry_run:
        return dry_run(PROG, _parsed(arguments))
    output_dir = given.training.output_dir
    since = None if "resume_from_checkpoint" in keys_given(arguments) else time.time()
    stop = StopAfterStep()
    stopping = finishing_the_step(stop, PROG, lambda: _how_to_go_on(arguments, output_dir, since))
    with stopping, contextlib.closing(ProgressLine(console=console)) as line:
        trainer = _train(arguments, given.training, [line, stop])
    end(trainer)  # what is left is one process' work
    if not ranks.speaks():
        return 0
    answers = ask(Path(trainer.args.output_dir), trainer.args.device)
    train, _ = split(conversations())
    console.print(
        conversation_table(answers, {answer.question: is_asked_in(answer.question, train) for answer in answers})
    )
    console.print(summary_table(trainer))
    return 0


def _recipe() -> Path:
    return recipes_folder() / QUICKSTART


def _how_to_go_on(arguments: Sequence[str], output_dir: str, since: float | None) -> str:
    if last_checkpoint(Path(output_dir)) is None:  # its recipe writes none
        return f"interrupted; nothing was saved. Run {PROG} again."
    return how_to_go_on(PROG, arguments, output_dir, since=since)


def _train(
    arguments: Sequence[str], given: TrainingArguments, callbacks: Sequence[TrainerCallback]
) -> RecordedSFTTrainer:
    _hide_progress_of_libraries()
    _limit_threads()
    with given.main_process_first(desc="the quickstart's model and data"):
        parsed = _parsed(arguments)

    def make(checked: Any) -> RecordedSFTTrainer:
        return with_callbacks(parsed.make_trainer(checked), callbacks)

    own_name = "the quickstart's"
    return run_recorded(parsed, make, command=PROG, model=own_name, data=own_name, dataset_name=None)


def _parsed(arguments: Sequence[str]) -> sft.Arguments:
    """The recipe with the model and the data that are made for it."""
    made = embedded()
    own = ["--model_name_or_path", str(made.model), "--dataset_name", str(made.data)]
    parsed = sft.parse(["--config", str(_recipe()), *own, *arguments], PROG, ABOUT)
    if {"output_dir", "resume_from_checkpoint"} & keys_given(arguments):
        return parsed
    # Over an earlier quickstart's folder.
    return dataclasses.replace(parsed, output=dataclasses.replace(parsed.output, overwrite_output_dir=True))


def _hide_progress_of_libraries() -> None:
    """Switch off the libraries' progress bars: one bar is enough."""
    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()


def _limit_threads() -> None:
    """Make torch use one thread, unless OMP_NUM_THREADS asks for more.

    The matrices are so small that a second thread gains little; and where another program wants the same cores, the
    threads spend their time waiting for each other: six times as long on two busy cores, measured.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


# ---- what came of it


def ask(folder: Path, device: torch.device, questions: Sequence[str] = QUESTIONS) -> list[Answer]:
    """Load the model that was saved in `folder`, and take its likeliest answers to `questions`."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).to(device).eval()
    return [Answer(question, _answer(model, tokenizer, question)) for question in questions]


def _answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).to(model.device)
    output = model.generate(**prompt, max_new_tokens=LONGEST_ANSWER, do_sample=False)
    answer: str = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()


def conversation_table(answers: Sequence[Answer], trained_on: Mapping[str, bool]) -> Table:
    """Questions and answers; what the model may have learned by heart is marked as such."""
    table = Table(title="The saved model, loaded again, is asked", title_justify="left")
    for column in ("question", "answer", "trained on it"):
        table.add_column(column)
    for question, answer in answers:
        table.add_row(question, answer, "yes" if trained_on[question] else "no")
    return table


def summary_table(trainer: SFTTrainer) -> Table:
    """The closing table: losses first and last, optimizer bytes beside AdamW's, seconds, where the model is."""
    history, args = trainer.state.log_history, trainer.args
    own = optimizer_bytes(trainer.optimizer)
    trained = sum(param.numel() for param in trainer.model.parameters() if param.requires_grad)
    adamw = 2 * 4 * trained  # two float32 moments
    parameters = sum(param.numel() for param in trainer.model.parameters())
    seconds = next(entry["train_runtime"] for entry in reversed(history) if "train_runtime" in entry)
    table = Table(
        title=f"{parameters / 1e6:.1f}M parameters, {args.optim.value}", title_justify="left", show_header=False
    )
    table.add_row("training loss", _first_and_last(history, "loss"))
    table.add_row("held-out loss", _first_and_last(history, "eval_loss"))
    if own is not None:
        table.add_row("optimizer state", f"{own / 1e6:.2f} MB; AdamW's would be {adamw / 1e6:.2f} MB")
    table.add_row("training time", f"{seconds:.0f} s for {trainer.state.global_step} steps")
    table.add_row("the model is in", Text(str(args.output_dir), overflow="fold"))
    return table


def _first_and_last(history: Sequence[Mapping[str, Any]], key: str) -> str:
    values = [float(entry[key]) for entry in history if key in entry]
    if not values:
        return "not measured"
    lowest = f", lowest {min(values):.2f}" if min(values) < values[-1] else ""
    return f"{values[0]:.2f} first, {values[-1]:.2f} last{lowest}"
