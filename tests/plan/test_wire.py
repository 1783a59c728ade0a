"""Bytes on the wire: calculated ones beside those that collectives of 2 and 4 processes really carry."""

from __future__ import annotations

import dataclasses
import json
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
import torch.distributed as dist
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from packaging.version import parse
from torch import nn
from torch.testing._internal.distributed.fake_pg import FakeStore

from hf_galore import make_optimizer
from hf_galore.integrations.fsdp_units import fsdp_units
from hf_galore.plan.parameters import Parameter, Projection, parameters_of
from hf_galore.plan.ranks import WEIGHTS, Phase, memory_a_rank
from hf_galore.plan.rehearsal import GRADIENTS, MOMENTS, PARAMETERS, UPDATE
from hf_galore.plan.tracking import BACKWARD
from hf_galore.plan.wire import Devices, Exchange, Kind, sent_bytes, wire_bytes
from tests.support.helpers import tiny_llama
from tests.support.planning import llama
from tests.support.warm import launch
from tests.support.wire import CountedBytes
from tests.support.wire_script import FSDP_WAYS, TOKENS, WAYS, Model, galore

Counted = dict[str, dict[str, dict[str, int]]]


# ---- beside what was counted


@pytest.fixture(scope="module", params=[2, 4])
def ranks_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each of 2 or 4 processes has left what it has counted."""
    folder = tmp_path_factory.mktemp(f"ranks-{request.param}")
    launch(request.param, "tests.support.wire_script", str(folder))
    return folder


@pytest.fixture(scope="module")
def ranks(ranks_folder: Path) -> list[Counted]:
    """What each process has counted of AdamW's steps."""
    return [json.loads((ranks_folder / f"{rank}.json").read_text()) for rank in range(int(ranks_folder.name[6]))]


@pytest.fixture
def galore_ranks(ranks: list[Counted], ranks_folder: Path) -> list[dict[str, list[dict[str, Any]]]]:
    """The same of steps of GaLore's optimizers."""
    return [json.loads((ranks_folder / f"galore-{rank}.json").read_text()) for rank in range(len(ranks))]


def of_adamw(model: nn.Module) -> list[Parameter]:
    optimizer = torch.optim.AdamW(model.parameters())
    for param in model.parameters():
        param.grad = torch.zeros_like(param)
    optimizer.step()
    return parameters_of(model, optimizer, units=fsdp_units(model))


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_adamw_sends_what_is_calculated(engine: str, micro_batches: int, ranks: list[Counted]) -> None:
    """Exactly: DDP's gradients and buffers; FSDP2's gathers and gradients, with the rows that fill its shards up."""
    model = Model()
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    devices = Devices(len(ranks), sharded=engine == "fsdp", micro_batches=micro_batches)
    expected = wire_bytes(of_adamw(model), devices, buffer_bytes=buffers)
    assert set(expected) == ({"all-reduce", "broadcast"} if engine == "ddp" else {"all-gather", "reduce-scatter"})
    for rank in ranks:
        assert rank[f"{engine} {micro_batches}"]["bytes"] == expected


def test_a_rank_holds_what_is_calculated(ranks: list[Counted]) -> None:
    """Weights and moments of the rank that has most: shards of 341 and of 30 rows are uneven on 4 ranks."""
    parameters = of_adamw(Model())
    most = sum(parameter.shard_numel(len(ranks)) * parameter.itemsize for parameter in parameters)
    held = [rank["fsdp 1"]["local"] for rank in ranks]
    assert max(rank["weights"] for rank in held) == most
    assert max(rank["moments"] for rank in held) == 2 * most
    assert sum(rank["weights"] for rank in held) == sum(4 * parameter.numel for parameter in parameters)
    whole = ranks[0]["ddp 1"]["local"]
    assert whole["weights"] == sum(4 * parameter.numel for parameter in parameters)
    assert whole["moments"] == sum(parameter.moment_bytes for parameter in parameters)


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_the_memory_of_a_rank_under_fsdp2_is_what_is_calculated(micro_batches: int, ranks: list[Counted]) -> None:
    """Up to a tenth less in the backward pass, where not all that is gathered meets all gradients."""
    parameters = of_adamw(Model())
    gradients = sum(4 * parameter.numel for parameter in parameters)
    devices = Devices(len(ranks), sharded=True, micro_batches=micro_batches)
    counted = ranks[0][f"fsdp {micro_batches}"]["memory"]
    backward, update = (
        memory_a_rank(parameters, [Phase(phase, {GRADIENTS: gradients})], devices) for phase in (BACKWARD, UPDATE)
    )
    # What is sent is freed when the other end has it: now and then a per cent or two is alive a little longer.
    assert 0.9 * backward.total < counted["backward"] < 1.02 * backward.total
    assert counted["update"] == pytest.approx(update.total, rel=0.04)
    assert counted["between"] == pytest.approx(backward.parts[WEIGHTS] + backward.parts[MOMENTS], rel=0.01)


