"""What a run of a command leaves: its settings, time and memory in its log, a model card that says GaLore."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import ModelCard, constants
from torch import nn

import hf_galore
from hf_galore import GaLoreAdamW
from hf_galore.cli.main import main
from hf_galore.plan import plan
from hf_galore.plan.planner import GIB, in_gib
from hf_galore.recipes import sft, training
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.run_record import RUN_FILE, RunFacts, optimizer_bytes, peak_memory_bytes
from hf_galore.recipes.sft import RecordedSFTTrainer
from tests.support.commands import history, options, recorded_trainer, said_of_mistake, short_run, weights
from tests.support.helpers import optimizer_of
from tests.support.releases import needs_hub_function

ARGS = "rank=16, update_proj_gap=4, scale=1"


@pytest.fixture
def settings(small: Embedded, tmp_path: Path) -> dict[str, Any]:
    """Four steps, logged by two."""
    own = {"optim": "galore_adamw_8bit_layerwise", "optim_args": ARGS, "learning_rate": 1e-3, "logging_steps": 2}
    return {**short_run(small.model, small.data, tmp_path / "out"), **own}


def test_a_run_that_ends_without_numbers_says_so_and_logs_what_was(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each loss is logged as it is, and not as 0 where it is NaN."""
    given = {**settings, "optim": "adamw_torch", "learning_rate": 1e30, "logging_steps": 1, "max_grad_norm": 0}
    given = {key: value for key, value in given.items() if not key.startswith("optim_")}
    assert main(["sft", *options(given)]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("hf-galore sft: the training ended with weights that are not finite: ")
    assert "The loss is not finite since step " in said
    assert f"What {tmp_path / 'out'} holds is of no use. Give a lower learning_rate" in said
    losses = [entry["loss"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert math.isfinite(losses[0])
    assert not math.isfinite(losses[-1])


def test_a_run_leaves_its_settings_and_its_log(settings: dict[str, Any], tmp_path: Path, small: Embedded) -> None:
    out = tmp_path / "out"
    assert main(["sft", *options(settings)]) == 0
    facts = RunFacts.read(out)
    assert facts is not None
    assert (facts.command, facts.recipe, facts.finished) == ("hf-galore sft", None, True)
    assert (facts.model, facts.data) == (str(small.model), str(small.data))
    assert (facts.optim, facts.optim_args) == ("galore_adamw_8bit_layerwise", ARGS)
    assert (facts.optim_target_modules, facts.learning_rate) == (["attn", "mlp"], 1e-3)
    assert facts.parameters == facts.trainable_parameters > 2_000_000
    assert facts.versions["hf-galore"] == hf_galore.__version__
    state = torch.load(out / "checkpoint-4" / "optimizer.pt", weights_only=True)["state"]
    tensors = [value for one in state.values() for value in one.values() if isinstance(value, torch.Tensor)]
    assert facts.optimizer_bytes == sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    logged = [e for e in json.loads((out / "trainer_state.json").read_text())["log_history"] if "loss" in e]
    assert [entry["step"] for entry in logged] == [2, 4]
    for before, entry in zip([{"num_tokens": 0}, *logged], logged, strict=False):
        tokens = entry["num_tokens"] - before["num_tokens"]
        assert entry["tokens_per_second"] == pytest.approx(tokens / (2 * entry["step_seconds"]))
        # The kernel adds up pages in batches, a set for each thread: what it says later may be a few hundred KiB less.
        most = peak_memory_bytes(torch.device("cpu")) / GIB  # type: ignore[operator]
        assert 0 < entry["peak_memory_gib"] <= 1.001 * most

    # A resumed run goes on counting the tokens.
    resumed = tmp_path / "resumed"
    (out / "checkpoint-2").rename(tmp_path / "checkpoint-2")
    resumed.mkdir()
    (tmp_path / "checkpoint-2").rename(resumed / "checkpoint-2")
    assert main(["sft", *options({**settings, "output_dir": resumed}), "--resume_from_checkpoint"]) == 0
    found, expected = ([e["num_tokens"] for e in history(folder) if "loss" in e] for folder in (resumed, out))
    assert found == expected


def test_facts_of_an_interrupted_run_say_so(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = RecordedSFTTrainer.training_step

    def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step == 3:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(RecordedSFTTrainer, "training_step", interrupted)
    assert main(["sft", *options(settings)]) == 130
    facts = RunFacts.read(tmp_path / "out")
    assert facts is not None
    assert not facts.finished
    assert facts.optimizer_bytes is None


def test_a_recipes_trainer_registers_the_optimizers_and_pins_no_memory_without_a_device(tmp_path: Path) -> None:
    hf_galore.unregister()
    try:
        trainer = recorded_trainer(tmp_path, "galore_adamw", max_steps=1, dataloader_pin_memory=True)
        trainer.train()
    finally:
        hf_galore.register()
    assert isinstance(optimizer_of(trainer), GaLoreAdamW)
    assert trainer.args.dataloader_pin_memory is False


def test_a_mistake_leaves_no_record(settings: dict[str, Any], tmp_path: Path) -> None:
    assert main(["sft", *options({**settings, "optim_target_modules": ["atn", "mlp"]})]) == 2
    assert not list(tmp_path.rglob(RUN_FILE))


def test_evaluations_and_checkpoints_are_no_part_of_a_steps_time(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps take 0.05 s by a clock that stands still but in steps and evaluations, which take 100 s."""
    now = 0.0

    def passing(seconds: float, method: Any) -> Any:
        def call(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal now
            result = method(self, *args, **kwargs)
            now += seconds
            return result

        return call

    monkeypatch.setattr("hf_galore.recipes.run_record.time", SimpleNamespace(perf_counter=lambda: now))
    for name, seconds in (("training_step", 0.05), ("evaluate", 100.0), ("_save_checkpoint", 100.0)):
        monkeypatch.setattr(RecordedSFTTrainer, name, passing(seconds, getattr(RecordedSFTTrainer, name)))
    values = {**settings, "eval_strategy": "steps", "eval_steps": 1, "save_steps": 3, "eval_on_start": "true"}
    assert main(["sft", *options(values)]) == 0
    logged = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert now > 500
    assert [e["step_seconds"] for e in logged if "loss" in e] == pytest.approx([0.05, 0.05])


@pytest.mark.parametrize("text", ["{", '{"command": "hf-galore sft"}', '{"nonsense": 1}'])
def test_a_record_that_is_none_of_ours(text: str, tmp_path: Path) -> None:
    assert RunFacts.read(tmp_path) is None
    (tmp_path / RUN_FILE).write_text(text)
    with pytest.raises(ValueError, match=RUN_FILE):
        RunFacts.read(tmp_path)


def test_the_peak_of_a_process_is_that_of_what_it_held() -> None:
    before = peak_memory_bytes(torch.device("cpu"))
    if before is None:
        pytest.skip("this system does not say")
    held = torch.ones(before // 4 + 2**27)  # 4 bytes each: above whatever it was
    assert peak_memory_bytes(torch.device("cpu")) > before  # type: ignore[operator]
    del held
    assert peak_memory_bytes(torch.device("cpu")) > before  # type: ignore[operator]


def test_bytes_are_those_of_the_optimizers_tensors() -> None:
    model = nn.Linear(64, 32)
    model.bias.requires_grad_(False)
    plain = GaLoreAdamW([model.weight])
    step = 4  # a float32 scalar for each parameter, and two more for the refreshes of a target
    assert optimizer_bytes(plain) == 2 * 4 * 64 * 32 + step
    projected = GaLoreAdamW([{"params": [model.weight], "rank": 4}])
    basis, moments = 32 * 4 // 2 + 2 * 2, 2 * 4 * 4 * 64  # 4 bits an element, and a scale for 64 of them
    assert optimizer_bytes(projected) == basis + moments + 3 * step


# ---- model cards


class Hub:
    """Takes the place of the Hub's API, and keeps what is uploaded to it."""

    def __init__(self) -> None:
        self.cards: list[str] = []

    def create_repo(self, name: str, **kwargs: Any) -> Any:
        return SimpleNamespace(repo_id=f"someone/{name}")

    def upload_folder(self, *, folder_path: str, **kwargs: Any) -> Any:
        self.cards.append((Path(folder_path) / "README.md").read_text(encoding="utf-8"))
        return SimpleNamespace(is_done=lambda: True, done=lambda: True, result=lambda: None)


@needs_hub_function
def test_what_is_pushed_to_the_hub_says_galore_its_arguments_and_the_plan(
    settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "whoami", lambda token: {"name": "me"})
    values = {**settings, "push_to_hub": "true", "hub_model_id": "chat", "hub_token": "hf_mine", "save_strategy": "no"}
    assert main(["sft", *options(values)]) == 0
    card = ModelCard(hub.cards[-1])
    assert {"galore", "sft"} <= set(card.data.to_dict()["tags"])  # the second is TRL's own
    _, _, section = card.text.partition("### GaLore\n")
    section, _, _ = section.partition("### Framework versions")
    # The one link is the paper's: hf_galore has no page of its own yet that a card could lead to.
    assert f" of hf_galore {hf_galore.__version__}, which" in section
    assert re.findall(r"\]\((.*?)\)", section) == ["https://huggingface.co/papers/2403.03507"]
    assert "`galore_adamw_8bit_layerwise`" in section
    assert f"| `optim_args` | `{ARGS}` |" in section
    assert "| `optim_target_modules` | `['attn', 'mlp']` |" in section
    parsed = sft.parse(options({k: v for k, v in values.items() if k != "push_to_hub"}), "", "")
    planned = plan(parsed)
    assert f"a peak of {in_gib(planned.peak_bytes)} in the phase {planned.phase}" in section


@needs_hub_function
def test_a_finished_run_that_cannot_be_sent_is_not_lost(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(self: Hub, **kwargs: Any) -> Any:
        raise ConnectionError("the network is gone.")

    monkeypatch.setattr(Hub, "upload_folder", fail)
    monkeypatch.setattr("transformers.trainer.hf_api", Hub)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "whoami", lambda token: {"name": "me"})
    own = {"push_to_hub": "true", "hub_model_id": "chat", "hub_token": "hf_mine", "save_strategy": "no"}
    line = said_of_mistake("sft", options({**settings, **own, "max_steps": 1}), capsys)
    out = tmp_path / "out"
    assert f"the model is in {out}, but could not be sent to the Hugging Face Hub: the network is gone." in line
    assert set(weights(out)) == set(weights(Path(str(settings["model_name_or_path"]))))
    facts = RunFacts.read(out)
    assert facts is not None
    assert facts.finished


def test_a_checkpoints_card_has_the_section_once_and_another_optimizers_none(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    assert main(["sft", *options(settings)]) == 0  # two checkpoints, a card for each
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert card.count("### GaLore") == 1
    assert "hf-galore plan" not in card  # none was made
    plain = {**settings, "optim": "adamw_torch", "output_dir": tmp_path / "plain", "max_steps": 2}
    for key in ("optim_args", "optim_target_modules"):
        del plain[key]
    assert main(["sft", *options(plain)]) == 0
    assert "GaLore" not in (tmp_path / "plain" / "README.md").read_text(encoding="utf-8")


def test_a_run_that_cannot_be_planned_is_pushed_without_a_plan(
    settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    given = {**settings, "push_to_hub": "true", "load_in_4bit": "true", "use_peft": "true"}
    assert training.plan_first(sft.parse(options(given), "", "")) is None
    assert "The model card will say nothing of memory: load_in_4bit" in caplog.text
