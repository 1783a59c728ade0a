"""What a plan replaces in other libraries is where it is looked for, does what it is there for, and is put back."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers.masking_utils
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import hf_galore
from hf_galore.integrations import older
from hf_galore.integrations.stand_ins import moved_stand_ins, without_numbers
from tests.support.planning import sft
from tests.support.releases import needs_fast_all, needs_fused_head


def test_what_is_replaced_is_as_we_need_it() -> None:
    """Fails first, and by name, when a new version of one of them moves something."""
    assert moved_stand_ins() == []


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        pytest.param(
            "transformers.masking_utils",
            "fast_all",
            "transformers.masking_utils.fast_all(tensor) is gone",
            marks=needs_fast_all,
        ),
        ("transformers.PreTrainedModel", "_from_config", "PreTrainedModel._from_config is gone"),
        pytest.param(
            "trl.kernels.chunked_logprob",
            "_forward_kernel",
            "trl.kernels.chunked_logprob._forward_kernel is gone",
            marks=needs_fused_head,
        ),
    ],
)
def test_what_is_gone_is_named(owner: str, name: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(f"{owner}.{name}")
    assert moved_stand_ins() == [words]


def test_a_signature_that_changed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.masking_utils, "is_tracing", lambda tensor, other: False)
    (words,) = moved_stand_ins()
    assert words == "transformers.masking_utils.is_tracing(tensor=None) is now is_tracing(tensor, other)"


@needs_fast_all
@needs_fused_head
@pytest.mark.parametrize("gpu_loss", [False, True])
def test_replacements_act_within_only(gpu_loss: bool) -> None:
    masks, kernels = transformers.masking_utils, importlib.import_module("trl.kernels.chunked_logprob")
    before = [masks.fast_all, kernels._use_triton, kernels._addmm_fp32, PreTrainedModel.save_pretrained]

    def within() -> None:
        with without_numbers(packed_indices=lambda positions: None, all_true=lambda mask: True, gpu_loss=gpu_loss):
            assert masks.fast_all(torch.zeros(2))
            assert not masks.is_tracing(torch.zeros(2))
            assert (kernels._use_triton is not before[1]) == gpu_loss
            assert kernels._use_triton(torch.device("cpu")) == gpu_loss
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        within()
    assert [masks.fast_all, kernels._use_triton, kernels._addmm_fp32, PreTrainedModel.save_pretrained] == before


def test_models_are_made_of_their_config_and_nothing_is_written(tmp_path: Any) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2
    )
    with without_numbers(packed_indices=lambda positions: None, all_true=lambda mask: True, gpu_loss=False):
        model = LlamaForCausalLM.from_pretrained("nowhere", config=config, dtype="bfloat16")
        model.save_pretrained(str(tmp_path / "saved"))
        with pytest.raises(ValueError, match="quantized weights"):
            LlamaForCausalLM.from_pretrained("nowhere", config=config, quantization_config={"load_in_4bit": True})
    assert type(model) is LlamaForCausalLM
    assert {param.dtype for param in model.parameters()} == {torch.bfloat16}
    assert not model.training
    assert not (tmp_path / "saved").exists()


def test_a_plan_says_where_the_installed_trl_makes_it_inexact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert older.note_for_plans() is None
    assert hf_galore.plan(sft(tmp_path, "adamw_torch")).notes == ()
    # Where plans ask; the stand-ins go on for the release that is here.
    monkeypatch.setattr("hf_galore.plan.planner.note_for_plans", lambda: "not exact")
    assert hf_galore.plan(sft(tmp_path, "adamw_torch")).notes == ("not exact",)
    assert hf_galore.plan(sft(tmp_path, "adamw_torch"), target="cpu").notes == ()
    monkeypatch.setattr(older, "_trl_is_at_least", lambda version: version < "1.16")
    assert "TRL 1.16" in (older.note_for_plans() or "")
