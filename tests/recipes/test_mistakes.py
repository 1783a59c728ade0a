"""What is wrong in data, models and arguments: one line, exit status 2, before the weights are loaded, nothing left."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import GPT2Config, PreTrainedModel

from hf_galore.recipes import sft
from hf_galore.recipes.embedded_model import Embedded
from tests.support.commands import ON_CPU, options, said_of_mistake, short_run
from tests.support.releases import FUSED_HEAD

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "there"}]}


@pytest.fixture(autouse=True)
def _no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    def loads(*args: Any, **kwargs: Any) -> None:
        pytest.fail("the weights were loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", classmethod(loads))
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def said(value: Any) -> dict[str, Any]:
    """A conversation in which the assistant says that."""
    return {"messages": [GOOD["messages"][0], {"role": "assistant", "content": value}]}


# ---- data of `sft`: what is in train.jsonl

EACH = ["assistant_only_loss", "no_assistant_only_loss"]
DATA: dict[str, tuple[str | bytes, dict[str, Any], str]] = {
    "an empty file": ("", {}, "cannot be loaded: {file} is empty. Give it rows, or remove it."),
    "empty lines": ("\n\n", {}, "cannot be loaded: {file} has no rows."),
    "no messages": (lines(GOOD, {"messages": []}), {}, "row 2: has no messages (the list is empty). Mend the data"),
    "no messages anywhere": (
        lines({"messages": []}, {"messages": []}),
        {},
        "row 1 and 1 other row(s): has no messages",
    ),
    "no messages to learn": (lines({"messages": []}, GOOD), {"assistant_only_loss": True}, "row 1: has no messages"),
    "null": (lines(GOOD, GOOD, {"messages": None}), {}, "row 3: has no messages (it is missing or null)"),
    "no such column in some": (lines(GOOD, {"text": "a"}), {}, "row 2: has no messages (it is missing or null)"),
    "a message without content": (
        lines(GOOD, said(None)),
        {},
        "row 2: has a message without content (it is missing or null): number 2 of its messages",
    ),
    "a message without role": (
        lines({"messages": [{"speaker": "me", "content": "a"}]}),
        {},
        "row 1: has a message without role (it has speaker, content): number 1 of its messages",
    ),
    "words": (lines({"messages": ["a", "b"]}), {}, "that is no mapping of role and content, but 'a'"),
    "text as messages": (
        lines({"messages": "a"}),
        {},
        "has text as messages, where a list of role and content belongs",
    ),
    "null text": (lines({"text": "a"}, {"text": None}), {}, "row 2: has no text (it is missing or null)"),
    "a number": (lines({"text": 1}, {"text": 2}), {}, "row 1 and 1 other row(s): has 1 as text, which is no text"),
    "no completion": (
        lines({"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": None}),
        {},
        "row 2: has no completion (it is missing or null)",
    ),
    "half a conversation": (
        lines({"prompt": "a", "completion": [{"role": "assistant", "content": "b"}]}),
        {},
        "row 1: has text for one of prompt and completion, and messages for the other",
    ),
    "nobody to learn from": (
        lines(GOOD, {"messages": [{"role": "user", "content": "a"}, {"role": "helper", "content": "b"}]}),
        {"assistant_only_loss": True},
        "row 2: has no message of role assistant, which assistant_only_loss learns from, but of user, helper",
    ),
    "text to learn answers from": (
        lines({"text": "a"}),
        {"assistant_only_loss": True},
        "assistant_only_loss is for conversations, but dataset_name {folder}, split 'train', holds text.",
    ),
    "a broken line": (
        lines(GOOD, GOOD) + '{"messages": [\n' + lines(GOOD),
        {},
        "cannot be loaded: {file}, line 3 is no JSON (Expecting value, at character 16).",
    ),
    "UTF-16": (
        lines(GOOD).encode("utf-16"),
        {},
        "{file}, line 1 is not text in UTF-8 (invalid start byte); save it in",
    ),
    "Latin-1": ('{"text": "café"}\n'.encode("latin-1"), {}, "it holds a file that is not text in UTF-8 ("),
    "no split to evaluate": (
        lines(GOOD),
        {"eval_strategy": "steps", "eval_steps": 2},
        "no split 'test'; it has train. Set dataset_test_split to one of them, or eval_strategy to 'no'.",
    ),
}
# What datasets 4 fails on itself, it has other words for.
BY_DATASETS_4 = {
    "row 2: has no messages (it is missing or null)": "it has rows without 'messages'",
    "it holds a file that is not text in UTF-8 (": "line 1 is not text in UTF-8 (",
}


@pytest.mark.parametrize(("text", "changes", "words"), DATA.values(), ids=list(DATA))
def test_data_that_cannot_be_trained_on(
    text: str | bytes,
    changes: dict[str, Any],
    words: str,
    small: Embedded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "data" / "train.jsonl"
    file.parent.mkdir()
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    settings = {**short_run(small.model, file.parent, tmp_path / "out"), **changes}
    line = said_of_mistake("sft", options(settings), capsys)
    assert words.format(file=file, folder=file.parent) in line or BY_DATASETS_4.get(words, words) in line
    assert not (tmp_path / "out").exists()


# ---- the model's folder: what becomes of a copy of it


def without(*names: str) -> Callable[[Path], None]:
    def remove(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return remove


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def without_architectures(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["architectures"]
    (folder / "config.json").write_text(json.dumps(config))


def without_template(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def with_template(text: str) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        without_template(folder)
        (folder / "chat_template.jinja").write_text(text)

    return write


MODELS: dict[str, tuple[Callable[[Path], None], dict[str, Any], str]] = {
    "no tokenizer": (
        without("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
        {},
        "is a folder without a tokenizer (tokenizer.json, ...). Copy the files of its tokenizer there",
    ),
    "no weights": (
        without("model.safetensors"),
        {},
        "cannot be loaded: it holds no model.safetensors. Copy or download",
    ),
    "half of the weights": (cut, {}, "cannot be loaded: model.safetensors is cut off ("),
    "a config without a class": (without_architectures, {}, "names no architectures, which TRL loads it by."),
    "a base model": (
        without_template,
        {},
        "has no chat template, as base models have none, and the data are conversations. Set chat_template_path: "
        "recipes/chatml, which comes with hf_galore",
    ),
    "a template that marks nothing": (
        with_template(
            "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
        ),
        {"assistant_only_loss": True},
        "assistant_only_loss needs a chat template that marks the assistant's words with {% generation %}, and that of",
    ),
    "a template that refuses": (
        with_template("{% for m in messages %}{{ raise_exception('no such role') }}{% endfor %}"),
        {},
        "refuses the first conversation: no such role",
    ),
}


@pytest.mark.parametrize(("change", "changes", "words"), MODELS.values(), ids=list(MODELS))
def test_a_models_folder_that_cannot_be_trained_from(
    change: Callable[[Path], None],
    changes: dict[str, Any],
    words: str,
    small: Embedded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(small.model, folder)
    change(folder)
    line = said_of_mistake("sft", options({**short_run(folder, small.data, tmp_path / "out"), **changes}), capsys)
    assert words in line
    assert str(folder) in line
    assert not (tmp_path / "out").exists()


# ---- arguments


@pytest.fixture
def _no_service() -> Iterator[None]:
    """W&B's process for this one ends with the test; by its environment other processes would find it."""
    yield
    if "wandb" in sys.modules:
        sys.modules["wandb"].teardown()


ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "no such target": (
        {"optim_target_modules": ["atn", "mlp"]},
        "'atn' matches no trainable matrix of LlamaForC",
    ),
    "no targets": (
        {"optim_target_modules": None},
        "optim='galore_adamw' needs optim_target_modules: which weights",
    ),
    "rank above every side": (
        {"optim_args": "rank=4096"},
        "so nothing would be projected. Give a rank of at most 255.",
    ),
    "a template that is not there": (
        {"chat_template_path": "no/x.jinja"},
        "no/x.jinja: there is no such file. Give one",
    ),
    "a template without one": (
        {"chat_template_path": "{config}"},
        # transformers 5.5 makes of such a folder a tokenizer without a template.
        "chat_template_path {config} " + ("is no file (.jinja, .j2)" if FUSED_HEAD else "has no chat template."),
    ),
    "no such token": (
        {"eos_token": "<|no|>"},
        "eos_token <|no|> is no token of the model's tokenizer. Give one that is",
    ),
    "a file as model": (
        {"model_name_or_path": "{file}"},
        "model_name_or_path {file} is a file. Give the folder that it",
    ),
    "a model that is not there": ({"model_name_or_path": "./no"}, "model_name_or_path ./no: there is no such folder."),
    "a model at home": ({"model_name_or_path": "~/no"}, "folder. Write the path in full: only a shell knows ~."),
    "a file as data that is not there": ({"dataset_name": "no.jsonl"}, "dataset_name no.jsonl: there is no such file."),
    "a file of another kind": (
        {"dataset_name": "{weights}"},
        "is a file whose name ends in none of .json, .jsonl, .csv, .t",
    ),
    "offline": (
        {"push_to_hub": True, "optim": "adamw_torch"},
        "push_to_hub: HF_HUB_OFFLINE is set, so nothing reaches",
    ),
    "nobody logged in": (
        {"report_to": "wandb"},
        "nobody is logged in to wandb, and there is no terminal to ask in. Run",
    ),
    "elsewhere, offline": (
        {"report_to": "trackio", "trackio_space_id": "me/runs"},
        "report_to trackio with trackio_space_id: HF_HUB_OFFLINE is set",
    ),
}


