"""`python -m hf_galore SCRIPT`: scripts that never mention hf_galore run as python runs them, with its optimizers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import textwrap
import venv
import zipfile
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from hf_galore.cli import run_script
from hf_galore.cli.run_script import BOOTSTRAP, environment, interpreter_options, main, python_arguments
from hf_galore.errors import UserError
from hf_galore.expandable_segments import SETTING, VARIABLE, supported
from hf_galore.recipes.embedded_model import CACHE_VARIABLE, embedded

SITECUSTOMIZE = "sitecustomize.py"


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory, on the path of modules as `python -m` puts it there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def run(
    command: Sequence[str | Path], env: dict[str, str] | None = None, cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, cwd=cwd, timeout=300)


# ---- whole runs

TRAINING = """
import os
os.environ["HF_ENDPOINT"] = "http://mirror.invalid"  # read when huggingface_hub is imported

import json, sys
import huggingface_hub.constants
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

if __name__ == "__main__":
    output, optim, status = sys.argv[1:]
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    args = TrainingArguments(
        output_dir=output, optim=optim, optim_target_modules=["attn", "mlp"], optim_args="rank=4", max_steps=2,
        use_cpu=True, dataloader_pin_memory=False, save_strategy="no", report_to="none", disable_tqdm=True,
    )
    model = LlamaForCausalLM(LlamaConfig(vocab_size=32, **shape))
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    cls = type(trainer.optimizer.optimizer)
    found = {
        "optimizer": f"{cls.__module__}.{cls.__qualname__}",
        "steps": trainer.state.global_step,
        "world_size": args.world_size,
        "endpoint": huggingface_hub.constants.ENDPOINT,
    }
    with open(f"{output}/rank{args.process_index}.json", "w") as file:
        json.dump(found, file)
    sys.exit(int(status))
"""


def test_a_plain_training_script(folder: Path) -> None:
    """Without hf_galore it ends with `Torch not compiled with CUDA enabled` here."""
    (folder / "train.py").write_text(TRAINING)
    ended = run([sys.executable, "-m", "hf_galore", "train.py", "out", "galore_adamw_8bit_layerwise", "7"])
    assert ended.returncode == 7, ended.stderr
    assert json.loads((folder / "out" / "rank0.json").read_text()) == {
        "optimizer": "hf_galore.optim.classes.GaLoreAdamW8bit",
        "steps": 2,
        "world_size": 1,
        "endpoint": "http://mirror.invalid",
    }


def test_a_module_in_two_processes_of_torchrun(folder: Path) -> None:
    (folder / "training").mkdir()
    (folder / "training" / "__main__.py").write_text(TRAINING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    ended = run([*torchrun, "-m", "hf_galore", "-m", "training", "out", "galore_adamw", "0"])
    assert ended.returncode == 0, ended.stderr
    for rank in range(2):
        found = json.loads((folder / "out" / f"rank{rank}.json").read_text())
        assert (found["optimizer"], found["world_size"]) == ("hf_galore.optim.classes.GaLoreAdamW", 2)


def test_trl_sft_which_trains_in_a_child_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, str(folder / "cache"))
    model, data = embedded()
    recipe = {
        "model_name_or_path": str(model),
        "dataset_name": str(data),
        "max_length": 64,
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": "rank=16",
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "disable_tqdm": True,
        "output_dir": "out",
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    # What `python -m hf_galore trl sft` turns into, without the seconds that it takes to.
    command = [sys.executable, *python_arguments(["trl", "sft", "--config", "recipe.yaml"])]
    ended = run(command, environment(os.environ))
    assert ended.returncode == 0, ended.stderr
    state = json.loads((folder / "out" / "checkpoint-2" / "trainer_state.json").read_text())
    assert state["log_history"][0]["galore/targets"] == 14  # what our callback logs


# ---- as under python itself

PROBE = """
import json, sys
main = sys.modules["__main__"]
print(json.dumps({
    "argv": sys.argv,
    "path": sys.path,
    "main": {name: repr(value) for name, value in vars(main).items() if "object at" not in repr(value)},
    "is main": vars(main) is globals(),
}))
def fail():
    raise RuntimeError("the script's own")
