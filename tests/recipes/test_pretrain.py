"""`hf-galore pretrain`: text from anywhere, a model from a config, runs that resume where the stream was."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
from transformers import AutoConfig, AutoModelForCausalLM
from trl import ScriptArguments

from hf_galore.cli.main import main
from hf_galore.errors import UserError
from hf_galore.recipes import pretrain
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.run_record import RUN_FILE, RunFacts
from hf_galore.recipes.stream_position import POSITION_FILE, Positioned
from hf_galore.recipes.text_data import load_text
from tests.support.commands import ON_CPU, history, options, said_of_mistake, weights
from tests.support.devices import pretend_gpus
from tests.support.helpers import assert_identical
from tests.support.releases import LOSES_LAST_ROWS

BATCH, ACCUMULATION, LENGTH, STEPS = 2, 2, 16, 6
RECIPE = "pretrain/llama_60m_c4.yaml"


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder of ten documents, of which no two have a word in common."""
    folder = tmp_path / "texts" / "below"
    folder.mkdir(parents=True)
    for number in range(10):
        words = (f"word{number}{chr(97 + index % 7)}" for index in range(60))
        (folder / f"{number}.txt").write_text(" ".join(words), encoding="utf-8")
    return folder.parent


@pytest.fixture
def settings(small: Embedded, texts: Path, tmp_path: Path) -> dict[str, Any]:
    """Overrides that make the recipe for C4 one of six small steps on those documents, streamed like C4."""
    return {
        **ON_CPU,
        "config_name": small.model,
        "tokenizer_name": small.model,
        "dtype": "float32",
        "dataset_name": texts,
        "held_out": 0.2,
        "max_eval_tokens": 100,
        "max_length": LENGTH,
        "optim_args": "rank=16, update_proj_gap=3, scale=0.25",
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": ACCUMULATION,
        "per_device_eval_batch_size": BATCH,
        "warmup_steps": 1,
        "max_steps": STEPS,
        "logging_steps": 1,
        "eval_steps": 3,
        "save_steps": 2,
        "save_total_limit": 5,
        "output_dir": tmp_path / "out",
    }


