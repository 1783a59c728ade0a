"""What a plan puts aside in other libraries is where it is looked for, and is put back."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

import pytest
import torch

from hf_galore.integrations.older import masks_ask_themselves, told_of_padding
from hf_galore.plan import shape_cache
from hf_galore.plan.fakes import Target, fake_training
from hf_galore.plan.shape_cache import ShapeCache
from tests.support.releases import FUSED_HEAD, needs_fast_all

# Of transformers that have no `fast_all`, the functions that ask a mask themselves.
MASKS = list(told_of_padding(bool)) if masks_ask_themselves() else ["fast_all"]
REPLACED = [
    "transformers:PreTrainedModel.from_pretrained",
    "transformers:PreTrainedModel.save_pretrained",
    "transformers:TrainingArguments.n_gpu",
    "transformers.masking_utils:is_tracing",
    "transformers.masking_utils:find_packed_sequence_indices",
    *(f"transformers.masking_utils:{name}" for name in MASKS),
    "transformers.trainer_pt_utils:nested_numpify",
    "peft:PeftModel.save_pretrained",
    "torch:save",
    "torch.nn:Module._apply",
    "torch.nn.functional:scaled_dot_product_attention",
    "bitsandbytes.optim.optimizer:GlobalOptimManager._instance",
]
OF_THE_LOSS = [
    "trl.kernels.chunked_logprob:_use_triton",
    "trl.kernels.chunked_logprob:_forward_kernel",
    "trl.kernels.chunked_logprob:_backward_kernel",
    "trl.kernels.chunked_logprob:_addmm_fp32",
    "trl.trainer.utils:_use_triton",
]
if not FUSED_HEAD:
    OF_THE_LOSS.clear()


def found(path: str) -> Any:
    """What is there now; an `AttributeError` that names it where it has moved."""
    module, _, names = path.partition(":")
    owner: Any = importlib.import_module(module)
    *owners, name = names.split(".")
    for part in owners:
        owner = getattr(owner, part)
    return inspect.getattr_static(owner, name)


@pytest.mark.parametrize("target", ["cuda", "cpu"])
def test_what_is_replaced_is_there_and_comes_back(target: Target) -> None:
    paths = REPLACED + (OF_THE_LOSS if target == "cuda" else [])
    before = {path: found(path) for path in REPLACED + OF_THE_LOSS}
    before["bitsandbytes.optim.optimizer:GlobalOptimManager._instance"] = marker = object()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bitsandbytes.optim.optimizer.GlobalOptimManager._instance", marker)
        with fake_training(target):
            assert [path for path in paths if found(path) is before[path]] == []
            assert [path for path in OF_THE_LOSS if path not in paths and found(path) is not before[path]] == []
        assert [path for path in before if found(path) is not before[path]] == []


@needs_fast_all
def test_masks_are_made_by_the_functions_that_are_replaced() -> None:
    """By their names in that module, at each call: a copy elsewhere would go past the replacement."""
    masking = importlib.import_module("transformers.masking_utils")
    sources = inspect.getsource(masking._ignore_causal_mask_sdpa) + inspect.getsource(
        masking._preprocess_mask_arguments
    )
    assert [name for name in ("is_tracing(", "fast_all(", "find_packed_sequence_indices(") if name not in sources] == []


def test_what_a_generator_draws_is_asked_of_torch_once_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """And a fake whose number is known gives it, also where it has been counted up."""
    asked: list[Any] = []
    describe = ShapeCache._describe

    def noted(self: ShapeCache, result: Any, tensors: Any) -> Any:
        asked.append(result)
        return describe(self, result, tensors)

    monkeypatch.setattr(shape_cache, "_known", {})
    monkeypatch.setattr(ShapeCache, "_describe", noted)
    drawn: list[torch.Tensor] = []
    with fake_training("cpu"):
        times = []
        for columns, seed in ((5, 1), (5, 2), (7, 1)):
            generator = torch.Generator().manual_seed(seed)
            drawn.append(torch.randint(0, 9, (3, columns), dtype=torch.int32, generator=generator))
            times.append(len(asked))
        assert 0 < times[0] == times[1] < times[2]
        assert [(tuple(one.shape), one.dtype) for one in drawn] == [((3, n), torch.int32) for n in (5, 5, 7)]
        assert len({one.untyped_storage()._cdata for one in drawn}) == 3
        count = torch.tensor(4.0)
        assert (count.item(), (count + 1).item()) == (4.0, 5.0)
        assert torch.zeros(()).item() == 1.0  # a number that is not there
