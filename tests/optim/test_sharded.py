"""Parameters that FSDP2 shards: how they may be, and how their state lies; no processes are needed for that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.tensor import Replicate, Shard

from hf_galore.config import ProjBits
from hf_galore.integrations import bitsandbytes as kernels
from hf_galore.lowrank.projection import Bases, BasisShapes
from hf_galore.lowrank.ranks import Ranks
from hf_galore.optim.shard import check_sharding
from hf_galore.optim.sharded_state import ShardedBasisLayout, columns_of_scales, moments_of_rows, scales_of_rows
from hf_galore.rules.adam_8bit import QuantizedMoments, codebooks, dequantize_moments


class OneOf(Ranks):
    """One of several processes that are not there."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size


def dtensor(*placements: Any, names: tuple[str, ...] | None = None, shape: tuple[int, ...] = (8, 4)) -> Any:
    mesh = SimpleNamespace(mesh_dim_names=names, device_type="cpu")
    return SimpleNamespace(
        device_mesh=mesh, placements=placements, ndim=len(shape), shape=shape, device=torch.device("cpu")
    )


@pytest.mark.parametrize(
    "param",
    [
        dtensor(Shard(0)),
        dtensor(Shard(1)),
        dtensor(Replicate(), Shard(0), names=("replicate", "shard")),
        dtensor(Shard(0), shape=(8, 4, 3)),
    ],
)
def test_what_fsdp2_makes_is_allowed(param: Any) -> None:
    check_sharding("w", param)


@pytest.mark.parametrize(
    ("param", "message"),
    [
        (dtensor(Shard(0), names=("tp",)), "as tensor parallelism makes it"),
        (dtensor(Shard(0), Shard(1), names=("dp", "tp")), "as tensor parallelism makes it"),
        (dtensor(Shard(0), Shard(0)), "as tensor parallelism makes it"),
        (dtensor(Replicate()), "one dimension of a mesh"),
        (dtensor(Shard(1), shape=(8, 4, 3)), r"let it return one of Shard\(0\)"),
        (dtensor(Shard(2), shape=(8, 4, 3)), "Leave out shard_placement_fn"),
    ],
)
def test_what_else_there_is_is_refused_by_name(param: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        check_sharding("layers.0.weight", param)
    assert "layers.0.weight" in str(caught.value)


def test_cpu_offload_is_refused() -> None:
    param = dtensor(Shard(0))
    param.device_mesh.device_type = "cuda"
    with pytest.raises(ValueError, match="CPU offload policy: w is on cpu, and its processes work on cuda"):
        check_sharding("w", param)


@pytest.mark.parametrize("rows", [0, 1, 3, 4, 9, 10])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_rows_are_divided_as_dtensors_are(rows: int, size: int) -> None:
    chunks = torch.arange(rows).chunk(size) if rows else ()
    expected = [*(chunk.tolist() for chunk in chunks), *[[]] * (size - len(chunks))]
    assert [list(range(rows))[OneOf(rank, size).own(rows)] for rank in range(size)] == expected


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_bases_are_the_same_in_any_number_of_parts(bits: ProjBits) -> None:
    basis = torch.linalg.qr(torch.randn(37, 5, generator=torch.Generator().manual_seed(0)))[0]
    shapes, bases = BasisShapes((37, 5), None), Bases(basis, None)
    layouts = [ShardedBasisLayout(shapes, bits, OneOf(rank, 3), 0) for rank in range(3)]
    states = [layout.kept(bases, torch.float32) for layout in layouts]
    for layout, state in zip(layouts, states, strict=True):
        room = layout.empty(torch.zeros(0))
        assert {k: (v.shape, v.dtype) for k, v in room.items()} == {k: (v.shape, v.dtype) for k, v in state.items()}
    whole = ShardedBasisLayout(shapes, bits, OneOf(0, 1), 0)
    gathered = {key: torch.cat([state[key] for state in states]) for key in whole.keys}
    found, expected = (whole.read(state, torch.float32).left for state in (gathered, whole.kept(bases, torch.float32)))
    assert found is not None
    assert expected is not None
    assert torch.equal(found, expected)
    assert float((found - basis).norm() / basis.norm()) < {16: 1e-6, 8: 0.02, 4: 0.2}[bits]


@pytest.mark.parametrize("columns", [1, 8, 100, 256, 300, 512])
@pytest.mark.parametrize(("start", "stop"), [(0, 40), (0, 16), (16, 40), (40, 40)])
@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_sq"])
def test_rows_of_8_bit_moments_fit_other_blocks(columns: int, start: int, stop: int, key: str) -> None:
    values = torch.randn(40, columns, generator=torch.Generator().manual_seed(1))
    table = codebooks(values.device).signed
    if key == "exp_avg_sq":
        values, table = values.square(), codebooks(values.device).unsigned
    kept = kernels.quantize_8bit(values, table, 256)
    scales = scales_of_rows(kept.absmax, 40, columns)
    assert scales.shape == (40, columns_of_scales(columns))
    codes, absmax = moments_of_rows(kept.codes[start:stop], scales[start:stop], key)
    assert len(absmax) == -(-codes.numel() // 256)
    if start * columns % 256 == 0:
        assert torch.equal(codes, kept.codes[start:stop])
        assert torch.equal(absmax, kept.absmax[start * columns // 256 :][: len(absmax)])
    both = QuantizedMoments(codes, absmax, codes, absmax)
    found = dequantize_moments(both)[key == "exp_avg_sq"]
    before = kernels.dequantize_8bit(kept, table, 256, torch.float32)[start:stop]
    # Anew each element is rounded once more, by as much as the first time.
    assert float((found - before).norm()) <= 0.02 * float(before.norm())
