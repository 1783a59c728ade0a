"""Engines that shard or flatten a model are refused: by name, by class, and by what they make of an optimizer's
parameters. DeepSpeed is not installed here: what it does to an optimizer is done by hand, as its 0.19 does it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from torch import Tensor, distributed, nn
from transformers import Trainer
from transformers.training_args import OptimizerNames

from hf_galore import GaLoreAdamW
from hf_galore.integrations import checks, engines
from tests.support.devices import on
from tests.support.helpers import NAMES, Counting, arguments, assert_identical, make_trainer, snapshot, tiny_llama

REFUSED = r"does not work under {}.*[Ii]nstead run on one GPU, or under DDP"


@pytest.fixture
def net() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12))


def optimizer_of(net: nn.Module) -> GaLoreAdamW:
    """One with two targets, and biases that are full-rank."""
    options: dict[str, Any] = {"rank": 3, "proj_bits": 16}
    targets: dict[Tensor, dict[str, Any]] = {param: options for param in net.parameters() if param.ndim == 2}
    return GaLoreAdamW(net.parameters(), lr=1e-2, param_options=targets, module=net)


@contextlib.contextmanager
def two_processes() -> Iterator[None]:
    """Within, this process is the first of two for torch.distributed, and hears nothing of the other."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        yield
    finally:
        distributed.destroy_process_group()


def assert_step_is_refused(optimizer: GaLoreAdamW, engine: str) -> None:
    """And no weight moves."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=REFUSED.format(engine)):
        optimizer.step()
    assert_identical([param.detach() for param in params], before)


# ---- FSDP1


@pytest.mark.parametrize("use_orig_params", [True, False])
def test_an_optimizer_of_a_model_under_fsdp1_is_refused(use_orig_params: bool, net: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    with two_processes():
        sharded = FullyShardedDataParallel(net, use_orig_params=use_orig_params, device_id=torch.device("cpu"))
        with pytest.raises(ValueError, match=REFUSED.format("FSDP1")):
            GaLoreAdamW([{"params": list(sharded.parameters()), "rank": 3}], lr=1e-2)
        with pytest.raises(ValueError, match=REFUSED.format("FSDP1")):  # full-rank it would be AdamW
            GaLoreAdamW(sharded.parameters(), lr=1e-2)


def test_fsdp1_after_the_optimizer_is_refused_at_the_step(net: nn.Module) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    optimizer = optimizer_of(net)
    with two_processes():
        sharded = FullyShardedDataParallel(net, use_orig_params=True, device_id=torch.device("cpu"))
        sharded(torch.randn(5, 12)).square().sum().backward()
        assert_step_is_refused(optimizer, "FSDP1")


# ---- DTensors


def test_tensor_parallel_parameters_are_refused(net: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    with two_processes():
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=("tp",))
        parallelize_module(net, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
        with pytest.raises(ValueError, match=REFUSED.format("tensor parallelism")) as caught:
            optimizer_of(net)
    assert "0.weight" in str(caught.value)


@pytest.mark.skipif(engines.supports_fsdp2(), reason="FSDP2 is supported")
def test_other_dtensors_are_refused(net: nn.Module) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    early = optimizer_of(net)
    with two_processes():
        fully_shard(net, mesh=init_device_mesh("cpu", (2,)))
        with pytest.raises(ValueError, match=REFUSED.format("FSDP2")):
            optimizer_of(net)
        # As accelerate does with an optimizer that it is handed before.
        sharded = iter(net.parameters())
        for group in early.param_groups:
            group["params"] = [next(sharded) for _ in group["params"]]
        with pytest.raises(ValueError, match=REFUSED.format("FSDP2")):
            early.step()


# ---- DeepSpeed


def test_flat_pieces_of_zero_1_and_2_are_refused_at_the_step(net: nn.Module) -> None:
    """As of `DeepSpeedZeroOptimizer.__init__`: each group holds one flat piece of its parameters in float32."""
    optimizer = optimizer_of(net)
    for group in optimizer.param_groups:
        flat = torch.cat([param.detach().reshape(-1) for param in group["params"]])
        piece = flat[: len(flat) // 2].clone().float().requires_grad_()
        piece.grad = torch.ones_like(piece)
        group["params"] = [piece]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    with pytest.raises(ValueError, match=r"holds a tensor of shape \(\d+,\).*DeepSpeed.*Instead run on one GPU"):
        optimizer.step()
    assert_identical([param.detach() for param in params], before)


def test_zero_3_is_refused_before_and_after_the_optimizer_is_made(net: nn.Module) -> None:
    """As of `zero.Init` and `DeepSpeedZeroOptimizer_Stage3`: parameters that are numbered, and have no elements."""

    def convert(param: Tensor, number: int) -> None:
        param.ds_id = number  # type: ignore[attr-defined]
        param.data = torch.empty(0)

    early = optimizer_of(net)
    for number, param in enumerate(net.parameters()):
        convert(param, number)
    assert_step_is_refused(early, "DeepSpeed.*ZeRO-3 shards")
    with pytest.raises(ValueError, match=REFUSED.format("DeepSpeed")):
        GaLoreAdamW(net.parameters(), lr=1e-2)


@pytest.mark.parametrize(
    ("kind", "version", "engine"),
    [
        (DistributedType.DEEPSPEED, None, "DeepSpeed"),
        (DistributedType.FSDP, 1, "FSDP1"),
        (DistributedType.FSDP, 2, None),  # whose parameters are looked at
        (DistributedType.MULTI_GPU, None, None),
    ],
)
def test_an_accelerator_for_an_engine_is_seen_when_an_optimizer_is_made(
    kind: DistributedType, version: int | None, engine: str | None, net: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before `accelerator.prepare`, which with an offloaded optimizer replaces it by DeepSpeed's Adam."""
    state = {"distributed_type": kind, "fsdp_plugin": SimpleNamespace(fsdp_version=version)}
    monkeypatch.setattr(AcceleratorState, "_shared_state", state)
    if engine is None:
        assert optimizer_of(net).targets()
        return
    with pytest.raises(ValueError, match=rf"GaLoreAdamW {REFUSED.format(engine)}"):
        optimizer_of(net)


