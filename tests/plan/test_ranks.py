"""The memory of a rank: what an engine makes of the plan of one process."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Trainer

from hf_galore import GaLoreConfig
from hf_galore.integrations.target_modules import find_targets
from hf_galore.plan.fakes import fake_training
from hf_galore.plan.parameters import Parameter, Projection
from hf_galore.plan.planner import MemoryPlan, plan
from hf_galore.plan.processes import RankPlan, rank_plan
from hf_galore.plan.ranks import BUCKETS, GATHERED, WEIGHTS, WORKING, Phase, memory_a_rank
from hf_galore.plan.rehearsal import BASES, GRADIENTS, LOW_RANK, MOMENTS, PARAMETERS, REFERENCE_MODEL, Record
from hf_galore.plan.tracking import ACTIVATIONS, BACKWARD, FORWARD, TEMPORARIES, StorageTracker
from hf_galore.plan.wire import Devices, Exchange
from tests.support.helpers import GAP
from tests.support.planning import MIXTURE, llama, mixtral, sft

# ---- by hand

EMBEDDING = Parameter("embed", (100, 10), 4, 4, moment_bytes=8000, unit="embedding")
FIRST, SECOND = (Parameter(f"layer{i}", (50, 10), 4, 4, moment_bytes=4000, unit=f"layer{i}") for i in (1, 2))
HEAD = Parameter("head", (100, 10), 4, 4, moment_bytes=8000, unit="head", gathers=1)
MODEL = [EMBEDDING, FIRST, SECOND, HEAD]
PLAN = {PARAMETERS: 12_000, MOMENTS: 24_000, GRADIENTS: 12_000, ACTIVATIONS: 700, TEMPORARIES: 77}


def memory(model: list[Parameter], phase: str, devices: Devices, plan: dict[str, int]) -> dict[str, int]:
    return dict(memory_a_rank(model, [Phase(phase, plan)], devices, buffer_bytes=8).parts)


def test_ddp_has_all_and_buckets_of_all_gradients() -> None:
    found = memory(MODEL, BACKWARD, Devices(1000), PLAN)
    parts = {WEIGHTS: 12_000, GRADIENTS: 12_000, BUCKETS: 12_000, MOMENTS: 24_000, WORKING: 777}
    assert found == parts


def projected(parameter: Parameter, *, without: bool = True) -> Parameter:
    projection = Projection("right", 5, 10, "subspace", 0, 60, without_gradient=without)
    return Parameter(
        parameter.name, parameter.shape, 4, 4, moment_bytes=2000, projection=projection, unit=parameter.unit
    )


GALORE = [EMBEDDING, projected(FIRST), projected(SECOND), HEAD]
GALORE_PLAN = {PARAMETERS: 12_000, MOMENTS: 20_000, BASES: 120, GRADIENTS: 4000, ACTIVATIONS: 700}


def test_with_hooks_buckets_hold_full_rank_gradients_only() -> None:
    """The embedding's and the head's, which stay until all are reduced: one process had one of them at a time."""
    low_rank = memory(GALORE, BACKWARD, Devices(8, exchange="low_rank", hooked=True), GALORE_PLAN)
    assert (low_rank[GRADIENTS], low_rank[BUCKETS], low_rank[BASES]) == (8000, 8000, 120)
    without_hooks = memory(GALORE, BACKWARD, Devices(8), GALORE_PLAN)
    assert (without_hooks[GRADIENTS], without_hooks[BUCKETS]) == (4000, 12_000)
    forward = memory(GALORE, FORWARD, Devices(8, exchange="low_rank", hooked=True), GALORE_PLAN)
    assert (forward[GRADIENTS], forward[BUCKETS]) == (4000, 8000)


def test_fsdp2_has_a_part_and_the_units_that_are_gathered() -> None:
    found = memory(MODEL, BACKWARD, Devices(4, sharded=True), PLAN)
    # The layers' 50 rows make shards of 13. Buffers are whole.
    assert found[WEIGHTS] == 4 * 10 * (25 + 13 + 13 + 25) + 8
    assert (found[GRADIENTS], found[MOMENTS], found[WORKING]) == (3000, 6000, 777)
    # The backward pass ends with the embedding: its weight and its gradient, and the layer's that is being reduced; or
    # begins with the head, and the layer that is gathered meanwhile.
    assert found[GATHERED] == 4000 + 4000 + 2000
    forward = memory(MODEL, FORWARD, Devices(4, sharded=True), PLAN)
    assert forward[GATHERED] == 2 * 4000  # in one piece, and out of it
    assert GATHERED not in memory(MODEL, "update", Devices(4, sharded=True), PLAN)


def test_targets_without_a_gradient_gather_weights_and_a_basis() -> None:
    layers = [projected(FIRST), projected(SECOND)]
    found = memory(layers, BACKWARD, Devices(4, sharded=True), GALORE_PLAN)
    assert found[GATHERED] == 2 * 2000 + 60
    assert found[BASES] == 2 * 15
    with_gradients = [projected(FIRST, without=False), projected(SECOND, without=False)]
    found = memory(with_gradients, BACKWARD, Devices(4, sharded=True), GALORE_PLAN)
    assert (
        found[GATHERED] == 2000 + 2000 + 2000 + 60
    )  # the next unit, this one, and its gradient; or twice its gradient


def test_between_micro_batches_nothing_is_reduced() -> None:
    plan = {**PLAN, LOW_RANK: 400}
    one, three = (Devices(4, sharded=True, micro_batches=number) for number in (1, 3))
    assert memory(MODEL, BACKWARD, one, plan)[GRADIENTS] == 3000
    for phase, gradients, low_rank in ((FORWARD, 12_000, 100), (BACKWARD, 12_000, 100), ("update", 3000, 100)):
        found = memory(MODEL, phase, three, plan)
        assert (found[GRADIENTS], found[LOW_RANK]) == (gradients, low_rank)


def test_gradients_of_weights_in_float32_are_float32_when_they_are_reduced() -> None:
    mixed = [Parameter("w", (100, 10), 4, 2, moment_bytes=8000, unit="all")]
    found = memory(mixed, BACKWARD, Devices(4, sharded=True), {GRADIENTS: 2000})
    assert (found[WEIGHTS], found[GRADIENTS]) == (1000 + 8, 1000)
    held = memory(mixed, BACKWARD, Devices(4, sharded=True, micro_batches=2), {GRADIENTS: 2000})
    assert held[GRADIENTS] == 2000


def test_a_reference_is_sharded_as_the_model_is() -> None:
    found = memory(MODEL, FORWARD, Devices(4, sharded=True), {**PLAN, REFERENCE_MODEL: 12_000})
    assert found[WEIGHTS] == 4 * 10 * 76 + 8 + 3000


def test_the_phase_is_the_one_in_which_a_rank_has_most() -> None:
    """Not the one in which one process has most: what is sharded counts less."""
    update, forward = (
        Phase("update", {**PLAN, ACTIVATIONS: 0}),
        Phase(FORWARD, {PARAMETERS: 12_000, ACTIVATIONS: 9_000}),
    )
    for devices, name in ((Devices(8), "update"), (Devices(8, sharded=True), FORWARD)):
        assert memory_a_rank(MODEL, [update, forward], devices).phase == name


# ---- from plans


def planned(
    folder: Path, optim: str, processes: int, *, sharded: bool = False, exchange: Exchange | None = None, **more: Any
) -> tuple[MemoryPlan, RankPlan]:
    found: list[RankPlan] = []

    def look(trainer: Trainer, record: Record) -> None:
        found.append(rank_plan(trainer, record, processes, sharded=sharded, exchange=exchange))

    return plan(sft(folder, optim, **more), look=look), found[0]


def test_adamw_under_ddp_is_one_process_and_its_buckets(tmp_path: Path) -> None:
    one, rank = planned(tmp_path, "adamw_torch_fused", 1000)
    assert (rank.memory.phase, rank.devices.hooked, rank.devices.exchange) == (one.phase, False, "dense")
    model = llama()
    assert rank.memory.parts[BUCKETS] == sum(param.nbytes for param in model.parameters())
    assert rank.memory.total == one.peak_bytes + rank.memory.parts[BUCKETS]
    assert rank.payload["all-reduce"] == rank.memory.parts[BUCKETS]


def test_layerwise_under_ddp_exchanges_r_unless_told_otherwise(tmp_path: Path) -> None:
    """And has no buckets for the matrices that it projects."""
    one, rank = planned(tmp_path, "galore_adamw_layerwise", 4)
    assert (rank.devices.hooked, rank.devices.exchange) == (True, "low_rank")
    names = [name for name, _ in llama().named_parameters()]
    whole = sum(param.nbytes for param in llama().parameters())
    targets = [
        param for name, param in llama().named_parameters() if any(f"{t}_proj" in name for t in ("q", "up", "down"))
    ]
    assert len(targets) == 3 * sum("q_proj" in name for name in names)
    assert rank.memory.parts[BUCKETS] == whole - sum(param.nbytes for param in targets)
    assert rank.memory.parts[MOMENTS] == one.breakdown[MOMENTS]
    _, dense = planned(tmp_path, "galore_adamw_layerwise", 4, exchange="dense")
    assert dense.payload["all-reduce"] + dense.payload["reduce"] == pytest.approx(whole)
    assert dense.memory.parts[BUCKETS] == rank.memory.parts[BUCKETS]  # the optimizer reduces its targets itself
    assert sum(rank.payload.values()) < whole


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_8bit_layerwise"])
def test_fsdp2_halves_what_a_rank_keeps(optim: str, tmp_path: Path) -> None:
    (one, two), (_, four) = (planned(tmp_path, optim, processes, sharded=True) for processes in (2, 4))
    for part, whole in ((WEIGHTS, PARAMETERS), (MOMENTS, MOMENTS), (BASES, None)):
        if whole is not None:  # of bases so small the plan's granules are most
            assert two.memory.parts[part] == pytest.approx(one.breakdown[whole] / 2, rel=0.05)
        assert four.memory.parts[part] == pytest.approx(two.memory.parts[part] / 2, rel=0.05)
    assert two.memory.parts[WORKING] >= one.breakdown.get(ACTIVATIONS, 0)
    assert two.payload["reduce-scatter"] == four.payload["reduce-scatter"]


def test_a_stack_is_exchanged_as_its_low_rank_gradients(tmp_path: Path) -> None:
    _, rank = planned(tmp_path, "galore_adamw_layerwise", 4, model=mixtral, **MIXTURE)
    model = mixtral()
    projected = find_targets(model, "all-linear", GaLoreConfig(rank=4))
    # Rank 4, and 8 norm probes where that leaves 16.
    low_rank = sum(
        math.prod(shape) // min(shape[-2:]) * (4 + min(8, (min(shape[-2:]) - 4) // 2)) for shape in projected.matrices()
    )
    full_rank = sum(param.numel() for param in model.parameters()) - sum(
        weight.numel() for weight in projected.projected.values()
    )
    whole = sum(weight.numel() for weight in projected.projected.values())
    share = 1 / GAP
    assert {len(shape) for shape in projected.matrices()} == {2, 3}
    assert rank.payload["all-reduce"] == pytest.approx(4 * (full_rank + (1 - share) * low_rank))
    assert rank.payload["reduce"] == pytest.approx(4 * share * whole)


def test_stacks_that_fsdp2_would_not_project_are_not_planned_so(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train full-rank where FSDP2 shards them.* name the others only") as error:
        planned(tmp_path, "galore_adamw", 2, sharded=True, model=mixtral, **MIXTURE)
    assert "projected: model.layers.*.mlp.experts.gate_up_proj (2), model.layers.*.mlp.experts.down_proj (2)." in str(
        error.value
    )


# ---- the moment


def test_a_peak_by_shares_is_another_moment() -> None:
    with fake_training("cpu"):
        tracker = StorageTracker(torch.device("cpu"))
        with tracker:
            weights = torch.zeros(256, 1024)
            tracker.label([weights], PARAMETERS)
            first = torch.zeros(64, 1024)
            del first
            gradient = torch.zeros(128, 1024)
            tracker.label([gradient], GRADIENTS)
    mib = 2**20
    assert tracker.peaks_by({}) == tracker.peaks()
    assert [peak.nbytes for peak in tracker.peaks_by({})] == [1.5 * mib]
    (peak,) = tracker.peaks_by({PARAMETERS: 0.0, GRADIENTS: 0.25})
    assert peak.nbytes == 0.25 * mib
    assert tracker.breakdown(peak.event) == {PARAMETERS: mib, TEMPORARIES: 0.25 * mib}