fail()
"""
OF_THE_SCRIPT = ["--help", "-m", "--", "--lr=1e-4", ""]


@pytest.mark.parametrize(
    "script", [["probe.py"], ["./folder"], ["probe.zip"], ["-m", "package.probe"], ["-m", "folder"]]
)
def test_a_script_sees_and_does_what_it_does_under_python(script: list[str], folder: Path) -> None:
    """Arguments, paths, `__main__`, traceback and exit status, to the letter."""
    for path in ("probe.py", "folder/__main__.py", "package/__init__.py", "package/probe.py"):
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(PROBE if "__init__" not in path else "")
    with zipfile.ZipFile("probe.zip", "w") as archive:
        archive.writestr("__main__.py", PROBE)
    command = [*script, *OF_THE_SCRIPT]
    plain = run([sys.executable, *command])
    ours = run([sys.executable, *python_arguments(command)], environment(os.environ))
    assert json.loads(plain.stdout)["argv"][1:] == OF_THE_SCRIPT
    assert plain.stderr.endswith("RuntimeError: the script's own\n")
    assert (ours.stdout, ours.stderr, ours.returncode) == (plain.stdout, plain.stderr, plain.returncode)


@pytest.fixture
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with two commands."""
    site = folder / "site"
    info = site / "other-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[console_scripts]\nother-train = other:Cli.train\n")
    (site / "other.py").write_text(
        "import json, sys\n"
        "class Cli:\n"
        "    def train():\n"
        "        print(json.dumps([sys.argv, sys.path]))\n"
        "        return 'what it returned'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.syspath_prepend(site)
    return site


def test_a_command_sees_and_does_what_its_script_does(installed: Path, folder: Path) -> None:
    # A script is not necessarily a file of Python: this is what pip makes of an entry point.
    scripts = folder / "bin"
    scripts.mkdir()
    (scripts / "other-train").write_text("import sys\nfrom other import Cli\nsys.exit(Cli.train())\n")
    arguments = ["other-train", "sft", *OF_THE_SCRIPT]
    plain = run([sys.executable, str(scripts / "other-train"), *arguments[1:]])
    ours = run([sys.executable, *python_arguments(arguments)], environment(os.environ))
    # Where they are installed; this one could not be put there.
    moved = plain.stdout.replace(str(scripts), sysconfig.get_path("scripts"))
    assert plain.stderr == "what it returned\n"
    assert (ours.stdout, ours.stderr, ours.returncode) == (moved, plain.stderr, plain.returncode)


def test_a_file_comes_before_a_command_and_a_command_before_a_folder(installed: Path, folder: Path) -> None:
    (folder / "other-train").mkdir()
    (folder / "other-train" / "__main__.py").touch()
    command = [str(BOOTSTRAP / "console_command.py"), "other-train", "other:Cli.train", "x"]
    assert python_arguments(["other-train", "x"]) == command
    assert python_arguments(["./other-train", "x"]) == ["./other-train", "x"]
    shutil.rmtree(folder / "other-train")
    (folder / "other-train").write_text("a text")
    assert python_arguments(["other-train", "x"]) == command
    (folder / "other-train").write_text("#!/usr/bin/env python\n")
    assert python_arguments(["other-train", "x"]) == ["other-train", "x"]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        ("python -m hf_galore train.py x", ""),
        ("python -u -m hf_galore train.py x", "-u"),  # as torchrun starts it
        ("python -um hf_galore train.py x", "-u"),
        ("python -X dev -Wignore -mhf_galore train.py x", "-X dev -Wignore"),
        ("python -m debugpy --listen 5678 -m hf_galore train.py x", "-m debugpy --listen 5678"),
        ("python launcher.py train.py x", ""),  # which called it
    ],
)
def test_options_of_python_stay(command: str, options: str) -> None:
    assert interpreter_options(command.split(), ["train.py", "x"]) == options.split()


def test_pythonpath_gets_our_folder_once_and_keeps_the_rest() -> None:
    ours, mine = str(BOOTSTRAP), os.pathsep.join(["mine", "", "yours"])
    assert (BOOTSTRAP / SITECUSTOMIZE).is_file()
    settings = {VARIABLE: SETTING} if supported() else {}
    assert environment({"HOME": "h"}) == {"HOME": "h", "PYTHONPATH": ours, **settings}
    assert environment({VARIABLE: "backend:native"})[VARIABLE] == "backend:native"
    once = environment({"PYTHONPATH": mine})
    assert once == {"PYTHONPATH": os.pathsep.join([ours, mine]), **settings}
    assert environment(once) == once


