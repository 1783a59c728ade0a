"""Int8 weights in several processes, and the engines that have no use for them."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import distributed

from hf_galore.optim import GaLoreAdamW
from tests.integrations.test_engines import two_processes
from tests.support.int8 import in_8_bits, net, weight_of
from tests.support.warm import launch, module, ran


def test_two_processes_are_one(tmp_path: Path) -> None:
    """Each way to train under DistributedDataParallel, from the first one's weights and with its seed."""
    alone = ran(module, "tests.support.ddp_int8_script", str(tmp_path / "1.pt"))
    assert alone.returncode == 0, alone.stderr
    launch(2, "tests.support.ddp_int8_script", str(tmp_path / "2.pt"))
    one, two = (torch.load(tmp_path / f"{number}.pt") for number in (1, 2))
    start, names = one.pop("start"), one.pop("int8")
    assert len(names) == 4
    for words, expected in one.items():
        exact = words != "8-bit"  # which is in float32, and sums in another order
        for name, value in expected.items():
            found = two[words][name]
            assert (value != start[name]).double().mean() > 0.05, (words, name)
            if name in names:
                assert (found != value).double().mean() <= (0 if exact else 2e-3), (words, name)
            else:
                assert (found - value).abs().max() < (1e-9 if exact else 1e-4), (words, name)


def test_sharding_is_refused_by_name() -> None:
    """FSDP2 before there is an optimizer, where it asks for views of a weight."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    with two_processes():
        mesh = init_device_mesh("cpu", (2,))
        expected = r"FSDP2 \(fully_shard\), DTensor and tensor parallelism.*under DistributedDataParallel"
        with pytest.raises(TypeError, match=expected):
            fully_shard(net(), mesh=mesh)
        with pytest.raises(TypeError, match=expected):
            distribute_tensor(net().up.weight, mesh, [Shard(0)])


def test_collectives_of_ones_own_are_refused() -> None:
    """They would send a copy, and what comes back be lost."""
    with two_processes():
        for collective in (distributed.all_reduce, lambda weight: distributed.broadcast(weight, 0)):
            with pytest.raises(TypeError, match="send its `codes` and `exponents`"):
                collective(net().up.weight.detach())


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_an_accelerator_that_shards_is_refused_by_the_optimizer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.state import AcceleratorState

    state = {"distributed_type": SimpleNamespace(value=kind), "fsdp_plugin": SimpleNamespace(fsdp_version=2)}
    monkeypatch.setattr(AcceleratorState, "_shared_state", state)
    model = net()
    with pytest.raises(ValueError, match=f"does not work under {'FSDP2' if kind == 'FSDP' else 'DeepSpeed'}"):
        GaLoreAdamW([{"params": [model.up.weight], "rank": 4}], lr=1e-2, module=model)


def test_a_trainer_under_fsdp2_is_refused_before_it_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Trainer makes its optimizer after the model has been sharded, which fails."""
    from hf_galore.integrations import checks
    from tests.support.helpers import make_trainer, tiny_llama

    trainer = make_trainer(in_8_bits(tiny_llama()), tmp_path, "galore_adamw")
    monkeypatch.setattr(trainer, "is_fsdp_enabled", True)
    with pytest.raises(ValueError, match=r"weights in 8 bits.*FSDP, which is asked for.*under DDP"):
        trainer.train()
    checks.check_int8_engine(make_trainer(tiny_llama(), tmp_path, "galore_adamw"))


def test_data_parallel_is_refused(tmp_path: Path) -> None:
    from hf_galore.integrations import checks
    from tests.support.helpers import make_trainer, tiny_llama

    trainer = make_trainer(in_8_bits(tiny_llama()), tmp_path, "galore_adamw")
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match=r"does not work under DataParallel.*Run on one GPU, or under DDP"):
        checks.check_int8_engine(trainer)


def test_what_lightning_does() -> None:
    """Move a module to a device that it is on, and its optimizer's state."""
    model = net()
    weight = weight_of(model.up)
    optimizer = GaLoreAdamW([{"params": [weight], "rank": 4}], lr=1e-2, module=model, layerwise=True)
    model.to("cpu")
    assert model.up.weight is weight
    for state in optimizer.state.values():
        for key, value in state.items():
            state[key] = value.to("cpu")
    before = weight.dequantized()
    model(torch.ones(3, 40, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert not torch.equal(weight.dequantized(), before)