def test_the_memory_of_a_rank_under_ddp_has_gradients_twice(ranks: list[Counted]) -> None:
    parameters = of_adamw(Model())
    whole = sum(4 * parameter.numel for parameter in parameters)
    plan = {PARAMETERS: whole, GRADIENTS: whole, MOMENTS: 2 * whole}
    calculated = memory_a_rank(parameters, [Phase(BACKWARD, plan)], Devices(len(ranks))).total
    counted = ranks[0]["ddp 1"]["memory"]
    assert calculated == 5 * whole
    assert counted["backward"] == pytest.approx(calculated, rel=0.02)  # there are activations, too
    assert counted["update"] == pytest.approx(calculated, rel=0.01)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("words", [f"ddp {way}" for way in WAYS] + [f"fsdp {way}" for way in FSDP_WAYS])
def test_galore_sends_what_is_calculated(
    words: str, micro_batches: int, ranks: list[Counted], galore_ranks: list[dict[str, list[dict[str, Any]]]]
) -> None:
    """In steps with new bases and without; but for single numbers, of which there are some for each collective."""
    engine, way = words.split(" ", 1)
    fsdp = engine == "fsdp"
    model = Model()
    options = FSDP_WAYS[way] if fsdp else WAYS[way]
    optimizer = galore(model, options)
    model(torch.arange(TOKENS)).backward()
    optimizer.step()
    parameters = parameters_of(model, optimizer, units=fsdp_units(model) if fsdp else None)
    exchange: Exchange = "low_rank" if way in ("layerwise", "plain, low_rank") else "dense"
    devices = Devices(
        len(galore_ranks),
        sharded=fsdp,
        exchange=exchange,
        hooked=optimizer.hooks is not None,
        micro_batches=micro_batches,
    )
    buffers = 0 if fsdp else sum(buffer.nbytes for buffer in model.buffers())
    of_steps = galore_ranks[0][f"{words} {micro_batches}"]
    assert {len(step["refreshing"]) for step in of_steps} == {0, 6}
    for number, step in enumerate(of_steps):
        if number < 2:
            continue  # weights and the order of gradients are sent too, and the first bases have no old ones
        expected = wire_bytes(parameters, devices, refreshing=step["refreshing"], buffer_bytes=buffers)
        total, found = sum(expected.values()), sum(step["bytes"].values())
        numbers = 48 * sum(step["calls"].values())
        assert total <= found <= total + numbers, (number, expected, step)
        if not step["refreshing"] and not fsdp:
            assert step["bytes"] == expected


# ---- the units


