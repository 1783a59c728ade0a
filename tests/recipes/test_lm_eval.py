"""A checkpoint of ours in EleutherAI's lm-evaluation-harness: `lm-eval run` with the task of recipes/lm_eval."""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import datasets
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_galore.cli.main import main
from hf_galore.recipes.embedded_model import CACHE_VARIABLE, Conversation, Embedded, conversations, embedded, split
from hf_galore.recipes.folders import recipes_folder
from tests.support.commands import options

lm_eval = pytest.importorskip("lm_eval.tasks", reason="the extra eval is not installed")
command = pytest.importorskip("lm_eval.__main__")

TASKS = recipes_folder() / "lm_eval"


class Taught(NamedTuple):
    """A model, and the few conversations that it has learnt by heart."""

    model: Path
    data: Path


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        return embedded()


@pytest.fixture(scope="module")
def taught(small: Embedded, tmp_path_factory: pytest.TempPathFactory) -> Taught:
    folder = tmp_path_factory.mktemp("taught")
    train, _ = split(conversations())
    data = folder / "data" / "train.jsonl"
    data.parent.mkdir()
    write(data, [messages for messages in train if len(messages) == 2 and len(str(messages)) < 180][::20][:16])
    settings = {
        "model_name_or_path": small.model,
        "dataset_name": data.parent,
        "assistant_only_loss": "true",
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": "all-linear",
        "optim_args": "rank=64, update_proj_gap=20, scale=1",
        "learning_rate": 4e-3,
        "max_steps": 12,
        "per_device_train_batch_size": 16,
        "activation_checkpointing": "false",
        "bf16": "false",
        "use_cpu": "true",
        "disable_tqdm": "true",
        "save_strategy": "no",
        "output_dir": folder / "out",
    }
    assert main(["sft", *options(settings)]) == 0
    return Taught(folder / "out", data)


def write(path: Path, every: Sequence[Conversation]) -> None:
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in every), encoding="utf-8")


