"""`hf-galore glue`: fine-tune a classifier on tasks of GLUE, or on anybody's texts, and show its scores."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..integrations.older import end
from ..recipes import glue
from ..recipes.config_file import take_config
from ..recipes.glue import Arguments, Score
from ..recipes.glue_tasks import PUBLISHED, PUBLISHED_IN
from . import ranks
from .options import need_recipe
from .training_command import dry_run, train

PROG = "hf-galore glue"
ABOUT = """Fine-tune a sequence-classification model on tasks of GLUE, a file for each after --config, or on texts of
your own, and show its scores beside the published ones. A file holds 'key: value' lines, with the keys below. Options
on the command line come after the files and override them. With --resume_from_checkpoint, what an interrupted run has
not done is done."""


def run(arguments: Sequence[str]) -> int:
    """`hf-galore glue --config FILE [FILE ...] [--seeds 1 2 3] [--key value ...]`.

    Raises:
        UserError: something that was given is wrong.
        Stopped: Ctrl-C.
    """
    need_recipe(arguments, "glue/roberta_base_mrpc.yaml")
    configs, rest = _take_configs(arguments)
    every = [glue.parse([*(["--config", config] if config else []), *rest], PROG, ABOUT) for config in configs]
    _check_apart(every)
    if every[0].output.dry_run:
        return max(dry_run(PROG, parsed) for parsed in every)
    scores: dict[str, list[Score]] = {}
    runs, last = glue.runs_of(every), None
    for index, (one, known) in enumerate(runs):
        if known is None:
            last = train(PROG, arguments, one, others=index > 0, further=index < len(runs) - 1)
            if ranks.count() == 1:  # the runs to come need the other processes
                end(last)
            known = glue.score_of(last.state.log_history, one)
        scores.setdefault(one.data_name, []).append(known)
    if last is not None and ranks.count() > 1:
        end(last)
    published = all(parsed.glue.task_name and parsed.glue.train_file is None for parsed in every)
    if ranks.speaks():
        Console(highlight=False).print(score_table(scores, published=published))
    return 0


def _take_configs(arguments: Sequence[str]) -> tuple[list[str | None], list[str]]:
    """The files after `--config`, of which a shell makes several from one pattern, and the other arguments."""
    items = list(arguments)
    if "--config" not in items:
        name, rest = take_config(items)  # --config=FILE, or none
        return [name], rest
    start = items.index("--config") + 1
    end = next((index for index in range(start, len(items)) if items[index].startswith("--")), len(items))
    if start == end:
        raise UserError("--config needs a file: --config recipe.yaml.")
    rest = items[: start - 1] + items[end:]
    if any(item.partition("=")[0] == "--config" for item in rest):
        raise UserError("--config is given twice. Give all files after one: --config a.yaml b.yaml.")
    return list(items[start:end]), rest


def _check_apart(every: Sequence[Arguments]) -> None:
    folders = [parsed.training.output_dir for parsed in every]
    if len(set(folders)) < len(folders):
        raise UserError(
            f"output_dir {folders[0]} would be that of several runs. Leave it out: each recipe has one of its own."
        )


def score_table(scores: Mapping[str, Sequence[Score]], *, published: bool) -> Table:
    """The table of scores in per cent: best and last evaluation; of several seeds the mean and the deviation.

    Args:
        scores: of each task, those of its seeds.
        published: whether what was published for the tasks goes below.
    """
    table = Table(title="Scores in per cent", title_justify="left")
    table.add_column("")
    for name, runs in scores.items():
        table.add_column(f"{name}\n{runs[0].metric}", justify="right")
    several = published and len(scores) > 1
    if several:
        table.add_column("mean", justify="right")
    for label, pick in (("best evaluation", lambda score: score.best), ("last evaluation", lambda score: score.last)):
        found = [[100 * pick(score) for score in runs] for runs in scores.values()]
        cells = [_mean(values) for values in found]
        table.add_row(label, *cells, *([f"{statistics.mean(map(statistics.mean, found)):.2f}"] if several else []))
    if published:
        table.add_section()
        for method, known in PUBLISHED.items():
            values = [known[name] for name in scores]
            mean = [f"{statistics.mean(values):.2f}"] if several else []
            table.add_row(method, *(f"{value:.2f}" for value in values), *mean)
        table.caption = f"Below the line: {PUBLISHED_IN}."
    return table


def _mean(values: Sequence[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
