"""Which devices a Trainer trains on where several are visible. There are none here: their number is pretended."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_galore.integrations.devices import keep_to_one_gpu, one_device_map
from tests.support.devices import on, with_gpus
from tests.support.helpers import arguments, make_trainer, tiny_llama, train


def test_several_gpus_become_one_and_it_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = on(with_gpus(arguments(tmp_path, "galore_adamw"), 2), "cuda:0")
    assert args.train_batch_size == 2 * 4  # as the Trainer counts with nn.DataParallel
    with caplog.at_level(logging.INFO, logger="hf_galore"):
        keep_to_one_gpu(args)
        keep_to_one_gpu(args)
    assert (args.n_gpu, args.train_batch_size) == (1, 4)
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("2 GPUs are visible; training on one, cuda:0.")
    assert "CUDA_VISIBLE_DEVICES" in said


@pytest.mark.parametrize("count", [0, 1])
def test_one_gpu_or_none_is_left_and_nothing_said(count: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    args = with_gpus(arguments(tmp_path, "galore_adamw"), count)
    with caplog.at_level(logging.INFO, logger="hf_galore"):
        keep_to_one_gpu(args)
    assert args.n_gpu == count
    assert caplog.records == []


def test_a_whole_model_is_mapped_to_the_device_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    args = arguments(tmp_path, "galore_adamw")
    assert one_device_map(args) is None  # a CPU
    assert one_device_map(on(args, "cuda:0")) == {"": "cuda:0"}
    assert one_device_map(on(args, "mps")) is None
    on(args, "cuda:1")
    monkeypatch.setattr(args.distributed_state, "distributed_type", "MULTI_GPU")
    assert one_device_map(args) is None  # a launcher's process: TRL loads without a map


class Parallel(nn.DataParallel[Any]):
    made = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        type(self).made += 1
        super().__init__(*args, **kwargs)


@pytest.mark.parametrize(
    ("optim", "optim_args", "words"),
    [
        ("galore_adamw_layerwise", "rank=16", "optim='galore_adamw_layerwise' does not work with several GPUs in one"),
        ("galore_adamw", "rank=16, projected_backward=true", "with projected_backward=true does not work with several"),
    ],
)
def test_hooks_under_data_parallel_are_refused(optim: str, optim_args: str, words: str, tmp_path: Path) -> None:
    trainer = make_trainer(tiny_llama(), tmp_path, optim, optim_args=optim_args)
    with_gpus(trainer.args, 2)
    with pytest.raises(ValueError, match="Set CUDA_VISIBLE_DEVICES=0") as caught:
        trainer.train()
    assert words in str(caught.value)


def test_a_trainer_wraps_nothing_that_was_kept_to_one_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nn, "DataParallel", Parallel)
    Parallel.made = 0
    trainer = make_trainer(tiny_llama(), tmp_path, "galore_adamw_layerwise", max_steps=1)
    with_gpus(trainer.args, 2)
    keep_to_one_gpu(trainer.args)
    trainer.train()
    assert Parallel.made == 0
    plain = make_trainer(tiny_llama(), tmp_path, "galore_adamw", max_steps=1)
    with_gpus(plain.args, 2)
    plain.train()
    assert Parallel.made == 1  # else this test is of nothing


# ---- compiled


@pytest.mark.parametrize("name", ["galore_adamw_layerwise", "galore_adamw"])
def test_a_trainer_that_compiles_hooked_layers_warns_once_and_learns_the_same(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch._dynamo.reset()
    losses = []
    expected = []
    for backend in (None, "aot_eager", None):
        trainer = train(tiny_llama(num_hidden_layers=1), tmp_path, name, max_steps=3, torch_compile_backend=backend)
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
        said = [record for record in caplog.records if "is compiled" in record.getMessage()]
        expected += [logging.WARNING] if backend is not None and name.endswith("layerwise") else []
        assert [record.levelno for record in said] == expected
    assert losses[1] == pytest.approx(losses[0], abs=1e-4)  # the compiler adds up in another order
    torch._dynamo.reset()
