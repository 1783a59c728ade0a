"""`hf-galore dpo` ends where TRL's trainer does, goes on where it was, and says what is wrong with data or options."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from hf_galore.cli.main import main
from hf_galore.errors import UserError
from hf_galore.recipes import dpo
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.kinds import command_of
from hf_galore.recipes.run_record import RunFacts
from hf_galore.recipes.settings import RECIPE_FILE
from tests.support.commands import ON_CPU, history, options, said_of_mistake, weights, write_recipe
from tests.support.helpers import assert_identical
from tests.support.releases import as_named_here

QUESTIONS = ("What is AI?", "Who are you?", "Name a colour.", "Is it late?", "Where is Rome?")


def turn(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def write_rows(folder: Path, train: Sequence[Any], test: Sequence[Any] | None = None) -> Path:
    """A folder of data."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", test)):
        if rows is not None:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of conversations with a preferred answer; the prompt is in a column of its own."""
    rows = [
        {
            "prompt": turn("user", QUESTIONS[number % 5]),
            "chosen": turn("assistant", f"A good answer, the {number}th."),
            "rejected": turn("assistant", "No."),
        }
        for number in range(12)
    ]
    return write_rows(tmp_path_factory.mktemp("pairs"), rows, rows[:4])


def settings_of(small: Embedded, data: Path, output_dir: Path, **changes: Any) -> dict[str, Any]:
    """What a run of four steps and two checkpoints is told."""
    return {
        **ON_CPU,
        "model_name_or_path": small.model,
        "dataset_name": data,
        "max_length": 48,
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=16, update_proj_gap=2, scale=1",
        "learning_rate": 1e-3,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "output_dir": output_dir,
        **changes,
    }


Run = tuple[dict[str, Any], Path]


@pytest.fixture(scope="module", params=[False, True], ids=["a copy", "beforehand"])
def finished(
    request: pytest.FixtureRequest, small: Embedded, pairs: Path, tmp_path_factory: pytest.TempPathFactory
) -> Run:
    """What a run was told, and its folder; not to be changed."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    settings = settings_of(small, pairs, folder, precompute_ref_log_probs=str(request.param).lower())
    assert main(["dpo", *options(settings)]) == 0
    return settings, folder


def test_it_ends_where_trls_trainer_ends(finished: Run, pairs: Path, tmp_path: Path) -> None:
    settings, out = finished
    given = {key: value for key, value in settings.items() if key not in ("model_name_or_path", "dataset_name")}
    given |= {"use_cpu": True, "bf16": False, "disable_tqdm": True, "output_dir": str(tmp_path / "theirs")}
    given |= {"precompute_ref_log_probs": settings["precompute_ref_log_probs"] == "true"}
    data = load_dataset(str(pairs))
    theirs = DPOTrainer(
        str(settings["model_name_or_path"]),
        args=DPOConfig(**as_named_here({**given, "logging_nan_inf_filter": False})),
        train_dataset=data["train"],
        eval_dataset=data["test"],
    )
    theirs.train()
    assert_identical(weights(out), weights(tmp_path / "theirs" / "checkpoint-4"))
    ours = {entry["step"]: entry for entry in history(out) if "loss" in entry}
    for entry in (entry for entry in theirs.state.log_history if "loss" in entry):
        for key in ("loss", "rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"):
            assert ours[entry["step"]][key] == entry[key]
    # It has learnt what is preferred: at first nothing is, beside the model itself.
    assert abs(ours[1]["rewards/margins"]) < 1e-4 < 1 < ours[4]["rewards/margins"]
    held_out = [entry["eval_rewards/accuracies"] for entry in history(out) if "eval_loss" in entry]
    assert held_out == [1, 1]


def test_a_resumed_run_is_an_uninterrupted_one(finished: Run, tmp_path: Path) -> None:
    settings, out = finished
    resumed = tmp_path / "out"
    shutil.copytree(out, resumed, ignore=shutil.ignore_patterns("checkpoint-4"))
    (resumed / "model.safetensors").unlink()
    torch.manual_seed(1)
    assert main(["dpo", *options({**settings, "output_dir": resumed}), "--resume_from_checkpoint"]) == 0
    assert_identical(weights(resumed), weights(out))
    logs = [
        [{key: value for key, value in entry.items() if not key.startswith("galore/")} for entry in history(folder)]
        for folder in (resumed, out)  # some of GaLore's are logged once by each process
    ]
    assert logs[0] == logs[1]


