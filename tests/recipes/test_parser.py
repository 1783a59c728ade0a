"""What a recipe and the command line may say, in which spelling, and which command a recipe is for."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import SFTConfig

from hf_galore.config import GaLoreConfig
from hf_galore.errors import UserError
from hf_galore.recipes import kinds, sft
from hf_galore.recipes.folders import find_recipe, recipes_folder
from tests.support.commands import recipe_on_cpu


def parse(*arguments: str) -> sft.Arguments:
    return sft.parse(arguments, "hf-galore sft", "")


# ---- spellings


def test_values_in_every_spelling_that_yaml_and_trl_allow(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    # YAML 1.1 reads 1e-5 as text, 3 as an integer and yes as true.
    path.write_text(
        "learning_rate: 1e-5\nnum_train_epochs: 3\nbf16: no\nuse_cpu: yes\nresume_from_checkpoint: true\n"
        "model_init_kwargs: {attn_implementation: eager}\naccelerator_config: '{\"split_batches\": true}'\n"
        "max_length:\n"  # empty: none, which this key allows
    )
    for spelling in (["--config", str(path)], [f"--config={path}"]):
        parsed = parse(*spelling, "--weight-decay", "0.1")
        training = parsed.training
        assert training.learning_rate == 1e-5
        assert training.num_train_epochs == 3
        assert (training.bf16, training.use_cpu, training.resume_from_checkpoint) == (False, True, True)
        assert training.model_init_kwargs == {"attn_implementation": "eager"}
        assert training.accelerator_config.split_batches is True
        assert training.max_length is None
        assert training.weight_decay == 0.1
        assert parsed.recipe == path


def test_what_yaml_has_another_way_to_write(tmp_path: Path) -> None:
    """`trl sft` takes a name for a list of one; and everybody writes optim_args as a mapping."""
    optim_args = {"rank": 8, "scale": 1.5, "stagger": False, "proj_bits": "8"}
    settings = {
        "optim_args": optim_args,
        "lora_target_modules": "all-linear",
        "use_peft": True,
        "label_names": "labels",
    }
    parsed = parse("--config", recipe_on_cpu(tmp_path, **settings))
    assert parsed.training.optim_args == "proj_bits=8, rank=8, scale=1.5, stagger=false"
    assert GaLoreConfig.from_optim_args(parsed.training.optim_args) == GaLoreConfig.from_optim_args(optim_args)
    assert parsed.model.lora_target_modules == "all-linear"  # as TRL's ModelConfig makes it of a list of one
    assert parsed.training.label_names == ["labels"]


def test_a_copy_of_a_recipe_finds_the_template_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    copy = tmp_path / "deep" / "down" / "mine.yaml"
    copy.parent.mkdir(parents=True)
    copy.write_text((recipes_folder() / "llama2_7b_oasst2.yaml").read_text("utf-8"), "utf-8")
    parsed = parse("--config", str(copy), "--use_cpu", "true")
    assert parsed.training.chat_template_path == str(recipes_folder() / "chatml")


def test_a_recipe_sets_environment_variables_as_trl_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_GALORE_TEST", "before")
    parse("--config", recipe_on_cpu(tmp_path, env={"HF_GALORE_TEST": 3}))
    assert os.environ["HF_GALORE_TEST"] == "3"


@pytest.mark.parametrize(
    ("settings", "options", "words"),
    [
        ({"env": 3}, [], "env has to be a mapping"),
        ({"max_steps": None}, [], "max_steps has to be an integer, but is empty"),
        ({"bf16": "perhaps"}, [], "bf16 has to be true or false"),
        ({"use_cpu": 1}, [], "use_cpu has to be true or false, but is 1"),
        ({"learning_rate": True}, [], "learning_rate has to be a number, but is True"),
        ({"learning_rate": "fast"}, [], "learning_rate has to be a number, but is 'fast'"),
        ({"optim_args": {"rank": [8]}}, [], "optim_args has to be a string, but is {'rank': [8]}"),
        ({"optim_target_modules": ["attn", 3]}, [], "optim_target_modules has to be a string or a list of strings"),
        ({"optim_args": {"rank:8": None}}, [], "or {rank: 128, scale: 2} with a space after each colon."),
        ({"optim_args": ["rank=8"]}, [], "has to be a string, but is ['rank=8']. Write 'rank=128, scale=2'"),
        ({"training": {"seed": 1}}, [], "'training'. A recipe has no sections: all keys stand at the start of a line."),
        ({"dtype": "fp32"}, [], "but is 'fp32'. Did you mean 'float32'?"),
        ({"lr_scheduler_type": "cosin"}, [], "Did you mean 'cosine'?"),
        ({"datasets": "mine"}, [], "datasets has to be a list of mappings, but is 'mine'"),
        ({}, ["--optim_target_modules", '["attn", 3]'], '["attn", 3] is not a list of strings'),
        ({}, ["--config", "other.yaml"], "--config is given twice"),
        ({}, ["stray"], "'stray' belongs to no --key"),
        (
            {},
            ["--optim_target_modules=attn", "mlp"],
            "'mlp' belongs to no --key. Several values stand apart: --optim_target_modules attn mlp",
        ),
        (
            {},
            ["--max_steps", "3", "--optim_target_modules", "attn", "--optim-target-modules=mlp", "x"],
            "--optim_target_modules is given twice. All its values come after one: --optim_target_modules attn mlp x",
        ),
        (
            {},
            ["--optim_args", "rank=8,", "scale=1"],
            "'scale=1' belongs to no --key. They are one value, in quotes: --optim_args 'rank=8, scale=1'",
        ),
        # transformers would keep the recipe's value and drop the command line's.
        (
            {"activation_checkpointing": True},
            ["--gradient_checkpointing", "false"],
            "gradient_checkpointing and activation_checkpointing are both given",
        ),
    ],
)
def test_what_a_recipe_and_its_overrides_must_not_say(
    settings: dict[str, Any], options: list[str], words: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError) as error:
        parse("--config", recipe_on_cpu(tmp_path, **settings), *options)
    assert words in str(error.value)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seed: 1\n\tmax_steps: 2\n", "line 2: there is a tab. YAML takes spaces only."),
        ("seed:\t1\nmax_steps:\t2\n", "line 1: there is a tab."),
        ('seed: 1\noptim_args: "rank=8\nmax_steps: 2\n', "line 2: a quotation mark is opened there that is not"),
        ("optim_target_modules: [attn, mlp\nseed: 1\n", "line 1: a bracket is opened there that is not closed"),
        ("seed: 1\nmax_steps = 2 # few\nbf16: no\n", "line 2: 'max_steps = 2' is not 'key: value'. A colon and"),
        ("seed: 1\nmax_steps:2\nbf16: no\n", "line 2: 'max_steps:2' is not 'key: value'. A colon and"),
        ("optim_args: rank: 8\n", "line 1: there is a colon too many, or the line is indented."),
        ("seed: 1\n  max_steps: 2\n", "line 2: there is a colon too many, or the line is indented."),
        ("  seed: 1\nmax_steps: 2\n", "line 2: it begins in another column than the keys before it."),
        ('optim_args: "rank=8"\n  seed: 1\n', "line 2: it begins in another column than the keys before it."),
        ("seed: 1\n---\nseed: 2\n", "line 2: expected a single document in the stream but found another document."),
        ("# nothing\n", "has to hold 'key: value' lines, but is empty."),
        (b"output_dir: caf\xe9\n", "is not text in UTF-8 (invalid continuation byte). Save it in that encoding."),
    ],
)
def test_where_a_recipe_is_not_yaml_and_what_to_do_there(text: str | bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as error:
        parse("--config", str(path))
    assert words in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("attn, mlp", ["attn", "mlp"]),
        ("attn mlp", ["attn", "mlp"]),
        ("'[attn, mlp]'", ["attn", "mlp"]),
        ('\'["attn", "mlp"]\'', ["attn", "mlp"]),
        ("all-linear", "all-linear"),
        (r"'.*layers\.[0-9]\..*'", r".*layers\.[0-9]\..*"),
        ("'(attn, mlp)'", "(attn, mlp)"),
    ],
)
def test_targets_in_a_recipe(written: str, expected: Any, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(f"bf16: false\nuse_cpu: true\noptim_target_modules: {written}\n")
    assert parse("--config", str(path)).training.optim_target_modules == expected


def test_config_needs_a_file() -> None:
    for arguments in (["--config"], ["--config", "--max_steps", "3"], ["--config="]):
        with pytest.raises(UserError, match="--config needs a file"):
            parse(*arguments)


def test_a_template_is_found_from_the_recipes_folder_and_the_one_above(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for template in (tmp_path / "project" / "beside.jinja", tmp_path / "project" / "recipes" / "inside.jinja"):
        template.parent.mkdir(parents=True, exist_ok=True)
        template.write_text("{{ messages }}")
        path = recipe_on_cpu(tmp_path / "project" / "recipes", chat_template_path=template.name)
        assert parse("--config", path).training.chat_template_path == str(template)
    # A name that is nowhere may be a model on the Hub: it is left as it is.
    path = recipe_on_cpu(tmp_path / "project" / "recipes", chat_template_path="someone/tokenizer")
    assert parse("--config", path).training.chat_template_path == "someone/tokenizer"


@pytest.mark.parametrize(
    ("options", "args", "targets"),
    [
        (["--optim", "adamw_torch"], None, None),
        (["--optim=adamw_bnb_8bit"], None, None),
        (["--optim", "galore_adafactor"], "rank=8", ["attn"]),
        (["--optim", "lomo", "--optim_target_modules", "mlp"], None, "mlp"),
        ([], "rank=8", ["attn"]),
    ],
)
def test_another_optimizer_does_not_get_galores_arguments(
    options: list[str], args: str | None, targets: Any, tmp_path: Path
) -> None:
    galore = {"optim": "galore_adamw", "optim_args": "rank=8", "optim_target_modules": ["attn"]}
    training = parse("--config", recipe_on_cpu(tmp_path, **galore), *options).training
    assert (training.optim_args, training.optim_target_modules) == (args, targets)


# ---- overrides, and recipes that come with hf_galore


def test_the_command_line_overrides_the_file(tmp_path: Path) -> None:
    path = recipe_on_cpu(tmp_path, learning_rate=1e-3, optim="galore_adamw", optim_args="rank=16", max_steps=6)
    options = ["--learning_rate", "5e-4", "--optim_args=rank=8", "--output_dir", str(tmp_path / "other")]
    parsed = parse("--config", path, *options)
    assert parsed.training.learning_rate == 5e-4
    assert parsed.training.optim_args == "rank=8"
    assert parsed.training.output_dir == str(tmp_path / "other")
    assert parsed.training.max_steps == 6  # the file's


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["attn", "mlp"], ["attn", "mlp"]),
        (['["attn", "mlp"]'], ["attn", "mlp"]),
        (["all-linear"], "all-linear"),
        ([r".*\.mlp\..*"], r".*\.mlp\..*"),
    ],
)
def test_targets_on_the_command_line(given: list[str], expected: Any, tmp_path: Path) -> None:
    path = recipe_on_cpu(tmp_path, optim="galore_adamw", optim_target_modules=["lm_head"])
    parsed = parse("--config", path, "--optim_target_modules", *given)
    assert parsed.training.optim_target_modules == expected


@pytest.mark.parametrize("name", ["llama2_7b_oasst2.yaml", "recipes/llama2_7b_oasst2.yaml"])
def test_recipes_of_the_package_are_found_from_any_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    found = find_recipe(name)
    assert found == recipes_folder() / "llama2_7b_oasst2.yaml"
    parsed = parse("--config", name, "--bf16", "false")
    assert parsed.training.chat_template_path == str(recipes_folder() / "chatml")


# ---- which command


@pytest.mark.parametrize(
    ("settings", "options", "command"),
    [
        ({"config_name": "llama_60m"}, [], "pretrain"),
        ({"task_name": "rte"}, [], "glue"),
        ({"beta": 0.1}, [], "dpo"),
        ({"model_name_or_path": "m"}, ["--precompute-ref-log-probs"], "dpo"),
        ({"config_name": "llama_60m", "packing": True}, [], "pretrain"),
        ({"model_name_or_path": "m"}, [], "sft"),
        ({}, ["--train-file=a.csv"], "glue"),
        ({"learning_rate": 1e-3}, ["--model_name_or_path", "m"], "sft"),
    ],
)
def test_a_recipes_keys_say_its_command(
    settings: dict[str, Any], options: list[str], command: str, tmp_path: Path
) -> None:
    path = recipe_on_cpu(tmp_path, **settings)
    assert kinds.command_for(["--config", path, *options]) == command
    if not options:
        assert kinds.command_of(Path(path)) == command


def test_the_quickstarts_recipe_is_its_own() -> None:
    assert kinds.command_of(recipes_folder() / kinds.QUICKSTART) == "quickstart"
    assert kinds.command_for(["--config", kinds.QUICKSTART, "--model_name_or_path", "m"]) == "sft"


@pytest.mark.parametrize(
    ("cuda", "sees", "words"),
    [
        (None, False, "is a build for CPUs, which sees none. Install the build"),
        ("12.8", False, "bf16 needs a card, and torch sees none: nvidia-smi says whether the driver does."),
        ("12.8", True, "bf16: a card has no arithmetic in bfloat16. Set bf16: false, and dtype: float32."),
    ],
)
def test_bf16_without_a_card_that_has_it(
    cuda: str | None, sees: bool, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any) -> None:
        raise ValueError("Your setup doesn't support bf16/gpu. You need to assign use_cpu if you want to train on CPU.")

    monkeypatch.setattr(SFTConfig, "__post_init__", refuse)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: sees)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    with pytest.raises(UserError, match=re.escape(words)):
        sft.parse(["--output_dir", str(tmp_path)], "hf-galore sft", "")


def test_the_template_that_an_error_names_is_found_without_a_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    parsed = parse("--chat_template_path", "recipes/chatml", "--output_dir", "out", "--use_cpu", "--bf16", "false")
    assert parsed.training.chat_template_path == str(recipes_folder() / "chatml")
