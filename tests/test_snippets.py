"""Every snippet of README and the docs runs: names are replaced by small local ones, and nothing else.

Python runs as it is. A line for a terminal goes through its command up to where that would load a model, or all the way
where that is quick. YAML goes through the parser that reads it. What cannot be run here stands in `NOT_OURS`, with the
reason.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import pytest
import transformers.training_args
import yaml
from accelerate.commands.launch import launch_command_parser
from torch.distributed.run import get_args_parser
from transformers import AutoTokenizer

from hf_galore.bench.jobs import Job
from hf_galore.cli.main import COMMANDS, main
from hf_galore.config import GaLoreConfig
from hf_galore.integrations.axolotl_checks import check_config
from hf_galore.recipes import any_recipe
from hf_galore.recipes.checks import galore_config
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.folders import recipes_folder
from hf_galore.recipes.planning import plan_recipe
from tests.support.commands import write_checkpoint
from tests.support.pages import README, ROOT
from tests.support.releases import needs_fused_head
from tests.support.snippets import (
    DATASETS,
    MODELS,
    PAGES,
    RECIPE,
    Command,
    Snippet,
    commands,
    snippets,
    snippets_of,
    with_names,
    write_data,
    write_model,
    write_recipe,
)
from tests.support.written_runs import write_run

# Whose blocks another test runs, or compares with programs that it runs.
OF_EXAMPLES = {"loops.md": "tests/loops/test_page.py", "devices.md": "tests/integrations/test_devices_page.py"}

# Lines that are not of this package, by their beginnings, and why they are not run.
NOT_OURS = {
    "python3 -m venv": "Python's own",
    "pip install": "the network; its extras are looked up",
    "make ": "makes an environment; its target is looked up",
    "python -m tests": "hours; tests/test_docs.py looks whether it exists",
    "python -m hf_galore": "tests/cli/test_run_script.py runs such lines",
    "torchrun": "tests/cli/test_processes.py and test_run_script.py run such lines; below, their words are read",
    "accelerate launch": "tests/cli/test_processes.py runs such a line; below, its words are read",
    "axolotl": "tests/beside/test_axolotl.py runs it where axolotl is installed",
    "lm-eval": "tests/recipes/test_lm_eval.py runs the task",
    "jupyter": "tests/test_notebooks.py runs the notebooks",
    ".venv/bin/": "the tools of those who work on it",
}


class Reached(BaseException):
    """A command has come to where it would begin its work."""


@pytest.fixture(scope="module")
def names(small: Embedded, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What stands in for each name of a model, dataset or recipe that the pages have."""
    folder = tmp_path_factory.mktemp("names")
    tokenizer = AutoTokenizer.from_pretrained(small.model)
    found = {name: str(write_model(name, tokenizer, folder / name.split("/")[1])) for name in MODELS}
    found |= dict.fromkeys(DATASETS, str(write_data(folder / "data")))
    local = str(write_recipe(recipes_folder() / RECIPE, folder / "local.yaml", found))
    return found | {"recipes/llama2_7b_oasst2.yaml": local}