def test_what_a_run_leaves(finished: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Its record, a recipe that is one for DPO, a model card; and a model that answers from a folder."""
    settings, out = finished
    facts = RunFacts.read(out)
    assert facts is not None
    assert (facts.command, facts.finished) == ("hf-galore dpo", True)
    assert facts.settings is not None
    assert facts.settings["beta"] == 0.1
    assert command_of(out / RECIPE_FILE) == "dpo"
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "### GaLore" in card
    assert "Direct Preference Optimization" in card
    assert AutoTokenizer.from_pretrained(out).chat_template
    start = AutoModelForCausalLM.from_pretrained(settings["model_name_or_path"]).state_dict()
    end = AutoModelForCausalLM.from_pretrained(out).state_dict()
    assert all(not torch.equal(start[name], end[name]) for name in start if name.endswith("proj.weight"))
    capsys.readouterr()
    assert main(["dpo", *options(settings), "--resume_from_checkpoint"]) == 0
    assert f"hf-galore dpo: the run in {out} is finished, at step 4" in capsys.readouterr().out


# ---- data


CONVERSATION = [*turn("user", "Who are you?"), *turn("assistant", "A model.")]
OTHER = [*turn("user", "Who are you?"), *turn("assistant", "Why?")]


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": CONVERSATION, "rejected": OTHER},
        {"prompt": "Who are you?", "chosen": " A model.", "rejected": " Why?"},
        {"chosen": "Who are you? A model.", "rejected": "Who are you? Why?", "score": 1.0},
    ],
    ids=["whole conversations", "texts", "whole texts"],
)
def test_other_forms_of_data(row: dict[str, Any], small: Embedded, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "data", [row] * 4)
    settings = settings_of(small, data, tmp_path / "out", max_steps=1, eval_strategy="no", save_strategy="no")
    trainer = dpo.parse(options(settings), "", "").make_trainer()
    (batch,) = list(trainer.get_train_dataloader())[:1]
    decode = trainer.processing_class.decode
    first, last = (decode(batch["input_ids"][index][batch["completion_mask"][index] == 1]) for index in (0, -1))
    assert "A model." in first
    assert "Why?" in last
    assert "Who are you?" not in first + last


NEEDS = (
    "DPO needs 'chosen' and 'rejected', an answer that is preferred to another, and 'prompt' where they do not begin "
    "with it: all of them texts, or all of them conversations, which are lists of role and content."
)


@pytest.mark.parametrize(
    ("row", "told"),
    [
        (
            {"messages": CONVERSATION},
            f" has the columns messages. {NEEDS} Data with 'messages' or 'completion' are for hf-galore sft.",
        ),
        ({"chosen": "a", "text": "b"}, f" has the columns chosen, text. {NEEDS}"),
        (
            {"prompt": "a", "chosen": CONVERSATION, "rejected": OTHER},
            " has a first row of which prompt is a text, chosen is a conversation, rejected is a conversation. "
            f"{NEEDS} Where the conversations begin with the prompt, leave out the column 'prompt'.",
        ),
        (
            {"chosen": CONVERSATION, "rejected": "no"},
            f" has a first row of which chosen is a conversation, rejected is a text. {NEEDS}",
        ),
        (
            {"chosen": [], "rejected": None},
            f" has a first row of which chosen is of list, rejected is of NoneType. {NEEDS}",
        ),
        (
            {"chosen": [{"from": "human", "value": "Hi"}], "rejected": OTHER},
            f" has a first row of which chosen is of list, rejected is a conversation. {NEEDS}",
        ),
    ],
)
def test_data_of_another_form_are_refused_before_the_weights_are_loaded(
    row: dict[str, Any],
    told: str,
    small: Embedded,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(dpo, "load_trainer", lambda *args: pytest.fail("the model was loaded"))
    data = write_rows(tmp_path / "data", [row])
    settings = settings_of(small, data, tmp_path / "out", eval_strategy="no")
    assert said_of_mistake("dpo", options(settings), capsys) == f"hf-galore dpo: The dataset's split 'train'{told}"
    assert not (tmp_path / "out").exists()


def test_an_answer_may_be_a_call_of_a_tool_without_content() -> None:
    call = [{"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look", "arguments": {}}}]}]
    dpo.check_pair({"prompt": CONVERSATION, "chosen": call, "rejected": OTHER}, "data")


@pytest.mark.parametrize("message", [{"role": "assistant", "content": None}, {"role": None, "content": "a"}])
def test_a_message_that_says_nothing_is_found_before_the_weights_are_loaded(message: dict[str, Any]) -> None:
    with pytest.raises(
        UserError, match=r"^data has a row, number 2, of which chosen is a conversation, rejected is of"
    ):
        dpo.check_pair({"chosen": CONVERSATION, "rejected": [message]}, "data", 2)


def test_one_loss_needs_no_list(tmp_path: Path) -> None:
    for losses in ("ipo", ["ipo"]):
        recipe = write_recipe(tmp_path, {"loss_type": losses, "use_cpu": True, "bf16": False})
        assert dpo.parse(["--config", recipe], "hf-galore dpo", "").training.loss_type == ["ipo"]


def test_conversations_need_a_template(
    small: Embedded, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(dpo, "load_trainer", lambda *args: pytest.fail("the model was loaded"))
    base = tmp_path / "base"
    shutil.copytree(small.model, base, ignore=shutil.ignore_patterns("chat_template*"))
    config = json.loads((base / "tokenizer_config.json").read_text(encoding="utf-8"))
    config.pop("chat_template", None)
    (base / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    settings = settings_of(small, pairs, tmp_path / "out", model_name_or_path=base)
    assert said_of_mistake("dpo", options(settings), capsys) == (
        f"hf-galore dpo: model_name_or_path {base} has no chat template, which conversations need. DPO begins where a "
        "model has learnt to answer: give one that has, such as the output_dir of a run of hf-galore sft."
    )


def test_what_a_mixture_holds_out_is_no_chance(small: Embedded, pairs: Path, tmp_path: Path) -> None:
    """TRL draws it by numpy's own state: a run that goes on would learn what it had held out."""
    given = settings_of(small, pairs, tmp_path / "out", max_steps=1)
    del given["dataset_name"]
    recipe = write_recipe(tmp_path, {"datasets": [{"path": str(pairs)}], "test_split_size": 0.25})

    def held_out(seed: int) -> list[list[int]]:
        parsed = dpo.parse(["--config", recipe, *options({**given, "seed": seed})], "", "")
        return [row["chosen_ids"] for row in parsed.make_trainer().eval_dataset]

    first = held_out(1)
    assert len(first) == 3
    assert held_out(1) == first
    assert any(held_out(seed) != first for seed in (2, 3))


# ---- options


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["--loss_type", "sigmod"], "loss_type 'sigmod' has to be one of sigmoid, hinge, ipo, "),
        (["--padding_free", "true"], "padding_free has no effect with TRL's DPOTrainer, which pads all the same."),
        (
            ["--precompute_ref_log_probs", "true", "--dataset_streaming", "true"],
            "precompute_ref_log_probs goes through all data once before the first step, which a stream has no end for.",
        ),
        (
            ["--precompute_ref_log_probs", "true", "--sync_ref_model", "true"],
            "sync_ref_model changes the reference while it trains; precompute_ref_log_probs goes through all data ",
        ),
        (["--assistant_only_loss", "true"], "there is no option --assistant_only_loss."),
    ],
)
def test_options_that_are_of_no_effect_or_do_not_go_together(
    given: list[str], told: str, small: Embedded, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(small, pairs, tmp_path / "out")
    line = said_of_mistake("dpo", [*options(settings), *given], capsys)
    assert told in line
    assert not (tmp_path / "out").exists()


def test_a_reference_that_moves_is_not_gone_on_with(
    finished: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, _ = finished
    given = {**settings, "max_steps": 6, "precompute_ref_log_probs": "false", "sync_ref_model": "true"}
    line = said_of_mistake("dpo", [*options(given), "--resume_from_checkpoint"], capsys)
    assert "a checkpoint does not hold the reference, which sync_ref_model has changed since the run began" in line


def test_a_recipe_of_sft_says_whose_its_keys_are(
    small: Embedded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = said_of_mistake("dpo", ["--config", "qwen3_0.6b_oasst2.yaml"], capsys)
    assert line.endswith("there is no option 'chat_template_path'. It is one of hf-galore sft.")
    line = said_of_mistake("sft", ["--config", "dpo/qwen3_0.6b_ultrafeedback.yaml"], capsys)
    assert line.endswith("there is no option 'beta'. It is one of hf-galore dpo.")