@pytest.fixture
def fake_group() -> Iterator[None]:
    """Two processes, of which this is one and the other does not exist."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@pytest.mark.skipif(parse(accelerate.__version__) < parse("1.15"), reason="accelerate divided models otherwise")
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_units_are_those_that_accelerate_makes(tied: bool, fake_group: None) -> None:
    model = tiny_llama(tie_word_embeddings=tied)
    expected = fsdp_units(model)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    accelerator = types.SimpleNamespace(
        state=types.SimpleNamespace(fsdp_plugin=plugin),
        mixed_precision="no",
        device=torch.device("cpu"),
        is_main_process=True,
        torch_device_mesh=None,
    )
    prepared: Any = fsdp2_prepare_model(accelerator, model)
    names = {param: name for name, param in prepared.named_parameters()}
    with CountedBytes():
        prepared(input_ids=torch.zeros(1, 4, dtype=torch.long))  # names the units, and says which stay
    found: dict[str, tuple[frozenset[str], int]] = {}
    for state in prepared._get_fsdp_state()._state_ctx.all_states:
        for group in state._fsdp_param_groups:
            inside = frozenset(names[fsdp_param.sharded_param] for fsdp_param in group.fsdp_params)
            found |= dict.fromkeys(inside, (inside, 1 if group.post_forward_mesh_info is None else 2))
    assert found == {
        name: (frozenset(other for other, (same, _) in expected.items() if same == unit), gathers)
        for name, (unit, gathers) in expected.items()
    }
    assert len({unit for unit, _ in expected.values()}) == (3 if tied else 4)  # of two layers


# ---- what a target takes, by hand

M, N, R, BASIS = 48, 32, 8, 100  # of 4 bytes; the bytes of a kept basis


def target(side: Any = "right", shape: tuple[int, int] = (M, N), *, without: bool = False) -> Parameter:
    left, right = (BASIS if side in ("left", "full") else 0), (BASIS if side in ("right", "full") else 0)
    projection = Projection(side, R, 10, "subspace", left, right, without_gradient=without)
    return Parameter("w", shape, 4, 4, projection=projection, unit="layer")


@pytest.mark.parametrize(("side", "low_rank"), [("right", M * R), ("left", R * N), ("full", R * R)])
def test_ddp_reduces_r_and_at_a_refresh_g_to_one(side: str, low_rank: int) -> None:
    devices = Devices(4, exchange="low_rank", hooked=True)
    bases = 2 * BASIS if side == "full" else BASIS
    plain = wire_bytes([target(side)], devices, refreshing=())
    assert plain == {"all-reduce": 4 * low_rank}
    refresh = wire_bytes([target(side)], devices, refreshing={"w"})
    assert refresh == {"reduce": 4 * M * N, "broadcast": bases + 4 * low_rank}
    mean = wire_bytes([target(side)], devices)
    assert mean == {
        "all-reduce": pytest.approx(0.9 * 4 * low_rank),
        "reduce": pytest.approx(0.1 * 4 * M * N),
        "broadcast": pytest.approx(0.1 * (bases + 4 * low_rank)),
    }


def test_whole_gradients_are_exchanged_where_that_is_asked_for_or_there_are_no_hooks() -> None:
    sent = BASIS + 4 * M * R
    hooked, plain = Devices(4, hooked=True), Devices(4)
    assert wire_bytes([target()], hooked, refreshing=()) == {"all-reduce": 4 * M * N}
    assert wire_bytes([target()], hooked, refreshing={"w"}) == {"reduce": 4 * M * N, "broadcast": sent}
    assert wire_bytes([target()], plain, refreshing=()) == {"all-reduce": 4 * M * N}
    assert wire_bytes([target()], plain, refreshing={"w"}) == {"all-reduce": 4 * M * N, "broadcast": sent}


@pytest.mark.parametrize("exchange", ["low_rank", "dense"])
def test_what_is_accumulated_with_hooks_is_r(exchange: Exchange) -> None:
    devices = Devices(4, exchange=exchange, hooked=True, micro_batches=3)
    assert wire_bytes([target()], devices, refreshing=()) == {"all-reduce": 4 * M * R}
    assert wire_bytes([target()], devices, refreshing={"w"}) == {
        "all-reduce": 4 * M * R,
        "reduce": 4 * M * N,
        "broadcast": BASIS + 4 * M * R,
    }


WEIGHT, GRADIENT = 2 * 4 * M * N, 4 * M * N
FSDP: dict[tuple[str, bool], dict[Kind, float]] = {
    ("right", False): {"all-gather": WEIGHT + BASIS, "reduce-scatter": GRADIENT},
    ("right", True): {"all-gather": WEIGHT + 2 * BASIS, "reduce-scatter": 4 * M * R},
    ("left", False): {"all-gather": WEIGHT + 4 * R * N, "reduce-scatter": GRADIENT + 4 * R * N},
    ("left", True): {"all-gather": WEIGHT + BASIS + 4 * R * N, "reduce-scatter": 4 * R * N},
    ("full", False): {"all-gather": WEIGHT + BASIS + 4 * R * R, "reduce-scatter": GRADIENT + 4 * R * R},
    ("full", True): {"all-gather": WEIGHT + 3 * BASIS + 4 * R * R, "reduce-scatter": 4 * R * R},
}


@pytest.mark.parametrize(("side", "without"), FSDP)
def test_fsdp2_moves_weights_and_r(side: str, without: bool) -> None:
    found = wire_bytes([target(side, without=without)], Devices(4, sharded=True), refreshing=())
    assert found == FSDP[side, without]


def test_codes_of_rows_are_gathered_with_all_others() -> None:
    in_codes = dataclasses.replace(
        target("left"), projection=Projection("left", R, 10, "subspace", BASIS, in_codes=True)
    )
    more, less = (wire_bytes([one], Devices(4, sharded=True), refreshing=()) for one in (in_codes, target("left")))
    assert more["all-gather"] - less["all-gather"] == BASIS


@pytest.mark.parametrize("without", [False, True])
@pytest.mark.parametrize("side", ["right", "left", "full"])
def test_a_refresh_under_fsdp2_moves_products_and_never_g(side: str, without: bool) -> None:
    one = target(side, without=without)
    devices = Devices(4, sharded=True)
    plain, refresh = (wire_bytes([one], devices, refreshing=names) for names in ((), {"w"}))
    more = {kind: refresh.get(kind, 0) - plain.get(kind, 0) for kind in {*plain, *refresh}}
    more = {kind: nbytes for kind, nbytes in more.items() if nbytes}
    # One power iteration is two products, of n × r and of m × r; with both bases there is one of n × r more. Random
    # columns, 16, show how far the gradient reaches.
    over_ranks = 4 * N * (R * (2 if side == "full" else 1) + (0 if side == "left" else 16))
    with_rows = 4 * M * (R + (0 if side == "right" else 16))
    bases = (4 if side == "full" else 2) * BASIS  # the old ones and the new ones
    if without:  # R is summed then, for there is a basis only after that; the old ones serve in any step
        rows = {"right": M, "left": N, "full": R}[side]
        assert more == {
            "all-reduce": over_ranks + with_rows + 4 * M * 16 + 4 * rows * R,
            "all-gather": bases / 2,
            "reduce-scatter": -4 * rows * R,
        }
    else:
        assert more == {"all-reduce": over_ranks, "all-gather": with_rows + bases}


def test_only_a_projected_backward_gathers_bases_for_each_micro_batch() -> None:
    for without, times in ((False, 1), (True, 4)):  # and for the step
        devices = Devices(4, sharded=True, hooked=True, micro_batches=3)
        found = wire_bytes([target(without=without)], devices, refreshing=())
        assert found["all-gather"] == 3 * WEIGHT + times * BASIS


def test_what_is_frozen_is_gathered_and_not_reduced() -> None:
    frozen = Parameter("w", (M, N), 4, 4, trained=False)
    assert wire_bytes([frozen], Devices(4)) == {}
    assert wire_bytes([frozen], Devices(4, sharded=True)) == {"all-gather": WEIGHT}


def test_shards_are_filled_up() -> None:
    uneven = Parameter("w", (5, 7), 4, 4)
    assert wire_bytes([uneven], Devices(3, sharded=True)) == {"all-gather": 2 * 6 * 7 * 4, "reduce-scatter": 6 * 7 * 4}


def test_weights_that_are_kept_in_more_bits_than_they_are_sent_in() -> None:
    mixed = Parameter("w", (M, N), 4, 2)
    assert wire_bytes([mixed], Devices(4, sharded=True)) == {"all-gather": WEIGHT / 2, "reduce-scatter": GRADIENT / 2}


def test_one_process_sends_nothing() -> None:
    assert wire_bytes([target()], Devices(1)) == {}
    assert sent_bytes({}, 1) == 0


@pytest.mark.parametrize(
    ("kind", "processes", "sent"),
    [
        ("all-reduce", 2, 100),
        ("all-reduce", 4, 150),
        ("all-gather", 2, 50),
        ("reduce-scatter", 4, 75),
        ("broadcast", 4, 75),
        ("reduce", 4, 75),
    ],
)
def test_what_a_rank_sends_by_a_ring(kind: Kind, processes: int, sent: float) -> None:
    assert sent_bytes({kind: 100}, processes) == sent


def test_ten_thousand_ranks_send_hardly_more_than_a_hundred() -> None:
    """A ring's shares go to 1 and 2; shards of less than a row are filled up to one, which is the price of many."""
    payload = wire_bytes([target()], Devices(10_000, exchange="low_rank", hooked=True))
    assert payload == wire_bytes([target()], Devices(100, exchange="low_rank", hooked=True))
    assert sent_bytes(payload, 10_000) == pytest.approx(sent_bytes(payload, 100), rel=0.011)
    assert wire_bytes([target()], Devices(10_000, sharded=True), refreshing=())["all-gather"] > 100 * WEIGHT


