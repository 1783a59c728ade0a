"""The picture of README: GaLore, AdamW and LoRA on the quickstart's model, each at a learning rate of its own.

    python -m tests.benchmarks.comparison --runs runs       # 21 runs of 336 steps: half an hour on 2 idle cores

First a sweep for each: the same four rates, a factor of 2 apart, one seed. Each takes the rate with the lowest held-out
loss, which has to be neither the smallest nor the largest that was tried. At that rate come three other seeds (order of
the data; LoRA's first matrices), and these are what is shown. Steps, data, schedule and all else are the same. The
embeddings and the output head train full-rank, with LoRA too: the model begins with random weights, and no adapter
makes up for those.

It goes on with what is in the folder, and does not repeat what is finished. It writes the picture and prints the table.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hf_galore.compare.figures import pictures
from hf_galore.compare.quantities import quantities, spread_text
from hf_galore.compare.reading import read_runs
from hf_galore.compare.runs import HELD_OUT_LOSS, Run
from hf_galore.compare.seeds import by_seed, spread

PICTURE = Path(__file__).parents[2] / "notebooks" / "pictures" / "comparison.png"
RATES = ("1e-3", "2e-3", "4e-3", "8e-3")
SEEDS = ("1", "2", "3")  # none of them the sweeps', which is the Trainer's own
_SAME = ("--config", "quickstart.yaml", "--max_steps", "336", "--eval_strategy", "steps", "--eval_steps", "42")
_SHOWN = ("training_loss", "eval_loss_last", "eval_loss_lowest", "optimizer_bytes")


class Method(NamedTuple):
    """One of those that are compared."""

    name: str
    options: tuple[str, ...]
    """What the quickstart is told besides."""


_LORA = ("--use_peft", "true", "--lora_target_modules", "all-linear", "--lora_r", "64", "--lora_alpha", "64")
METHODS = (
    Method("GaLore", ()),
    Method("AdamW", ("--optim", "adamw_torch")),
    Method("LoRA", ("--optim", "adamw_torch", *_LORA, "--lora_modules_to_save", "embed_tokens", "lm_head")),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, required=True, help="the folder of the runs")
    folder = parser.parse_args().runs
    folders, names = [], []
    for method in METHODS:
        swept = _sweep(method, "learning_rate", RATES, folder / method.name.lower())
        rate = best_rate(dict(zip(RATES, swept, strict=True)))
        losses = ", ".join(f"{rate} {lowest(run):.4f}" for rate, run in zip(RATES, swept, strict=True))
        print(f"{method.name}: held-out loss, lowest: {losses}. Taken: {rate}.")
        at_rate = method._replace(options=(*method.options, "--learning_rate", rate))
        runs = _sweep(at_rate, "seed", SEEDS, folder / f"{method.name.lower()}-seeds")
        folders += [run.folder for run in runs]
        names += [f"{method.name}, {rate}, seed={seed}" for seed in SEEDS]
    compared = by_seed(read_runs(folders, names))
    drawn = pictures(compared, for_page=False)
    PICTURE.write_bytes(next(picture.png for picture in drawn if picture.file == "held_out_loss"))
    print("| | " + " | ".join(one.name for one in compared) + " |\n" + "|---" * (1 + len(compared)) + "|")
    for quantity in quantities(compared):
        if quantity.key in _SHOWN:
            cells = [spread_text(quantity, one, spread(one, quantity.value)) or "" for one in compared]
            print(f"| {quantity.label} | " + " | ".join(cells) + " |")


def best_rate(swept: dict[str, Run]) -> str:
    """The rate with the lowest held-out loss.

    Raises:
        SystemExit: it is the first or the last that was tried, so that a better one may lie beyond.
    """
    best = min(swept, key=lambda rate: lowest(swept[rate]))
    if best in (next(iter(swept)), next(reversed(swept))):
        raise SystemExit(f"the best rate, {best}, is at an end of those that were tried: {', '.join(swept)}. Try more.")
    return best


def lowest(run: Run) -> float:
    """The lowest held-out loss of a run."""
    return min(value for _, value in run.series(HELD_OUT_LOSS))


def _sweep(method: Method, key: str, values: Sequence[str], folder: Path) -> list[Run]:
    arguments = ["--sweep", f"{key}={','.join(values)}", *_SAME, *method.options, "--output_dir", str(folder)]
    going_on = ["--resume_from_checkpoint"] if folder.exists() else []
    command = [sys.executable, "-m", "hf_galore.cli.main", "compare", *arguments, *going_on]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return read_runs([folder / f"{key}-{value}" for value in values])


if __name__ == "__main__":
    main()
