"""What a plan replaces in other libraries is where it is looked for, does what it is there for, and is put back."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
import transformers.masking_utils
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from hf_galore.integrations.stand_ins import moved_stand_ins, without_numbers
from hf_galore.plan.fakes import fake_training
from tests.support.releases import HEAD_BY_TOKENS, needs_fast_all, needs_fused_head


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


@pytest.mark.skipif(not HEAD_BY_TOKENS, reason="TRL 1.15 and later ask no batch how many labels count")
def test_an_older_loss_goes_over_all_tokens() -> None:
    """Told that no label counts, it would leave out the head's logits: most of the memory of a small model."""
    owner = importlib.import_module("trl.trainer.sft_trainer")
    before, tiles = owner._chunked_cross_entropy_loss, []
    chunk = owner._chunk

    def seen(hidden: Tensor, *rest: Any) -> Any:
        tiles.append(tuple(hidden.shape))
        return chunk(hidden, *rest)

    with pytest.MonkeyPatch.context() as patch, fake_training("cuda"):
        patch.setattr(owner, "_chunk", seen)
        hidden, head = torch.empty(2, 9, 4), torch.empty(10, 4)
        *_, counted = owner._chunked_cross_entropy_loss(hidden, head, 8, labels=torch.zeros(2, 9, dtype=torch.int64))
    assert tiles == [(8, 4), (8, 4)]
    assert counted.shape == ()
    assert owner._chunked_cross_entropy_loss is before
