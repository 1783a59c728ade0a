"""Plans of DPO: those of the real run, byte for byte, with a copy of the reference and without one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import trl.trainer.utils

import hf_galore.integrations.trl_head
from hf_galore.errors import UserError
from hf_galore.integrations import trl_dpo
from hf_galore.plan.planner import MemoryPlan, measure
from hf_galore.plan.rehearsal import REFERENCE, REFERENCE_MODEL
from hf_galore.plan.tracking import GRANULE
from hf_galore.recipes import any_recipe, stand_in
from hf_galore.recipes.planning import plan_recipe
from tests.support.commands import recipe_on_cpu
from tests.support.planning import LENGTH, OPTIM_ARGS, llama, tokenizer
from tests.support.releases import needs_fused_head

pytestmark = needs_fused_head


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of logits that are smaller than the vocabulary."""
    monkeypatch.setattr(trl.trainer.utils, "_CHUNKED_LOGPROB_CHUNK_SIZE", 96)
    monkeypatch.setattr(hf_galore.integrations.trl_head, "VOCABULARY_PART", 80)


@pytest.fixture
def recipe(tmp_path: Path) -> dict[str, Any]:
    folder = tmp_path / "model"
    llama().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return {
        "model_name_or_path": str(folder),
        "dataset_name": "nobody/asks-for-it",
        "dtype": "float32",
        "beta": 0.1,
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": ["attn", "mlp"],
        "optim_args": OPTIM_ARGS,
        "max_length": LENGTH,
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_grad_norm": 0.0,
        "eval_strategy": "steps",
        "activation_checkpointing": False,
    }


def plan_and_measure(folder: Path, recipe: dict[str, Any], **changes: Any) -> MemoryPlan:
    """The plan, which has been found to be what the run takes."""
    path = recipe_on_cpu(folder, **{**recipe, **changes})
    planned = plan_recipe(path, target="cpu")
    measured = measure(stand_in.prepare(any_recipe.parse(["--config", path], "plan", "")).make_trainer)
    assert planned.phase_peaks == measured.phase_peaks
    assert planned.resident_bytes == measured.resident_bytes
    assert planned.parameters == measured.parameters == sum(param.numel() for param in llama().parameters())
    return planned


@pytest.mark.parametrize(
    ("optim", "changes"),
    [
        ("adamw_torch", {}),
        ("galore_adamw_8bit_layerwise", {}),
        ("galore_adamw_8bit_layerwise", {"max_grad_norm": 1.0, "gradient_accumulation_steps": 2}),
        # Some gradients of bfloat16 are zero in the first steps, and make no basis and no norm probes: a plan has them.
        (
            "galore_adamw_layerwise",
            {"activation_checkpointing": True, "dtype": "bfloat16", "optim_args": f"{OPTIM_ARGS}, norm_probes=0"},
        ),
    ],
    ids=["adamw", "layerwise", "accumulated and clipped", "checkpointed, in bfloat16"],
)
def test_the_reference_is_a_copy_or_was_asked_beforehand(
    optim: str, changes: dict[str, Any], recipe: dict[str, Any], tmp_path: Path
) -> None:
    if not optim.startswith("galore"):
        del recipe["optim_args"], recipe["optim_target_modules"]
    with_copy = plan_and_measure(tmp_path / "copy", recipe, optim=optim, **changes)
    beforehand = plan_and_measure(tmp_path / "before", recipe, optim=optim, precompute_ref_log_probs=True, **changes)
    model = llama().to(torch.bfloat16 if changes.get("dtype") == "bfloat16" else torch.float32)
    weights = sum(param.nbytes for param in model.parameters())
    assert weights <= with_copy.breakdown[REFERENCE_MODEL] < 1.1 * weights
    # Between steps the numbers of the last batch are alive too, among them what the reference said of it.
    spared = with_copy.resident_bytes - beforehand.resident_bytes
    assert abs(spared - with_copy.breakdown[REFERENCE_MODEL]) <= 8 * GRANULE
    assert REFERENCE_MODEL not in beforehand.breakdown
    assert REFERENCE in beforehand.phase_peaks
    assert REFERENCE not in with_copy.phase_peaks
    assert with_copy.tokens_per_step == beforehand.tokens_per_step
    assert with_copy.tokens_per_step == 2 * 2 * LENGTH * changes.get("gradient_accumulation_steps", 1)


def test_many_pairs_beforehand_may_be_the_peak(recipe: dict[str, Any], tmp_path: Path) -> None:
    few = plan_and_measure(tmp_path / "few", recipe, precompute_ref_log_probs=True)
    many = plan_and_measure(
        tmp_path / "many",
        recipe,
        precompute_ref_log_probs=True,
        precompute_ref_batch_size=6,
    )
    assert many.phase_peaks[REFERENCE] > few.phase_peaks[REFERENCE]
    assert {phase: peak for phase, peak in many.phase_peaks.items() if phase != REFERENCE} == {
        phase: peak for phase, peak in few.phase_peaks.items() if phase != REFERENCE
    }


def test_what_a_plan_needs_of_trl_is_as_it_is_known() -> None:
    """Fails first, and by name, when a new version moves something."""
    assert trl_dpo.moved_parts() == []


def test_an_older_trl_trains_without_a_plan(
    recipe: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trl_dpo, "trl_is_at_least", lambda version: False)
    with pytest.raises(UserError, match=r"a plan of DPO is made with TRL 1\.16 or later, but TRL .* is installed"):
        plan_recipe(recipe_on_cpu(tmp_path, **recipe), target="cpu")