# ---- from a model


def test_parameters_of_a_model() -> None:
    model = llama()
    targets = ["q_proj", "down_proj", "embed_tokens"]
    optim = "galore_adamw_8bit_layerwise"
    optimizer = make_optimizer(model, targets, optim=optim, optim_args="rank=16, update_proj_gap=50, proj_bits=4")
    found = {parameter.name: parameter for parameter in parameters_of(model, optimizer)}
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert all(parameter.trained for parameter in found.values())
    wide = found["model.layers.0.mlp.down_proj.weight"]
    m, n = wide.shape
    assert m < n
    assert wide.projection is not None
    assert (wide.projection.side, wide.projection.rank, wide.projection.gap) == ("left", 16, 50)
    assert wide.projection.without_gradient
    assert not wide.builds_gradient
    assert wide.low_rank_numel == 16 * n
    assert wide.projection.left_bytes == wide.basis_bytes == m * 16 // 2 + m * 16 // 64 * 2  # codes and scales
    assert wide.moment_bytes == 2 * (16 * n + 4 * (16 * n // 256))
    embedding = found["model.embed_tokens.weight"]
    assert embedding.projection is not None
    assert not embedding.projection.without_gradient  # it is no linear layer
    norm = found["model.norm.weight"]
    assert norm.projection is None
    assert norm.builds_gradient
    assert norm.moment_bytes == 2 * 4 * norm.numel
    optimizer.close()


def test_weights_that_accelerate_makes_float32_have_moments_and_bases_of_that() -> None:
    model = llama().to(torch.bfloat16)
    parameters = of_adamw(model)
    assert [parameter.itemsize for parameter in parameters] == [2] * len(parameters)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()  # gradients are there
    for before, after in zip(parameters, parameters_of(model, optimizer, float32=True), strict=True):
        assert (after.itemsize, after.wire_itemsize) == (4, 2)
        assert (before.moment_bytes, after.moment_bytes) == (4 * before.numel, 8 * before.numel)
    galore = make_optimizer(model, ["q_proj"], optim_args="rank=16, proj_bits=16")
    for before, after in zip(parameters_of(model, galore), parameters_of(model, galore, float32=True), strict=True):
        assert after.basis_bytes == 2 * before.basis_bytes
        assert after.moment_bytes == before.moment_bytes  # which are float32 anyhow


# ---- the counting itself


def test_a_collective_that_is_not_known_is_an_error(fake_group: None) -> None:
    with CountedBytes() as counted, pytest.raises(AssertionError, match="c10d::alltoall_base_ is not counted"):
        dist.all_to_all_single(torch.zeros(4), torch.zeros(4))
    assert not counted.bytes


def test_each_kind_is_counted_by_its_whole_tensor(fake_group: None) -> None:
    part, whole = torch.zeros(3), torch.zeros(6)
    with CountedBytes() as counted:
        dist.all_reduce(whole)
        dist.broadcast(part, 0)
        dist.reduce(whole, 0)
        dist.all_gather_into_tensor(whole, part)
        dist.all_gather([part.clone(), part.clone()], part)
        dist.reduce_scatter_tensor(part, whole)
        dist.reduce_scatter(part, [part.clone(), part.clone()])
        dist.barrier()
    assert counted.bytes == {"all-reduce": 24, "broadcast": 12, "reduce": 24, "all-gather": 48, "reduce-scatter": 48}
    assert counted.calls == {"all-reduce": 1, "broadcast": 1, "reduce": 1, "all-gather": 2, "reduce-scatter": 2}
