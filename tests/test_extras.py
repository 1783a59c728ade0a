"""A light core, and extras: what an install without them can do, and what it says of the rest.

The installs are folders of links to what is installed here, without what the extras in question do not bring.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from hf_galore import extras
from hf_galore.cli.main import COMMANDS, EXTRAS
from hf_galore.extras import MissingExtraError, require

ROOT = Path(__file__).parents[1]
# What the installed `hf-galore` does.
COMMAND = ("-c", "import sys; from hf_galore.cli.main import main; sys.exit(main())")
TRAIN = """
import json, sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments
import hf_galore

def make():
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **shape))
    arguments = TrainingArguments(
        "out", optim="galore_adamw_8bit_layerwise", optim_target_modules=["attn", "mlp"], optim_args="rank=8",
        max_steps=2, learning_rate=1e-2, report_to="none", save_strategy="no", use_cpu=True,
    )
    return Trainer(model, arguments, train_dataset=[dict(input_ids=list(range(16)), labels=list(range(16)))] * 16)

trainer = make()
before = {name: weight.clone() for name, weight in trainer.model.named_parameters()}
trainer.train()
moved = all((weight != before[name]).any() for name, weight in trainer.model.named_parameters())
plan = hf_galore.plan(make, vram="4090")
errors = []
from hf_galore.recipes import embedded
for call in (lambda: hf_galore.plan("llama2_7b_oasst2.yaml"), embedded):
    try:
        call()
    except ImportError as error:
        errors.append(str(error))