@pytest.fixture
def scores(small: Embedded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What `lm-eval run` writes for a model and a folder of tasks."""
    monkeypatch.setenv(CACHE_VARIABLE, str(small.model.parents[1]))
    # Its own 14,000 task files take it ten seconds to look through, each time.
    own_only = functools.partial(lm_eval.TaskManager, include_defaults=False)
    monkeypatch.setattr(lm_eval, "TaskManager", own_only)
    monkeypatch.setattr(command, "setup_logging", lambda: None)  # it would keep pytest's stderr for good

    def run(model: Path, tasks: Path = TASKS) -> dict[str, Any]:
        arguments = f"--model hf --model_args pretrained={model} --apply_chat_template --batch_size 16 --device cpu"
        arguments += f" --include_path {tasks} --tasks conversations --output_path {tmp_path / 'results'}"
        monkeypatch.setattr(sys, "argv", ["lm-eval", "run", *arguments.split()])
        command.cli_evaluate()
        (written,) = (tmp_path / "results").rglob("results_*.json")
        found = json.loads(written.read_text(encoding="utf-8"))
        written.unlink()
        return {
            "questions": found["n-samples"]["conversations"]["effective"],
            **{
                name: found["results"]["conversations"][f"{name},none"] for name in ("acc", "acc_norm", "bits_per_byte")
            },
        }

    return run


def copied(folder: Path, data: Path) -> Path:
    """The task's folder, changed as its comments say, for conversations of one's own."""
    shutil.copytree(TASKS, folder, ignore=shutil.ignore_patterns("__pycache__"))
    task = folder / "conversations.yaml"
    lines = task.read_text(encoding="utf-8").splitlines()
    first = lines.index("#   dataset_path: json")
    own = [line.removeprefix("#   ") for line in lines[first : first + 4]]
    (place,) = (number for number, line in enumerate(lines) if line.startswith("custom_dataset:"))
    text = "\n".join([*lines[:place], *own, *lines[place + 1 :]])
    assert text.count("my_conversations.jsonl") == 2  # in the comment too
    task.write_text(text.replace("my_conversations.jsonl", str(data)), encoding="utf-8")
    return folder


# ---- the command


def test_what_a_model_has_learnt_shows(taught: Taught, small: Embedded, scores: Any, tmp_path: Path) -> None:
    tasks = copied(tmp_path / "tasks", taught.data)
    before, after = scores(small.model, tasks), scores(taught.model, tasks)
    assert before["questions"] == after["questions"] == 16
    # A random model finds 8 of 16, with a chance of a quarter each, once in 36 times.
    assert before["acc"] < 0.5
    assert before["acc_norm"] < 0.5
    assert before["bits_per_byte"] > 3
    assert after["acc"] == after["acc_norm"] == 1
    assert after["bits_per_byte"] < 0.1


def test_scores_on_what_is_held_out_are_those_of_the_saved_weights(taught: Taught, scores: Any) -> None:
    """Of likelihoods computed here, from the checkpoint, with the template that it was trained with."""
    _, held_out = split(conversations())
    found = scores(taught.model)
    assert found["questions"] == len(held_out) == 94
    # Sixteen conversations teach nothing about others: four standard errors around a quarter.
    assert found["acc"] == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 94))
    # Batches of other lengths sum in another order.
    assert found["bits_per_byte"] == pytest.approx(bits_per_byte(taught.model, held_out), rel=1e-5)


def bits_per_byte(folder: Path, every: Sequence[Conversation]) -> float:
    """Of the first answers, without their first words."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    nats, size = 0.0, 0
    for messages in every:
        prompt = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
        word, space, rest = messages[1]["content"].partition(" ")
        given = len(tokenizer(prompt + word)["input_ids"])
        tokens = torch.tensor(tokenizer(prompt + word + space + rest)["input_ids"])
        with torch.no_grad():
            log_likelihoods = model(tokens.unsqueeze(0)).logits[0, :-1].log_softmax(-1)
        nats -= float(log_likelihoods.gather(1, tokens[1:, None])[given - 1 :].sum())
        size += len((space + rest).encode())
    return nats / math.log(2) / size


# ---- the questions


@pytest.fixture(scope="module")
def utils() -> ModuleType:
    spec = importlib.util.spec_from_file_location("lm_eval_utils", TASKS / "utils.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def as_dataset(every: Sequence[Conversation]) -> datasets.Dataset:
    return datasets.Dataset.from_list([{"messages": messages} for messages in every])


def pair(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def test_the_right_answer_is_among_answers_to_other_questions(utils: ModuleType) -> None:
    _, held_out = split(conversations())
    rows = utils.questions(as_dataset(held_out))
    assert rows.to_list() == utils.questions(as_dataset(held_out)).to_list()
    answers: dict[str, set[str]] = {}
    for asked, answered in (messages[:2] for messages in held_out):
        answers.setdefault(asked["content"].casefold(), set()).add(answered["content"])
    assert max(map(len, answers.values())) > 1  # questions with several answers, none of which may be a wrong one
    for row, messages in zip(rows, held_out, strict=True):
        *choices, first_word = row["scored"]
        right = choices.pop(row["right"])
        assert (row["question"], right) == (messages[0]["content"], messages[1]["content"])
        assert first_word == right.split()[0]
        assert len(set(choices)) == 3
        assert answers[row["question"].casefold()].isdisjoint(choices)


def test_the_others_are_nearest_in_length(utils: ModuleType) -> None:
    lengths = (5, 50, 24, 90, 20, 21)
    rows = utils.questions(as_dataset([pair(f"q{n}", "a " + "b" * (n - 2)) for n in lengths]))
    assert [sorted(map(len, row["scored"][:4])) for row in rows] == [
        [5, 20, 21, 24],
        [20, 21, 24, 50],
        [5, 20, 21, 24],
        [21, 24, 50, 90],
        [5, 20, 21, 24],
        [5, 20, 21, 24],
    ]


@pytest.mark.parametrize("log_likelihood", [-1.0, math.nan])
def test_a_model_that_finds_all_alike_scores_a_quarter(log_likelihood: float, utils: ModuleType) -> None:
    rows = utils.questions(as_dataset([pair(f"q{n}", f"answer {n:02}") for n in range(12)]))
    scored = [utils.score(row, [(log_likelihood, False)] * 5) for row in rows]
    assert sum(row["acc"] for row in scored) == sum(row["acc_norm"] for row in scored) == 3


def test_scores_of_one_question(utils: ModuleType) -> None:
    doc = {"scored": ["four", "äh, yes", "nine letters", "no", "äh,"], "right": 1}
    found = utils.score(doc, [(-9.0, False), (-8.0, False), (-12.0, False), (-7.0, True), (-3.0, False)])
    # The likeliest is "no"; per character, "nine letters".
    assert found == {"acc": 0.0, "acc_norm": 0.0, "bits_per_byte": (-5.0, len(" yes"))}
    found = utils.score(doc, [(-9.0, False), (-6.0, True), (-12.0, False), (-7.0, False), (-3.0, False)])
    assert found == {"acc": 1.0, "acc_norm": 1.0, "bits_per_byte": (-3.0, 4)}


def test_an_answer_of_one_word_has_no_bits(utils: ModuleType) -> None:
    doc = {"scored": ["four", "five", "six", "Yes.", "Yes."], "right": 3}
    assert utils.score(doc, [(-4.0, False)] * 3 + [(-2.0, False)] * 2)["bits_per_byte"] == (0.0, 0)


MISTAKES: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no messages": ([{"question": "a", "answer": "b"}], "the columns question, answer. They need 'messages'"),
    "assistant first": ([{"messages": pair("a", "b")[::-1]}], "Conversation 1 has to begin with a message of user"),
    "one message": ([{"messages": pair("a", "b")}, {"messages": pair("a", "b")[:1]}], "Conversation 2 has to begin"),
    "empty": ([{"messages": pair("a", " ")}], "Conversation 1 begins with an empty message"),
    "one word each": ([{"messages": pair(f"q{n}", f"a{n}")} for n in range(4)], "None of the answers has two words"),
    "too few": ([{"messages": pair(f"q{n}", f"a {n}")} for n in range(3)], r"needs 3 .*, and there are 2\. Give more"),
    "one question": ([{"messages": pair("Q", f"a {n}")} for n in range(9)], r"needs 3 .*, and there are 0\."),
}


@pytest.mark.parametrize(("rows", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_conversations_that_cannot_be_asked(rows: list[dict[str, Any]], words: str, utils: ModuleType) -> None:
    with pytest.raises(ValueError, match=words):
        utils.questions(datasets.Dataset.from_list(rows))
