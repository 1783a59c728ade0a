"""`hf-galore glue`: GLUE's tasks and anybody's files, metrics, seeds, what is left of an interrupted run."""

from __future__ import annotations

import csv
import io
import json
import random
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from transformers import AutoModelForSequenceClassification, EvalPrediction

from hf_galore import recipes
from hf_galore.cli import glue
from hf_galore.cli.main import main
from hf_galore.errors import UserError
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.glue import Score
from hf_galore.recipes.glue_data import GlueArguments, load_texts, numbered
from hf_galore.recipes.glue_tasks import PUBLISHED, TASKS, scorer
from hf_galore.recipes.run_record import RunFacts
from tests.support.commands import ON_CPU, history, options, said_of_mistake
from tests.support.devices import pretend_gpus

WORDS = ["the", "a", "some", "my", "your", "this", "that", "computer", "book", "music", "movie", "dog"]
MOODS = {"good": "positive", "bad": "negative"}


def moods(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """Texts of six words, one of which says the label."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        words = rng.choices(WORDS, k=6)
        mood = rng.choice(sorted(MOODS))
        words[rng.randrange(6)] = mood
        rows.append((" ".join(words), MOODS[mood]))
    return rows


def table(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *rows])
    return path


@pytest.fixture
def settings(small: Embedded, tmp_path: Path) -> dict[str, Any]:
    """Two epochs of six steps."""
    return {
        **ON_CPU,
        "model_name_or_path": small.model,
        "train_file": table(tmp_path / "train.csv", ("text", "label"), moods(96)),
        "validation_file": table(tmp_path / "validation.csv", ("text", "label"), moods(32, seed=1)),
        "optim": "galore_adamw",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=16, update_proj_gap=3, scale=1",
        "learning_rate": 2e-3,
        "per_device_train_batch_size": 16,
        "num_train_epochs": 2,
        "eval_strategy": "epoch",
        "save_strategy": "epoch",
        "output_dir": tmp_path / "out",
    }


def test_two_visible_gpus_are_no_data_parallel(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which would make each batch twice as large."""
    pretend_gpus(monkeypatch, 2)
    parsed = recipes.glue.parse(options(settings), "", "")
    assert parsed.training.train_batch_size == 32
    args = parsed.make_trainer().args
    assert (args.n_gpu, args.train_batch_size) == (1, 16)
    assert len([record for record in caplog.records if "2 GPUs are visible" in record.getMessage()]) == 1


def test_a_classifier_of_ones_own_texts_with_two_seeds_interrupted_and_resumed(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "120")
    settings = {**settings, "seeds": [1, 2]}
    assert main(["glue", *options(settings)]) == 0
    shown = capsys.readouterr().out
    scores = {}
    for seed in (1, 2):
        folder = tmp_path / "out" / f"seed-{seed}"
        accuracies = [entry["eval_accuracy"] for entry in history(folder) if "eval_accuracy" in entry]
        assert len(accuracies) == 2
        scores[seed] = accuracies
        assert max(accuracies) > 0.8  # chance: 0.5
        facts = RunFacts.read(folder)
        assert facts is not None
        assert (facts.command, facts.data, facts.finished) == ("hf-galore glue", "train.csv", True)
    best = [100 * max(values) for values in scores.values()]
    assert f"{np.mean(best):.2f} ± {np.std(best, ddof=1):.2f}" in shown
    assert "published" not in shown
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out" / "seed-1")
    assert model.config.id2label == {0: "negative", 1: "positive"}

    # The second was killed in its second epoch: the first is read, the second goes on, and all is as before.
    killed = tmp_path / "out" / "seed-2"
    expected = history(killed)
    for path in killed.iterdir():
        if path.name != "checkpoint-6":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    before = (tmp_path / "out" / "seed-1" / "model.safetensors").stat().st_mtime_ns
    assert main(["glue", *options(settings), "--resume_from_checkpoint"]) == 0
    assert capsys.readouterr().out.splitlines()[-4:] == shown.splitlines()[-4:]
    assert (tmp_path / "out" / "seed-1" / "model.safetensors").stat().st_mtime_ns == before
    assert [e for e in history(killed) if "eval_accuracy" in e] == [e for e in expected if "eval_accuracy" in e]

    # What is finished and cannot be read is no score, and not trained again without a word.
    (killed / "trainer_state.json").write_text("")
    said = said_of_mistake("glue", [*options(settings), "--resume_from_checkpoint"], capsys)
    assert f"{killed} cannot be gone on with" in said


def test_a_task_of_glue_from_a_recipe_beside_what_was_published(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two recipes, with the model, the data and the length of the training put in."""
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    for task, columns in (("mrpc", TASKS["mrpc"].columns), ("stsb", TASKS["stsb"].columns)):
        folder = tmp_path / "glue" / task
        folder.mkdir(parents=True)
        for split, count in (("train", 32), ("validation", 16)):
            rows = [
                dict(zip((*columns, "label"), (first, second, float(i % 5) if task == "stsb" else i % 2), strict=True))
                for i, ((first, _), (second, _)) in enumerate(zip(moods(count), moods(count, seed=2), strict=True))
            ]
            (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    changes = {key: settings[key] for key in (*ON_CPU, "model_name_or_path", "optim_target_modules")}
    changes |= {"dataset_name": tmp_path / "glue", "max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    changes |= {"save_strategy": "no", "per_device_train_batch_size": 4}
    recipes = ["glue/roberta_base_mrpc.yaml", "glue/roberta_base_stsb.yaml"]
    assert main(["glue", "--config", *recipes, *options(changes)]) == 0
    shown = capsys.readouterr().out
    for task, metric in (("mrpc", "f1"), ("stsb", "pearson")):
        values = [
            entry[f"eval_{metric}"] for entry in history(tmp_path / f"roberta-base-{task}") if "eval_loss" in entry
        ]
        assert len(values) == 2
        line = next(line for line in shown.splitlines() if "best evaluation" in line)
        assert f"{100 * max(values):.2f}" in line
    # GaLore's row for rank 4, and the mean of the two.
    line = next(line for line in shown.splitlines() if "GaLore, rank 4" in line)
    assert [word for word in line.split() if "." in word] == ["92.25", "90.73", f"{(92.25 + 90.73) / 2:.2f}"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "roberta-base-stsb")
    assert model.config.num_labels == 1


def test_adapters_are_trained_with_use_peft(settings: dict[str, Any], tmp_path: Path) -> None:
    values = {key: value for key, value in settings.items() if not key.startswith("optim")}
    values |= {"use_peft": "true", "lora_r": 4, "lora_target_modules": ["all-linear"], "max_steps": 2}
    assert main(["glue", *options({**values, "eval_strategy": "steps", "eval_steps": 2})]) == 0
    facts = RunFacts.read(tmp_path / "out")
    assert facts is not None
    assert facts.lora_rank == 4
    assert 0 < facts.trainable_parameters < 0.1 * facts.parameters
    assert (tmp_path / "out" / "adapter_config.json").is_file()


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no model": ({"model_name_or_path": "nowhere/nothing"}, "model_name_or_path nowhere/nothing cannot be loaded"),
    "no such task": ({"task_name": "mprc"}, "invalid choice: 'mprc' (choose from 'cola', 'stsb', 'mrpc'"),
    "no file": ({"train_file": "nowhere.csv"}, "train_file nowhere.csv: there is no such file"),
    "no table": (
        {"train_file": "train.txt"},
        "train_file train.txt: its name has to end in one of .csv, .json, .jsonl",
    ),
    "one file": ({"validation_file": None}, "validation_file is missing"),
    "columns of the task": ({"task_name": "mrpc"}, "have the columns text, label. They need label, and sentence1"),
    "no scores": ({"eval_strategy": "no"}, "eval_strategy is 'no': a run is for its scores"),
    "seeds": ({"seeds": [1, 1]}, "seeds have to be different numbers, but are [1, 1]"),
    "seeds and a folder": ({"seeds": [1, 2], "resume_from_checkpoint": "x"}, "with several seeds give no folder"),
    "nothing to resume": ({"resume_from_checkpoint": "true"}, "there is no complete checkpoint in"),
    "no data": (
        {"train_file": None, "validation_file": None, "task_name": "rte"},
        "dataset_name nyu-mll/glue cannot be",
    ),
    "no texts": ({"train_file": None, "validation_file": None}, "task_name is missing: give a task of GLUE, or texts"),
    "length": ({"max_length": 0}, "max_length has to be at least 1, but is 0"),
    "unwritable": ({"output_dir": "/proc/out"}, "output_dir /proc/out cannot be written to"),
    "optim_args": ({"optim_args": "rank=0"}, "rank has to be an integer of at least 1"),
    "target": ({"optim_target_modules": ["atn", "mlp"]}, "Did you mean 'self_attn'"),
}


@pytest.mark.parametrize(("changes", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_and_leaves_nothing(
    changes: dict[str, Any],
    words: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = {key: value for key, value in {**settings, **changes}.items() if value is not None}
    assert words in said_of_mistake("glue", options(given), capsys)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "give a recipe"),
        (["--config"], "--config needs a file"),
        (
            ["--config", "glue/roberta_base_rte.yaml", "--config", "b.yaml"],
            "--config is given twice. Give all files after",
        ),
        (["--config", "glue/roberta_base_mrcp.yaml"], "Did you mean 'glue/roberta_base_mrpc.yaml'?"),
        (
            ["--config", "glue/roberta_base_rte.yaml", "glue/roberta_base_mrpc.yaml", "--output_dir", "x"],
            "output_dir x would be that of several runs",
        ),
    ],
)
def test_bad_command_lines(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert words in said_of_mistake("glue", arguments, capsys)


# ---- texts


def files(tmp_path: Path, header: Sequence[str], train: Sequence[Any], validation: Sequence[Any]) -> GlueArguments:
    return GlueArguments(
        train_file=str(table(tmp_path / "train.csv", header, train)),
        validation_file=str(table(tmp_path / "validation.csv", header, validation)),
    )


def test_labels_are_classes_in_their_order_and_the_other_columns_are_the_texts(tmp_path: Path) -> None:
    args = files(
        tmp_path, ("id", "one", "label", "two"), [(1, "a", "yes", "b"), (2, "c", "no", "d")], [(3, "e", "maybe", "f")]
    )
    data = numbered(load_texts(args))
    assert data.columns == ("one", "two")
    assert data.labels == ["maybe", "no", "yes"]
    assert data.train["label"][:] == [2, 1]
    assert data.validation["label"][:] == [0]
    assert data.metrics == ("accuracy",)


def test_numbers_with_a_decimal_point_are_a_regression(tmp_path: Path) -> None:
    data = load_texts(files(tmp_path, ("text", "label"), [("a", 0.5), ("b", 2.0)], [("c", 1.25)]))
    assert data.labels is None
    assert data.metrics == ("pearson", "spearman")


def test_whole_numbers_are_classes(tmp_path: Path) -> None:
    data = numbered(load_texts(files(tmp_path, ("text", "label"), [("a", 3), ("b", 7)], [("c", 3)])))
    assert data.labels == ["3", "7"]
    assert data.train["label"][:] == [0, 1]


@pytest.mark.parametrize(
    ("header", "rows", "task", "words"),
    [
        (("text", "mood"), [("a", "b")], None, "columns text, mood. They need label, and one or two with text"),
        (("a", "b", "c", "label"), [("x", "y", "z", 1)], None, "They need label, and one or two with text"),
        (("label",), [(1,)], None, "They need label, and one or two with text"),
        (
            ("sentence1", "sentence2", "label"),
            [("a", "b", 1), ("a", "b", 0)],
            "stsb",
            "have to be numbers with a decimal",
        ),
        (("sentence1", "sentence2", "label"), [("a", "b", 0.5)], "rte", "have to be classes"),
        (("sentence1", "sentence2", "label"), [("a", "b", i) for i in range(3)], "mrpc", "has two classes"),
    ],
)
def test_texts_that_do_not_fit(
    header: Sequence[str], rows: Sequence[Any], task: str | None, words: str, tmp_path: Path
) -> None:
    args = files(tmp_path, header, rows, rows)
    args.task_name = task
    with pytest.raises(UserError, match=words):
        load_texts(args)


def test_mnli_is_scored_on_both_its_validation_splits(tmp_path: Path) -> None:
    folder = tmp_path / "mnli"
    folder.mkdir()
    row = {"premise": "a", "hypothesis": "b", "label": 0}
    for name, count in (("train", 3), ("validation_matched", 2), ("validation_mismatched", 4)):
        (folder / f"{name}.jsonl").write_text("\n".join(json.dumps({**row, "label": i % 3}) for i in range(count)))
    data = load_texts(GlueArguments(task_name="mnli", dataset_name=str(tmp_path)))
    assert data.validation["label"][:] == [0, 1, 0, 1, 2, 0]
    assert (len(data.train), data.columns) == (3, ("premise", "hypothesis"))


# ---- scores


def test_metrics_are_those_of_their_definitions() -> None:
    truth, guesses = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1, 1])
    logits = np.stack([1.0 - guesses, guesses], axis=1)
    found = scorer(("accuracy", "f1", "matthews_correlation"))(EvalPrediction((logits, "hidden"), truth))
    hits, misses, false_alarms, rejections = 3, 1, 1, 1
    assert found["accuracy"] == pytest.approx((hits + rejections) / 6)
    assert found["f1"] == pytest.approx(2 * hits / (2 * hits + misses + false_alarms))
    product = (hits + false_alarms) * (hits + misses) * (rejections + false_alarms) * (rejections + misses)
    assert found["matthews_correlation"] == pytest.approx((hits * rejections - false_alarms * misses) / product**0.5)
    x, y = np.array([1.0, 2.0, 3.0, 9.0]), np.array([[1.5], [1.0], [4.0], [5.0]])
    found = scorer(("pearson", "spearman"))(EvalPrediction(y, x))
    assert found["pearson"] == pytest.approx(np.corrcoef(x, y[:, 0])[0, 1])
    assert found["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15))  # the first two change places


def test_published_means_are_the_papers() -> None:
    """Table 4's own means say that no score is mistyped."""
    means = {"full fine-tuning": 86.28, "GaLore, rank 4": 85.89, "LoRA, rank 4": 85.61}
    means |= {"GaLore, rank 8": 85.94, "LoRA, rank 8": 85.93}
    assert {method: round(float(np.mean(list(scores.values()))), 2) for method, scores in PUBLISHED.items()} == means


def test_one_seed_has_no_deviation_and_last_is_not_best() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    console.print(glue.score_table({"cola": [Score("matthews_correlation", 0.61, 0.59)]}, published=True))
    shown = console.export_text()
    lines = {line.split("│")[1].strip(): line for line in shown.splitlines() if line.count("│") > 1}
    assert "61.00" in lines["best evaluation"]
    assert "59.00" in lines["last evaluation"]
    assert "60.35" in lines["GaLore, rank 4"]
    assert "±" not in shown
    assert "mean" not in shown