print(json.dumps([moved, plan.fits, errors]))
"""


def closure(requirements: Iterable[str]) -> set[str]:
    """The names of all distributions that requirements come to, of those that are installed here."""
    todo, found = [Requirement(line) for line in requirements], set[str]()
    seen = set[tuple[str, frozenset[str]]]()
    while todo:
        requirement = todo.pop()
        name, wanted = canonicalize_name(requirement.name), frozenset(requirement.extras)
        if (name, wanted) in seen:
            continue
        seen.add((name, wanted))
        try:
            lines = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:  # not for this system
            continue
        found.add(name)
        for needed in map(Requirement, lines):
            marker = needed.marker
            if marker is None or any(marker.evaluate({"extra": extra}) for extra in ("", *wanted)):
                todo.append(needed)
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """This checkout's wheel, unpacked."""
    folder = tmp_path_factory.mktemp("wheel")
    code = "import sys; from hatchling import build; print(build.build_wheel(sys.argv[1]))"
    run = subprocess.run(
        [sys.executable, "-c", code, str(folder)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    with zipfile.ZipFile(folder / run.stdout.splitlines()[-1]) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def needs(wheel: Path, wanted: str = "") -> set[str]:
    """What an install with an extra, or with none, comes to: the wheel says, and what is installed here."""
    (information,) = wheel.glob("*.dist-info")
    lines = importlib.metadata.Distribution.at(information).requires or []
    applies = (
        line for line in lines if (marker := Requirement(line).marker) is None or marker.evaluate({"extra": wanted})
    )
    return closure(line.partition(";")[0] for line in applies)


def installed(wheel: Path, folder: Path, wanted: str = "") -> Path:
    """A folder to import from: the wheel and what it needs with an extra, as links."""
    into = (
        folder / f"with-{wanted}" / "site-packages"
    )  # dill, which hashes functions, knows installed modules by that name
    into.mkdir(parents=True)
    for path in wheel.iterdir():
        (into / path.name).symlink_to(path)
    for name in needs(wheel, wanted):
        distribution = importlib.metadata.distribution(name)
        for top in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
            if not (into / top).exists():
                (into / top).symlink_to(Path(str(distribution.locate_file(top))))
    return into


def run(site: Path, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run Python with nothing but its own library and a folder to import from."""
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_GALORE_CACHE": str(cwd / "cache")}
    return subprocess.run(
        [sys.executable, "-S", *arguments], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )


def test_the_core_adds_bitsandbytes_to_transformers_and_accelerate(wheel: Path) -> None:
    assert needs(wheel) - closure(["transformers", "accelerate", "torch"]) == {"bitsandbytes"}


def test_all_is_every_extra_but_those_for_developers(wheel: Path) -> None:
    (information,) = wheel.glob("*.dist-info")
    names = importlib.metadata.Distribution.at(information).metadata.get_all("Provides-Extra") or []
    assert {"all", "cli", "dev", "docs", "eval", "glue", "notebooks", "quickstart", "tracking"} == set(names)
    together = set().union(*(needs(wheel, name) for name in names if name not in ("all", "dev", "docs")))
    assert needs(wheel, "all") == together
    assert together < needs(wheel, "dev")


@pytest.mark.slow
def test_the_core_trains_and_plans_and_says_which_extra_is_missing(wheel: Path, tmp_path: Path) -> None:
    site = installed(wheel, tmp_path)
    found = run(site, "-c", TRAIN, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    moved, fits, errors = json.loads(found.stdout.splitlines()[-1])
    assert moved
    assert fits
    absent = "(datasets, matplotlib, peft and trl are not installed)"
    assert errors == [
        f"The plan of a recipe needs the extra 'cli' {absent}: pip install \"hf-galore[cli]\".",
        "The embedded model needs the extra 'quickstart' (chatterbot-corpus, datasets, matplotlib, peft, platformdirs "
        'and trl are not installed): pip install "hf-galore[quickstart]".',
    ]
    for command in ("plan", "glue"):
        said = run(site, *COMMAND, command, "--config", "llama2_7b_oasst2.yaml", cwd=tmp_path)
        assert said.returncode == 2
        assert said.stdout == ""
        (line,) = said.stderr.splitlines()
        assert line.startswith(f"hf-galore {command}: The command needs the extra {EXTRAS[command]!r} (datasets, ")
        assert line.endswith(f' are not installed): pip install "hf-galore[{EXTRAS[command]}]".')


@pytest.mark.slow
def test_commands_do_with_their_extra_alone(wheel: Path, tmp_path: Path) -> None:
    """And a recipe that needs another says so."""
    site = installed(wheel, tmp_path, "cli")
    said = run(site, *COMMAND, "sft", "--help", cwd=tmp_path)
    assert (said.returncode, said.stderr) == (0, "")
    said = run(site, *COMMAND, "plan", "--config", "glue/roberta_base_cola.yaml", cwd=tmp_path)
    assert said.returncode == 2
    assert said.stderr.splitlines()[-1] == (
        "hf-galore plan: The score of a classifier needs the extra 'glue' (scikit-learn and scipy are not installed): "
        'pip install "hf-galore[glue]".'
    )
    other = installed(wheel, tmp_path, "quickstart")
    said = run(other, *COMMAND, "quickstart", "--max_steps", "1", "--output_dir", "out", cwd=tmp_path)
    assert said.returncode == 0, said.stderr


def test_every_command_has_an_extra() -> None:
    assert EXTRAS.keys() == COMMANDS.keys()


def test_a_part_that_is_too_old_is_named_with_its_release(monkeypatch: pytest.MonkeyPatch) -> None:
    needed = tuple(map(Requirement, ("trl>=1.9.0", "peft>=0.18.0", "rich>=14")))
    releases = {"trl": "0.24.0", "rich": "15.0.0.dev1"}

    def version(name: str) -> str:
        if name not in releases:
            raise importlib.metadata.PackageNotFoundError(name)
        return releases[name]

    monkeypatch.setattr(extras, "_requirements", lambda extra: needed)
    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(MissingExtraError) as error:
        require("cli", "The command")
    assert str(error.value) == (
        "The command needs the extra 'cli' (peft is not installed; trl is 0.24.0 and not >=1.9.0): "
        'pip install "hf-galore[cli]".'
    )
    releases.update(trl="1.9.0", peft="1.0.0")
    require("cli", "The command")