@pytest.mark.usefixtures("_no_service")
@pytest.mark.parametrize(("changes", "words"), ARGUMENTS.values(), ids=list(ARGUMENTS))
def test_arguments_that_are_found_wrong_before_the_weights_are_loaded(
    changes: dict[str, Any],
    words: str,
    small: Embedded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for tracker in ("wandb", "trackio"):
        if tracker == changes.get("report_to"):
            pytest.importorskip(tracker, reason="the extra tracking is not installed")
    monkeypatch.setenv("HOME", str(tmp_path))  # somebody may be logged in
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (tmp_path / "config").mkdir()
    shutil.copy(small.model / "config.json", tmp_path / "config")
    places = {name: small.model / file for name, file in (("file", "config.json"), ("weights", "model.safetensors"))}
    places["config"] = tmp_path / "config"
    given = {**short_run(small.model, small.data, tmp_path / "out"), **changes}
    settings = {
        key: value.format(**places) if isinstance(value, str) else value
        for key, value in given.items()
        if value is not None
    }
    assert words.format(**places) in said_of_mistake("sft", options(settings), capsys)
    assert not (tmp_path / "out").exists()


# ---- pretrain and glue

PRETRAIN: dict[str, tuple[str, dict[str, Any], str]] = {
    "an empty file": ("", {}, "is empty. Give it rows, or remove it."),
    "null": (lines({"text": "a"}, {"text": None}), {}, "split 'train', row 2: has no text (it is missing or null)"),
    "a number": (lines({"text": 1}), {}, "split 'train', row 1: has 1 as text, which is no text"),
    "no such target": (
        lines({"text": "a"}),
        {"optim_target_modules": ["atn"]},
        "'atn' matches no trainable matrix",
    ),
    "no tokenizer": (
        lines({"text": "a"}),
        {"tokenizer_name": "{config}"},
        "tokenizer_name {config} is a folder without",
    ),
    "too long": (
        lines({"text": "a"}),
        {"max_length": 33},
        "max_length 33 is more than the 32 positions that the model",
    ),
}


@pytest.mark.parametrize(("text", "changes", "words"), PRETRAIN.values(), ids=list(PRETRAIN))
def test_mistakes_of_pretrain(
    text: str,
    changes: dict[str, Any],
    words: str,
    small: Embedded,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text(text)
    GPT2Config(n_layer=1, n_head=2, n_embd=16, n_positions=32).save_pretrained(tmp_path / "config")
    settings = {
        **ON_CPU,
        "config_name": tmp_path / "config",
        "tokenizer_name": small.model,
        "dataset_name": file,
        "max_length": 32,
        "optim": "galore_adamw",
        "optim_target_modules": "all-linear",
        "optim_args": "rank=4",
        "output_dir": tmp_path / "out",
        **{
            key: value.format(config=tmp_path / "config") if isinstance(value, str) else value
            for key, value in changes.items()
        },
    }
    assert words.format(config=tmp_path / "config") in said_of_mistake("pretrain", options(settings), capsys)
    assert not (tmp_path / "out").exists()


GLUE: dict[str, tuple[str, str, str]] = {
    "an empty file": ("", "b,1\n", "is empty. Give it rows, or remove it."),
    "no rows": ("text,label\n", "text,label\nb,1\n", "train.csv has no rows."),
    "no text": ("text,label\na,0\n,1\n", "text,label\nb,1\n", "The training texts have a row without text (it is mis"),
    "no label": ("text,label\na,0\n", "text,label\nb,1\nc,\n", "The validation texts have a row without label (it is"),
    "one class": (
        "text,label\na,0\n",
        "text,label\nb,0\n",
        "All texts have the label 0. A classifier needs texts of two",
    ),
}


@pytest.mark.parametrize(("train", "validation", "words"), GLUE.values(), ids=list(GLUE))
def test_mistakes_of_glue(
    train: str, validation: str, words: str, small: Embedded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"train_file": tmp_path / "train.csv", "validation_file": tmp_path / "validation.csv"}
    for file, text in zip(files.values(), (train, validation), strict=True):
        file.write_text(text)
    settings = {**short_run(small.model, small.data, tmp_path / "out"), "eval_strategy": "epoch", **files}
    settings = {
        key: value for key, value in settings.items() if key not in ("dataset_name", "activation_checkpointing")
    }
    assert words in said_of_mistake("glue", options(settings), capsys)
    assert not (tmp_path / "out").exists()


# ---- nothing wrong


def test_checking_loads_all_but_the_weights(small: Embedded, tmp_path: Path) -> None:
    parsed = sft.parse(options(short_run(small.model, small.data, tmp_path / "out")), "", "")
    checked = parsed.check()
    assert checked.train.column_names == ["messages"]
    assert checked.evaluated is None
    assert checked.processing_class.eos_token == "<|im_end|>"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert list((tmp_path / "out").iterdir()) == []