@pytest.fixture
def desk(names: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, as a reader would have it after the lines before: recipes of one's own, and data."""
    # Without a card TrainingArguments refuse bfloat16, and torch computes it all the same.
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.chdir(tmp_path)
    for name in ("recipe.yaml", "mine.yaml"):
        shutil.copy(recipes_folder() / RECIPE, tmp_path / name)
    for name in ("my_data", "my_texts"):
        shutil.copytree(names[DATASETS[0]], tmp_path / name)
    return tmp_path


# ---- Python


@pytest.mark.parametrize(
    "snippet", [one for one in snippets("python") if one.page not in OF_EXAMPLES], ids=lambda one: one.name
)
def test_python_runs(
    snippet: Snippet,
    names: dict[str, str],
    desk: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # Without a card TrainingArguments refuse bfloat16, and torch computes it all the same.
    monkeypatch.setattr(transformers.training_args, "is_torch_bf16_gpu_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setenv("REPORT_TO", "none")
    code = with_names(snippet.text, names)
    assert not re.search(r'"[\w-]+/[\w.-]+-\d+\w*"', code), "a name of the Hub is not replaced"
    found: dict[str, Any] = {}
    exec(compile(code, snippet.name, "exec"), found)
    if "trainer.train()" in code:
        trainer = found["trainer"]
        assert trainer.state.global_step > 0
        optimizer = trainer.optimizer.optimizer
        assert optimizer.targets()
        for target in optimizer.targets():
            assert int(optimizer.state[target.param]["step"]) == trainer.state.global_step


@pytest.mark.slow
@needs_fused_head
def test_readmes_snippet_needs_what_readme_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its plan at full size: its arguments are a recipe's keys."""
    (snippet,) = (one for one in snippets("python") if one.page == "README.md")
    calls = {ast.unparse(node.func): node for node in ast.walk(ast.parse(snippet.text)) if isinstance(node, ast.Call)}
    given = {str(one.arg): one.value for one in calls["SFTConfig"].keywords}
    assert ast.unparse(given.pop("chat_template_path")) == "str(recipes_folder() / 'chatml')"
    settings = {key: ast.literal_eval(value) for key, value in given.items()}
    settings |= settings.pop("model_init_kwargs")
    settings |= {"model_name_or_path": ast.literal_eval(calls["SFTTrainer"].args[0]), "dataset_name": "its own"}
    path = tmp_path / "snippet.yaml"
    path.write_text(yaml.safe_dump({**settings, "chat_template_path": "recipes/chatml"}), "utf-8")
    monkeypatch.chdir(tmp_path)
    said = re.search(r"for which a card needs (\d+\.\d) GiB, as planned", README.read_text("utf-8"))
    assert said is not None
    assert plan_recipe(path).needed_bytes / 2**30 == pytest.approx(float(said[1]), abs=0.06)


def test_snippets_train_and_plan_in_readme_and_guide() -> None:
    """The snippets that matter are there: what is looked for above is found somewhere."""
    train = {one.page for one in snippets("python") if "trainer.train()" in one.text}
    assert {"README.md", "guide.md"} <= train
    assert any("hf_galore.plan(" in one.text for one in snippets("python"))


# ---- lines for a terminal


def ours() -> list[Command]:
    return [one for one in commands() if one.words[0] == "hf-galore"]


def not_ours() -> list[Command]:
    return [one for one in commands() if one.words[0] != "hf-galore"]


@pytest.mark.parametrize("command", ours(), ids=lambda one: one.line.split("  ")[0])
def test_a_command_takes_its_line(command: Command, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, name, *rest = [word for word in command.words if word != ">" and not word.startswith("~")]
    assert name in COMMANDS
    if "--help" in rest:
        with pytest.raises(SystemExit) as ended:
            main([name, *rest])
        assert ended.value.code == 0
        return
    CHECKS.get(name, trains)(name, expanded(rest), desk, monkeypatch)


def expanded(words: Sequence[str]) -> list[str]:
    """What a shell in a checkout makes of patterns."""
    found: list[str] = []
    for word in words:
        matches = sorted(str(path) for path in ROOT.glob(word)) if "*" in word else []
        found += matches or [word]
    return found


def reached(*_: Any, **__: Any) -> NoReturn:
    raise Reached


def trains(name: str, rest: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its recipe and its options are read; the training is not begun."""
    begins = "dry_run" if "--dry_run" in rest else "run"
    monkeypatch.setattr(f"hf_galore.recipes.training.{begins}", reached)
    with pytest.raises(Reached):
        main([name, *rest])


def quickstart(name: str, rest: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are those of its recipe."""
    any_recipe.parse(["--config", "quickstart.yaml", "--model_name_or_path", "x", "--dataset_name", "y", *rest], "", "")


def plan(name: str, rest: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_galore.cli.plan.plan_recipe", reached)
    monkeypatch.setattr("hf_galore.cli.plan.plan_processes", reached)
    monkeypatch.setattr("hf_galore.cli.suggest.suggest", reached)
    with pytest.raises(Reached):
        main([name, *rest])


def compare(name: str, rest: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of runs that were written by hand; of a sweep the runs are not begun."""
    if "--sweep" in rest:
        monkeypatch.setattr("hf_galore.cli.sweep.run_sweep", reached)
        with pytest.raises(Reached):
            main([name, *rest])
        return
    for word in rest[: rest.index("--names")] if "--names" in rest else rest:
        write_run(desk / word)
    assert main([name, *rest]) == 0
    assert (desk / "comparison" / "index.html").is_file()


def bench(name: str, rest: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own options are read, and its recipe as it would be in a process of its own."""

    def look_at(job: Job) -> NoReturn:
        any_recipe.parse(job.arguments, "", "")
        raise Reached

    monkeypatch.setattr("hf_galore.cli.bench.look_at", look_at)
    with pytest.raises(Reached):
        main([name, *rest])


def chat(name: str, rest: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing has been trained yet, which is what it says."""
    assert main([name, *rest]) == 2


def runs(name: str, rest: list[str], desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main([name, *rest]) in ((0, 1) if name == "doctor" else (0,))


CHECKS = {
    "quickstart": quickstart,
    "plan": plan,
    "compare": compare,
    "bench": bench,
    "chat": chat,
    "doctor": runs,
    "recipes": runs,
    "completion": runs,
}


def test_a_line_with_a_mistake_is_found(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_galore.recipes.training.run", reached)
    assert main(["sft", "--config", RECIPE, "--lerning_rate", "1e-5"]) == 2
    assert main(["sft", "--config", "mistral_9b_oasst2.yaml"]) == 2


@pytest.mark.parametrize("command", not_ours(), ids=lambda one: one.line.split("  ")[0])
def test_other_lines_are_known(command: Command) -> None:
    line = " ".join(command.words)
    assert any(line.startswith(beginning) for beginning in NOT_OURS), f"{command.page}: {line}"
    if line.startswith("make "):
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert command.words[1] in targets
    extras = re.search(r"pip install .*\[([\w,]+)\]", line)
    if extras is not None:
        declared = (ROOT / "pyproject.toml").read_text("utf-8").partition("[project.optional-dependencies]")[2]
        assert set(extras[1].split(",")) <= set(re.findall(r"^(\w+) = \[", declared, re.MULTILINE))
    for word in command.words:
        if word.startswith("recipes/"):
            assert (ROOT / word).exists()


LAUNCHERS: dict[str, Callable[[list[str]], list[str]]] = {
    "torchrun": lambda words: get_args_parser().parse_args(words[1:]).training_script_args,
    "accelerate": lambda words: launch_command_parser().parse_args(words[2:]).training_script_args,
}
"""Of a launcher's line, what the program is given that it starts, as its own parser sees it."""


def is_started(words: Sequence[str]) -> bool:
    """Whether a line has a launcher start one of our commands by its name."""
    return words[0] in LAUNCHERS and "hf_galore" in words and words[words.index("hf_galore") + 1] in COMMANDS


@pytest.mark.parametrize(
    "command", [one for one in not_ours() if is_started(one.words)], ids=lambda one: one.line.split("  ")[0]
)
def test_a_launchers_line_is_read_by_it_and_by_what_it_starts(
    command: Command, desk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, *rest = LAUNCHERS[command.words[0]](command.words)
    assert command.words[-len(rest) - 3 : -len(rest)] == ["-m", "hf_galore", name]
    CHECKS.get(name, trains)(name, rest, desk, monkeypatch)


@pytest.mark.parametrize("snippet", snippets("bash"), ids=lambda one: one.name)
def test_a_script_of_slurm_runs(snippet: Snippet, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for Slurm's programs and torchrun: what that is given, and that a second job goes on."""
    programs = {
        "scontrol": "printf 'one\\ntwo\\n'",
        "srun": 'while [[ $1 == -* ]]; do shift; done; exec "$@"',
        "torchrun": 'printf "%s\\n" "$@" > "$GIVEN"',
    }
    folder = desk / "bin"
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n", "utf-8")
        (folder / name).chmod(0o755)
    for name, value in (("JOB_NODELIST", "n[1-2]"), ("NNODES", "2"), ("GPUS_PER_NODE", "8"), ("JOB_ID", "7")):
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("GIVEN", str(desk / "given"))
    monkeypatch.setenv("USER", "me")
    script = desk / "job.sh"
    script.write_text(snippet.text.replace("/shared/", f"{desk}/shared/"), "utf-8")
    for goes_on in (False, True):
        subprocess.run(["bash", "-eu", str(script)], check=True, timeout=60)
        given = get_args_parser().parse_args((desk / "given").read_text("utf-8").splitlines())
        assert (given.nnodes, given.nproc_per_node, given.rdzv_endpoint, given.rdzv_id) == ("2", "8", "one:29500", "7")
        assert (given.module, given.training_script) == (True, "hf_galore")
        name, *rest = given.training_script_args
        assert ("--resume_from_checkpoint" in rest) == goes_on
        trains(name, rest, desk, monkeypatch)
        write_checkpoint(desk / "shared" / "me" / "run1" / "checkpoint-3")


def test_every_reason_is_needed() -> None:
    for beginning in NOT_OURS:
        assert any(" ".join(one.words).startswith(beginning) for one in not_ours()), beginning


# ---- YAML and JSON


@pytest.mark.parametrize("snippet", snippets("yaml"), ids=lambda one: one.name)
def test_yaml_is_what_its_reader_takes(snippet: Snippet, tmp_path: Path) -> None:
    settings = yaml.safe_load(snippet.text)
    if "plugins" in settings:  # axolotl's
        check_config(settings, dict.fromkeys(settings))
        assert GaLoreConfig.from_optim_args(settings["optim_args"]) != GaLoreConfig()
        return
    path = tmp_path / "recipe.yaml"
    needed = {"model_name_or_path": "some/model", "dataset_name": "some/data", "output_dir": str(tmp_path / "out")}
    path.write_text(yaml.safe_dump({**needed, **settings}), "utf-8")
    parsed = any_recipe.parse(["--config", str(path), "--bf16", "false"], "", "")
    assert galore_config(parsed.training) == GaLoreConfig.from_optim_args(settings["optim_args"])


@pytest.mark.parametrize("snippet", snippets("json"), ids=lambda one: one.name)
def test_json_is_a_line_of_data(snippet: Snippet) -> None:
    (line,) = snippet.text.splitlines()
    row = json.loads(line)
    assert set(row) in ({"messages"}, {"chosen", "rejected"})
    for messages in row.values():
        assert [message["role"] for message in messages] == ["user", "assistant"]


def test_no_kind_of_block_is_left_out() -> None:
    """A block of no kind is a table of figures, and has nothing that could be run."""
    every = [one for path in PAGES for one in snippets_of(path)]
    assert {one.kind for one in every} == {"python", "console", "bash", "yaml", "json", ""}
    for one in every:
        assert one.kind or not re.search(r"^(\$|import|hf-galore|python) ", one.text, re.MULTILINE), one.name