def test_waiting_for_a_script_returns_its_exit_status() -> None:
    """What Windows does in place of exec."""
    command = [sys.executable, "-c", "import os; raise SystemExit(int(os.environ['STATUS']))"]
    assert run_script._wait_for(command, {**os.environ, "STATUS": "5"}) == 5


# ---- sitecustomize.py, in an interpreter that has neither hf_galore nor transformers


@pytest.fixture(scope="module")
def bare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment without packages; `hf_galore` and `transformers` beside it that say when they are imported."""
    root = tmp_path_factory.mktemp("bare")
    venv.create(root / "venv", symlinks=os.name != "nt")
    shutil.copytree(BOOTSTRAP, root / "ours" / "hf_galore" / "bootstrap")
    (root / "ours" / "hf_galore" / "__init__.py").write_text(
        "import os, sys\n"
        "from transformers.trainer import END\n"
        "print('registered after', END)\n"
        "if os.environ.pop('FAILS', None):\n"
        "    raise ImportError('moved')\n"
    )
    (root / "theirs" / "transformers").mkdir(parents=True)
    (root / "theirs" / "transformers" / "__init__.py").touch()
    (root / "theirs" / "transformers" / "trainer.py").write_text("END = 'the end'\n")
    (root / "theirs" / "hidden").mkdir()
    return root


def run_bare(bare: Path, code: str, *folders: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run `code` with our folder at the front of PYTHONPATH, and then `folders`."""
    python = bare / "venv" / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    paths = [bare / "ours" / "hf_galore" / "bootstrap", *folders, bare / "theirs"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths)), **variables}
    return run([python, "-c", textwrap.dedent(code)], env, cwd=bare)


def printed(bare: Path, code: str, *folders: Path, **variables: str) -> list[str]:
    ended = run_bare(bare, code, *folders, **variables)
    assert (ended.returncode, ended.stderr) == (0, "")
    return ended.stdout.splitlines()


def test_registered_once_after_the_trainer_and_not_before(bare: Path) -> None:
    lines = printed(
        bare,
        """
        import sys
        import transformers
        print("hf_galore" in sys.modules)
        from transformers.trainer import END
        print("hf_galore" in sys.modules)
        import hf_galore
        print([finder for finder in sys.meta_path if type(finder).__name__ == "_Registrar"])
        """,
    )
    assert lines == ["False", "registered after the end", "True", "[]"]


def test_a_script_that_imports_hf_galore_itself_registers_once(bare: Path) -> None:
    lines = printed(bare, "import hf_galore, transformers.trainer", bare / "ours")
    assert lines == ["registered after the end"]


@pytest.mark.parametrize("installed", [True, False])
def test_registering_leaves_the_path_of_modules_as_it_was(installed: bool, bare: Path) -> None:
    code = "import sys; before = sys.path[:]; import transformers.trainer; print(sys.path == before, sys.path[1:])"
    folders = [bare / "ours"] if installed else []
    plain = run_bare(
        bare, "import sys; print(sys.path[1:])", PYTHONPATH=os.pathsep.join(map(str, [*folders, bare / "theirs"]))
    )
    assert printed(bare, code, *folders) == ["registered after the end", f"True {plain.stdout.strip()}"]


def test_a_process_that_never_trains_loads_next_to_nothing(bare: Path) -> None:
    code = "import sys; print(*sys.modules)"
    without = run_bare(bare, code, PYTHONPATH="").stdout.split()
    added = set(printed(bare, code)[0].split()) - set(without)
    cheap = {"__future__", "warnings", "importlib", "importlib.machinery"}
    assert {name for name in added if not name.startswith("importlib._")} - cheap == {"sitecustomize"}


def test_children_of_children_are_registered(bare: Path) -> None:
    lines = printed(
        bare,
        """
        import subprocess, sys
        child = "import transformers.trainer"
        grandchild = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}], check=True)"
        subprocess.run([sys.executable, "-c", grandchild], check=True)
        """,
    )
    assert lines == ["registered after the end"]


def test_a_registration_that_fails_fails_the_import_however_often(bare: Path) -> None:
    """A library that tries again, or goes on without, must not train with another optimizer of that name."""
    lines = printed(
        bare,
        """
        import os
        for _ in range(2):
            os.environ["FAILS"] = "yes"
            try:
                import transformers.trainer
            except ImportError as error:
                print(error)
        import transformers.trainer
        """,
    )
    assert lines == [
        "registered after the end",
        "moved",
        "registered after the end",
        "moved",
        "registered after the end",
    ]