def test_c4s_recipe_on_a_folder_of_text_and_a_resumed_run_of_it(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["pretrain", "--config", RECIPE]
    assert main([*arguments, *options(settings)]) == 0
    out = tmp_path / "out"
    losses = [entry for entry in history(out) if "loss" in entry]
    evaluations = [entry for entry in history(out) if "eval_loss" in entry]
    assert [entry["step"] for entry in losses] == list(range(1, STEPS + 1))
    assert [entry["step"] for entry in evaluations] == [3, 6]
    for entry in losses:
        assert entry["perplexity"] == pytest.approx(math.exp(entry["loss"]))
        # Packed: all rows are full.
        assert entry["num_tokens"] == entry["step"] * BATCH * ACCUMULATION * LENGTH
        assert entry["epoch"] == pytest.approx(entry["step"] / STEPS)
    for entry in evaluations:
        assert entry["eval_perplexity"] == pytest.approx(math.exp(entry["eval_loss"]))
    assert losses[-1]["loss"] < losses[0]["loss"]
    last = f"held-out perplexity {evaluations[-1]['eval_perplexity']:.2f}. The model is in {out}."
    assert capsys.readouterr().out.splitlines()[-1] == f"{STEPS * BATCH * ACCUMULATION * LENGTH} tokens seen, {last}"
    facts = RunFacts.read(out)
    assert facts is not None
    assert (facts.command, facts.recipe, facts.finished) == ("hf-galore pretrain", "llama_60m_c4.yaml", True)
    assert AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers == 2

    # As if it had been killed after step 4: with the place in the stream; without it, or with one that is none of ours,
    # when the Trainer reads what it has seen again; and with half of it, when it goes on from step 2.
    for name in ("place", "no place", "no place of ours", "half a place"):
        resumed = tmp_path / name
        for step in (2, 4):
            shutil.copytree(out / f"checkpoint-{step}", resumed / f"checkpoint-{step}")
        position = resumed / "checkpoint-4" / POSITION_FILE
        if name == "no place":
            position.unlink()
        elif name != "place":
            position.write_text("{}" if name == "no place of ours" else position.read_text(encoding="utf-8")[:-9])
        given = options({**settings, "output_dir": resumed})
        assert main([*arguments, *given, "--resume_from_checkpoint"]) == 0
        assert_identical(weights(resumed), weights(out))
    # All that was logged, the tokens seen and the epoch among it; of a resumed run, sizes are said anew.
    sizes = ("galore/moment_mib", "galore/basis_mib", "galore/targets", "galore/full_rank")
    found, expected = (
        [{key: value for key, value in entry.items() if key not in sizes} for entry in history(folder)]
        for folder in (tmp_path / "place", out)
    )
    assert found == expected


def test_a_dataset_that_is_no_stream(settings: dict[str, Any], tmp_path: Path) -> None:
    values = {**settings, "dataset_streaming": "false", "max_steps": -1, "num_train_epochs": 1, "eval_strategy": "no"}
    values |= {"packing": "false", "save_strategy": "no", "gradient_accumulation_steps": 1}
    assert main(["pretrain", "--config", RECIPE, *options(values)]) == 0
    steps = [entry["step"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert steps == list(range(1, 10 // BATCH + 1))  # ten documents, cut


def test_two_visible_gpus_are_no_data_parallel(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Which TRL's trainers refuse."""
    pretend_gpus(monkeypatch, 2)
    parsed = pretrain.parse(["--config", RECIPE, *options(settings)], "", "")
    assert parsed.training.n_gpu == 2
    assert parsed.make_trainer().args.n_gpu == 1
    assert len([record for record in caplog.records if "2 GPUs are visible" in record.getMessage()]) == 1


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no config": ({"config_name": ""}, "config_name is missing"),
    "unknown config": ({"config_name": "llama_61m"}, "Did you mean 'llama_60m'?"),
    "unknown tokenizer": ({"tokenizer_name": "nowhere/nothing"}, "tokenizer_name nowhere/nothing cannot be loaded"),
    "no data": ({"dataset_name": "nowhere/nothing"}, "dataset_name nowhere/nothing cannot be loaded"),
    "endless": ({"max_steps": -1}, "nobody knows how long a stream is. Set max_steps"),
    "no such column": ({"dataset_text_field": "txt"}, "but no 'txt'. Set dataset_text_field"),
    "no such split": ({"dataset_train_split": "trian"}, "has no split 'trian'; it has train"),
    "all held out": ({"held_out": 1.5}, "held_out has to be above 0 and at most 0.5, but is 1.5"),
    "no tokens": ({"max_eval_tokens": 0}, "max_eval_tokens has to be at least 1"),
    "a model": ({"model_name_or_path": "gpt2"}, "there is no option --model_name_or_path"),
    "dtype": ({"dtype": "float31"}, "argument --dtype: invalid choice: 'float31'"),
    "optim_args": ({"optim_args": "rnak=8"}, "Did you mean 'rank'?"),
    "unwritable": ({"output_dir": "/proc/out"}, "output_dir /proc/out cannot be written to"),
    "no checkpoint": ({"resume_from_checkpoint": "true"}, "there is no complete checkpoint in"),
}


@pytest.mark.parametrize(("changes", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line_and_leaves_nothing(
    changes: dict[str, Any],
    words: str,
    settings: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert words in said_of_mistake("pretrain", ["--config", RECIPE, *options({**settings, **changes})], capsys)
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str], settings: dict[str, Any]) -> None:
    assert "give a recipe" in said_of_mistake("pretrain", [], capsys)
    for key in ("config_name", "tokenizer_name", "dataset_name"):
        given = {k: v for k, v in settings.items() if k not in (key, "output_dir")}
        assert f"{key} is missing" in said_of_mistake("pretrain", options(given), capsys)


def test_a_tokenizer_that_cannot_end_a_document(
    settings: dict[str, Any], small: Embedded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(small.model, tmp_path / "tokenizer")
    path = tmp_path / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in config.items() if key != "eos_token"}))
    given = options({**settings, "tokenizer_name": tmp_path / "tokenizer"})
    assert "has no eos_token" in said_of_mistake("pretrain", ["--config", RECIPE, *given], capsys)


# ---- the model


def made(given: list[str]) -> pretrain.PretrainingTrainer:
    """The recipe's Trainer, with overrides."""
    return pretrain.parse(["--config", RECIPE, *given], "", "").make_trainer()


def test_the_vocabulary_is_the_tokenizers(settings: dict[str, Any], texts: Path, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(settings["config_name"])
    config.vocab_size, config.num_hidden_layers = 5000, 1
    config.save_pretrained(tmp_path / "config")
    given = options({**settings, "config_name": tmp_path / "config"})
    trainer = made(given)
    size = len(trainer.processing_class)
    assert trainer.model.config.vocab_size == size != 5000
    assert trainer.model.get_input_embeddings().weight.shape[0] == size
    assert trainer.model.config.eos_token_id == trainer.processing_class.eos_token_id


def test_the_same_seed_makes_the_same_weights(settings: dict[str, Any]) -> None:
    models = [made(options({**settings, "seed": seed})).model for seed in (1, 1, 2)]
    first, again, other = (dict(model.named_parameters())["model.embed_tokens.weight"] for model in models)
    assert_identical(first, again)
    assert not (first == other).all()


# ---- text


def loaded(folder: Path, *, evaluate: bool = True, held_out: float = 0.2, **script: Any) -> tuple[list[str], list[str]]:
    args = ScriptArguments(dataset_name=str(folder), dataset_test_split="validation", **script)
    train, held = load_text(args, "text", held_out, evaluate=evaluate)
    return [row["text"] for row in train], [] if held is None else [row["text"] for row in held]


@pytest.mark.parametrize("streaming", [False, True])
def test_each_file_of_a_folder_is_a_document_and_some_are_held_out(texts: Path, streaming: bool) -> None:
    (texts / ".hidden").write_text("hidden")
    (texts / "README.md").write_text("about them")
    train, held = loaded(texts, dataset_streaming=streaming)
    expected = {path.read_text() for path in (texts / "below").iterdir()}
    assert len(train) == 8
    assert len(held) == 2
    assert {*train, *held} == expected
    assert set(train).isdisjoint(held)
    every, none = loaded(texts, evaluate=False, dataset_streaming=streaming)
    assert set(every) == expected
    assert none == []


def test_folders_that_are_named_as_splits_are_the_splits(tmp_path: Path) -> None:
    for name in ("train/a.py", "train/deeper/b.py", "validation/c.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{name}\n\nits second paragraph\n")
    train, held = loaded(tmp_path)
    assert {text.split()[0] for text in train} == {"train/a.py", "train/deeper/b.py"}
    assert [text.split()[0] for text in held] == ["validation/c.py"]
    assert all("its second paragraph" in text for text in (*train, *held))


def test_tables_are_read_as_tables(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {index}", "url": "u"}) for index in range(4)]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    (tmp_path / "validation.jsonl").write_text(json.dumps({"text": "held out"}))
    train, held = loaded(tmp_path)
    assert train == [f"document {index}" for index in range(4)]
    assert held == ["held out"]


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(UserError, match="is a folder without files"):
        loaded(folder)
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="a file that is not text in UTF-8"):
        loaded(folder)
    (folder / "picture.png").unlink()
    (folder / "only.txt").write_text("one document")
    with pytest.raises(UserError, match="too few documents to hold some out"):
        loaded(folder)
    assert loaded(folder, evaluate=False) == (["one document"], [])


# ---- the place in a stream


def stream() -> datasets.IterableDataset:
    """Twelve rows from a map that makes three of each document, as packing makes rows."""
    documents = datasets.Dataset.from_dict({"number": [10, 20, 30, 40]}).to_iterable_dataset(num_shards=2)
    return documents.map(
        lambda batch: {"row": [number + i for number in batch["number"] for i in range(3)]},
        batched=True,
        batch_size=3,
        remove_columns=["number"],
    )


def first_rows(positioned: Positioned, count: int) -> list[int]:
    rows = iter(positioned)
    return [next(rows)["row"] for _ in range(count)]


LOST = pytest.mark.skipif(LOSES_LAST_ROWS, reason="datasets 4 loses two rows there")


@pytest.mark.parametrize("steps", [*range(1, 5), pytest.param(5, marks=LOST), 6, 7])  # at 8 the stream begins anew
def test_a_stream_goes_on_at_every_place(steps: int) -> None:
    per_step = 2
    expected = first_rows(Positioned(stream(), per_step), 40)
    read = Positioned(stream(), per_step)
    first_rows(read, steps * per_step + 3)  # loaders read ahead
    place = read.place_after(steps)
    assert place is not None
    resumed = Positioned(stream(), per_step)
    resumed.go_to(steps, json.loads(json.dumps(place)))
    assert first_rows(resumed, 10) == expected[steps * per_step : steps * per_step + 10]
    # Its own places count from the beginning of the first run.
    assert resumed.place_after(steps + 2) is not None


def test_a_record_is_not_made_by_a_run_that_does_not_begin(settings: dict[str, Any], tmp_path: Path) -> None:
    trainer = made(options(settings))
    trainer.record("hf-galore pretrain", None, "model", "data")
    assert not list(tmp_path.rglob(RUN_FILE))