# ---- a Trainer's


def given_an_optimizer(tmp_path: Path, way: str) -> Trainer:
    """A Trainer that is handed an optimizer, which passes by every check of `optim`."""
    model = tiny_llama()
    options = {model.model.layers[0].mlp.up_proj.weight: {"rank": 8}}
    more: dict[str, Any]
    if way == "optimizers":
        more = {"optimizers": (GaLoreAdamW(model.parameters(), lr=1e-2, param_options=options), None)}
    else:
        more = {"optimizer_cls_and_kwargs": (GaLoreAdamW, {"lr": 1e-2, "param_options": options})}
    args = arguments(tmp_path, OptimizerNames.ADAMW_TORCH, optim_target_modules=None, optim_args=None)
    return Trainer(model=model, args=args, train_dataset=Counting(), **more)


ENGINES = {
    "fsdp": ({"is_fsdp_enabled": True}, "FSDP"),
    "deepspeed": ({"is_deepspeed_enabled": True}, "DEEPSPEED"),
    "tensor parallel": ({"args.parallelism_config": SimpleNamespace(tp_size=2)}, "tensor, context.*tp_size 2"),
    "tp_plan": ({"model._tp_size": 2}, "tensor, context.*tp_plan"),
}


@pytest.mark.parametrize("way", ["optimizers", "optimizer_cls_and_kwargs", *NAMES])
@pytest.mark.parametrize(("settings", "words"), ENGINES.values(), ids=list(ENGINES))
def test_a_trainer_refuses_them_by_name_and_by_class(
    settings: dict[str, Any], words: str, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way in NAMES:
        trainer, asked = make_trainer(tiny_llama(), tmp_path, way), f"optim='{way}'"
    else:
        trainer, asked = given_an_optimizer(tmp_path, way), "GaLoreAdamW"
    for name, value in settings.items():
        owner, _, attribute = name.rpartition(".")
        monkeypatch.setattr(getattr(trainer, owner) if owner else trainer, attribute, value, raising=False)
    before, loader = snapshot(trainer.model), trainer.get_train_dataloader()
    given = functools.partial(trainer._prepare_for_training, 2, loader, None)
    begin = trainer.create_optimizer if trainer.optimizer is None else given
    with pytest.raises(ValueError, match=rf"{asked} does not work under {words}"):
        begin()
    assert_identical(snapshot(trainer.model), before)


# ---- FSDP2, from when it is let through


@pytest.fixture
def let_through(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (engines, checks):
        monkeypatch.setattr(module, "supports_fsdp2", lambda: True)


@pytest.mark.parametrize("source", ["args", "environment", "plugin"])
@pytest.mark.parametrize(
    ("version", "device", "words"),
    [
        (1, "cuda:0", r"FSDP1, which flattens.*Set version 2: fsdp_version: 2"),
        (2, "cuda:0", None),
        (2, "cpu", r"FSDP on a CPU: accelerate has none there, and trains under DDP"),
        (1, "cpu", r"FSDP on a CPU"),
    ],
)
@pytest.mark.usefixtures("let_through")
def test_which_fsdp_is_asked_for(
    version: int, device: str, words: str | None, source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tiny_llama(), tmp_path, "galore_adamw")
    args = on(trainer.args, device)
    if source == "args":
        args.fsdp, args.fsdp_config = True, {"version": version}
        monkeypatch.setenv("FSDP_VERSION", str(3 - version))  # the arguments go before
    elif source == "environment":
        monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
        monkeypatch.setenv("FSDP_VERSION", str(version))
    else:
        monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
        plugin = SimpleNamespace(fsdp_version=version)
        monkeypatch.setattr(trainer.accelerator, "state", SimpleNamespace(fsdp_plugin=plugin))
    if words is None:
        checks.check_no_engine("optim='galore_adamw'", args, trainer)
        return
    with pytest.raises(ValueError, match=rf"optim='galore_adamw' does not work under {words}"):
        checks.check_no_engine("optim='galore_adamw'", args, trainer)


def test_accelerates_default_is_fsdp1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    assert checks._fsdp_version(arguments(tmp_path, "galore_adamw"), None) == 1