def test_source_and_specification_of_the_trainer_are_still_found(bare: Path) -> None:
    lines = printed(
        bare,
        """
        import importlib.util, inspect, sys
        assert importlib.util.find_spec("transformers.trainer") is not None  # as libraries ask, without importing
        assert "hf_galore" not in sys.modules
        import transformers.trainer
        print(inspect.getsource(transformers.trainer).strip())
        print(type(transformers.trainer.__spec__.loader).__name__)
        """,
    )
    assert lines == ["registered after the end", "END = 'the end'", "SourceFileLoader"]


def test_the_sitecustomize_that_ours_hides_is_run(bare: Path, tmp_path: Path) -> None:
    code = "import sys, sitecustomize; print(sitecustomize.WHO, sys.path[1:3])\nimport transformers.trainer"
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / SITECUSTOMIZE).write_text(f"WHO = {name!r}\nprint('ran', WHO, __name__)\n")
    one, two = tmp_path / "one", tmp_path / "two"
    assert printed(bare, code, one, two) == [
        "ran one sitecustomize",
        f"one {[str(one), str(two)]}",  # without our folder
        "registered after the end",
    ]


def test_one_that_fails_is_reported_as_python_does_and_does_not_keep_ours_from_registering(
    bare: Path, tmp_path: Path
) -> None:
    (tmp_path / SITECUSTOMIZE).write_text("raise ValueError('theirs')\n")
    ended = run_bare(bare, "import transformers.trainer", tmp_path)
    assert ended.stdout == "registered after the end\n"
    assert ended.stderr.splitlines() == [
        "Error in sitecustomize; set PYTHONVERBOSE for traceback:",
        "ValueError: theirs",
    ]
    assert ended.returncode == 0


# ---- mistakes

MISTAKES: dict[str, tuple[list[str], list[str]]] = {
    "no such file": (["tain.py", "--lr", "1"], ["there is no file tain.py", "Did you mean 'train.py'?"]),
    "no such file elsewhere": (["scripts/train.py"], [f"there is no file {Path('scripts/train.py')} (in "]),
    "no such command": (["trll", "sft"], ["'trll' is neither a file in", "Did you mean 'trl'?"]),
    "suffix left out": (["train"], ["'train' is neither a file in", "Did you mean 'train.py'?"]),
    "a shell script": (["train.sh"], ["train.sh is not a Python file", "in place of 'python'"]),
    "data": (["recipe.yaml"], ["recipe.yaml is not a Python file"]),
    "a folder": (["."], [". is a folder without a __main__.py", "-m"]),
    "python": (["python", "train.py"], ["leave out 'python'"]),
    "python by its path": ([sys.executable, "train.py"], [f"leave out {sys.executable!r}"]),
    "no such module": (["-m", "nowhere.train"], ["there is no module 'nowhere.train'"]),
    "a file as a module": (["-m", "tain.py"], ["there is no module 'tain.py'", "leave out -m"]),
    "-m alone": (["-m"], ["-m needs the name of a module"]),
    "an option": (["--lr", "1", "train.py"], ["there is no option --lr", "--help"]),
}


@pytest.mark.parametrize(("arguments", "words"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_line(
    arguments: list[str], words: list[str], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "train.py").touch()
    (folder / "train.sh").write_text("#!/bin/sh\npython train.py\n")
    (folder / "recipe.yaml").write_text("optim: galore_adamw\n")
    assert main(arguments) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("python -m hf_galore: ")
    assert shown.err.count("\n") == 1
    assert [word for word in words if word not in shown.err] == []


@pytest.mark.parametrize("flag", ["ignore_environment", "no_site"])
def test_an_interpreter_that_would_not_register_is_refused(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    flags: Any = {"ignore_environment": 0, "no_site": 0, flag: 1}
    monkeypatch.setattr(run_script, "sys", SimpleNamespace(flags=SimpleNamespace(**flags)))
    with pytest.raises(UserError, match=r"-E, -I or -S.*import hf_galore"):
        run_script._check_interpreter()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == main(["-h"]) == 0
    shown = capsys.readouterr()
    assert shown.out == 2 * f"{run_script.HELP}\n"
    assert main([]) == 2
    assert capsys.readouterr().err == f"{run_script.HELP}\n"
