"""A person's first hour, in a real terminal of 80 columns: each command as it is typed, each screen as it is seen."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("pexpect", reason="there is no such terminal on Windows")
pytest.importorskip("pyte", reason="what the tests of older releases run in has none")

from hf_galore.recipes.checkpoints import last_checkpoint
from hf_galore.recipes.embedded_model import CACHE_VARIABLE, Embedded
from tests.support.terminal import COLUMNS, Terminal

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such terminal")

CONVERSATIONS = (
    ("Where is my order?", "On its way."),
    ("What do you sell?", "Tea, and cups for it."),
    ("Are you open on Sundays?", "From ten to four."),
)
# What the owner of a small machine changes in the recipe.
CHANGES = {
    "Qwen/Qwen3-0.6B # it": "first # it",
    "max_length: 1024": "max_length: 64",
    "bf16: true": "bf16: false\nuse_cpu: true",
    "rank=256": "rank=32",
    "1.0e-5 ": "2.0e-3 ",
    "activation_checkpointing: true": "activation_checkpointing: false",
}


class Person:
    """Somebody at a terminal, in an empty folder."""

    def __init__(self, folder: Path, cache: Path) -> None:
        self.folder = folder
        self._environment = {CACHE_VARIABLE: str(cache)}

    def opens(self, *arguments: str) -> Terminal:
        """Type `hf-galore ...`."""
        return Terminal(arguments, self.folder, self._environment)

    def sees(self, *arguments: str, status: int = 0) -> str:
        """Type `hf-galore ...`, wait for its end, and return the screen as one text with single spaces.

        A line that is longer than the screen goes on at the beginning of the next, even within a word.
        """
        with self.opens(*arguments) as terminal:
            ended = terminal.status()
            shown = terminal.text()
        assert ended == status, shown
        assert "Traceback" not in shown
        assert "…" not in shown, f"a table is cut off:\n{shown}"
        joined = "".join(line if len(line) == COLUMNS else f"{line}\n" for line in shown.splitlines())
        return re.sub(r"\s+", " ", joined)


@pytest.mark.slow
def test_a_persons_first_hour(small: Embedded, tmp_path: Path) -> None:
    person = Person(tmp_path, small.model.parent.parent)

    # Is this machine fit for it?
    assert "Nothing stops a training here" in person.sees("doctor")

    # The quickstart.
    first = person.sees("quickstart", "--max_steps", "30", "--logging_steps", "10", "--output_dir", "first")
    assert re.search(r"30/30 ━+ loss \d\.\d+", first)
    assert "The saved model, loaded again, is asked" in first
    assert "the model is in │ first" in first

    # A recipe of one's own, for data of one's own: copied, and broken.
    assert "hf-galore sft --config own_data.yaml" in person.sees("recipes", "--copy", "own_data.yaml")
    recipe, data = tmp_path / "own_data.yaml", tmp_path / "my_data"
    text = recipe.read_text("utf-8")
    for old, new in CHANGES.items():
        assert old in text
        text = text.replace(old, new)
    recipe.write_text(text.replace('"rank=', '"rnak='), "utf-8")
    run = ("sft", "--config", "own_data.yaml")
    assert "GaLore has no argument 'rnak'" in person.sees(*run, status=2)
    recipe.write_text(text, "utf-8")
    assert re.search("dataset_name my_data( cannot be loaded)?: ", person.sees(*run, status=2))
    data.mkdir()
    turns = [
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for question, answer in CONVERSATIONS
    ]
    lines = [json.dumps(turn) for turn in turns] * 40
    (data / "train.jsonl").write_text("\n".join(lines) + "\n", "utf-8")

    # Does it fit? Then run, stopped in the middle, and gone on with.
    assert "all checks passed. Nothing was trained or written." in person.sees(*run, "--dry-run")
    with person.opens(*run) as terminal:
        terminal.wait_for(r"\b([1-9]|[1-8]\d)/90 ")  # a quick machine shows few of the steps
        terminal.press_ctrl("c")
        assert terminal.status() == 130
        hint = terminal.wait_for(r"go on from own-data/checkpoint-\d+ with")
    kept = last_checkpoint(tmp_path / "own-data")
    assert kept is not None
    assert kept.name in hint
    assert "holds a run: hf-galore sft of first, optim galore_adamw_8bit_layerwise," in person.sees(*run, status=2)
    assert "The model is in own-data." in person.sees(*run, "--resume_from_checkpoint")
    assert "is finished, at step 90" in person.sees(*run, "--resume_from_checkpoint")

    # What came of it.
    compared = person.sees("compare", "first", "own-data")
    assert re.search(r"│ rank │ 64 │ 32 │", compared)
    assert "The runs did not do the same work: " in compared
    assert (tmp_path / "comparison" / "index.html").is_file()
    with person.opens("chat", "own-data") as terminal:
        terminal.wait_for(r"(?m)^>$")
        terminal.type(f"{CONVERSATIONS[0][0]}\n")
        answer = terminal.wait_for(r"(?m)^> Where is my order\?\n(.+\n)+>$")
        terminal.type("/quit\n")
        assert terminal.status() == 0
    assert CONVERSATIONS[0][1] in answer  # what it was taught
