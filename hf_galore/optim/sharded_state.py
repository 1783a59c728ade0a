"""How the state of a sharded parameter lies in memory, and in a checkpoint for any number of processes.

In memory each process has plain tensors: its rows of the moments, and its rows of the bases, which are gathered for
use. In a checkpoint these are DTensors, whose rows any number of processes may divide anew.

A basis is a table: k × r in 16 bits; in 8 and 4 bits one row a block of codes, so that what a block is does not depend
on the number of processes. Blocks of 8-bit moments do: they run through the rows of each process. A checkpoint has
their codes, and beside them, for each row of the moments, where it begins in its first block and the scales of the
blocks that it meets. A process whose blocks begin at the same places has the same moments to the bit; others
dequantise and quantise anew.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import ProjBits
from ..integrations import bitsandbytes as kernels
from ..lowrank.projection import Bases, BasisShapes
from ..lowrank.quantize import QuantizedBasis, dequantize_basis
from ..lowrank.ranks import Ranks
from ..rules.adam_8bit import codebooks
from .bases import BasisLayout, State

# Bytes of codes in one row of a table: those of one block (see `hf_galore.lowrank.quantize`).
_BYTES_A_BLOCK: dict[ProjBits, int] = {8: 256, 4: 32}


class _Table(NamedTuple):
    """Where one tensor of a basis lies: its shape whole, and the shape of its table."""

    whole: torch.Size
    rows: int
    columns: tuple[int, ...]


class ShardedBasisLayout(BasisLayout):
    """How a process's rows of the bases of one target lie in its state.

    Args:
        shapes: of the bases.
        bits: that an element is kept in.
        ranks: the processes.
        dim: the dimension of the weight that is divided.
    """

    def __init__(self, shapes: BasisShapes, bits: ProjBits, ranks: Ranks, dim: int) -> None:
        super().__init__(shapes, bits)
        self._ranks = ranks
        self._divided = "basis_left" if dim == 0 else "basis_right"
        self.tables: dict[str, _Table] = {}
        for key, value in super().empty(torch.empty(0, device="meta")).items():
            columns: tuple[int, ...] = tuple(value.shape[1:])
            rows = len(value)
            if bits != 16 and value.ndim == 2:
                columns = (_BYTES_A_BLOCK[bits],)
                rows = math.ceil(value.numel() / columns[0])
            self.tables[key] = _Table(value.shape, rows, columns)

    def empty(self, like: Tensor) -> State:
        """Room for this process's rows."""
        dtypes = {key: value.dtype for key, value in super().empty(like.new_empty(0, device="meta")).items()}
        return {
            key: like.new_zeros((self._ranks.count(rows), *columns), dtype=dtypes[key])
            for key, (_, rows, columns) in self.tables.items()
        }

    def read(self, state: State, dtype: torch.dtype) -> Bases:
        """The bases whole, gathered from all processes."""
        return Bases(*(None if shape is None else self._whole(key, state, dtype) for key, shape in self._sides.items()))

    def read_here(self, state: State, dtype: torch.dtype) -> Bases:
        """The bases as far as they meet this process's part of the weight: on the divided side its rows alone."""
        return Bases(
            *(None if shape is None else self._here(key, shape[0], state, dtype) for key, shape in self._sides.items())
        )

    def here(self, whole: Bases) -> Bases:
        """What `read_here` reads, of bases that are whole."""
        return Bases(
            *(
                basis[self._ranks.own(len(basis))] if key == self._divided and basis is not None else basis
                for key, basis in zip(self._sides, whole, strict=True)
            )
        )

    def _here(self, key: str, rows: int, state: State, dtype: torch.dtype) -> Tensor:
        if key != self._divided:
            return self._whole(key, state, dtype)
        return state[key].to(dtype) if self.bits == 16 else self._whole(key, state, dtype)[self._ranks.own(rows)]

    def _whole(self, key: str, state: State, dtype: torch.dtype) -> Tensor:
        shape = self._sides[key]
        assert shape is not None
        absmax = f"{key}_absmax"
        kept = QuantizedBasis(self._gathered(key, state), self._gathered(absmax, state) if absmax in state else None)
        return dequantize_basis(kept, shape, self.bits, dtype)

    def _gathered(self, key: str, state: State) -> Tensor:
        whole, rows, _ = self.tables[key]
        gathered = self._ranks.gather(state[key], rows)
        return gathered.reshape(-1)[: whole.numel()].view(whole)

    def kept(self, bases: Bases, dtype: torch.dtype) -> State:
        """This process's rows of new bases, which all have whole."""
        entries: State = {}
        for key, value in super().kept(bases, dtype).items():
            whole, rows, columns = self.tables[key]
            flat = value.reshape(-1)
            missing = rows * math.prod(columns) - whole.numel()
            table = torch.nn.functional.pad(flat, (0, missing)) if missing else flat
            entries[key] = table.view(rows, *columns)[self._ranks.own(rows)].clone()
        return entries


# ---- 8-bit moments in a checkpoint


def scales_of_rows(absmax: Tensor, rows: int, columns: int) -> Tensor:
    """For each row of 8-bit moments where it begins in its first block, and the scales of the blocks that it meets.

    Args:
        absmax: one scale for each 256 elements of the rows, flat.
        rows: of the moments, on this process.
        columns: of the moments.

    Returns:
        rows × (2 + ⌈columns / 256⌉), float32; scales of blocks that a row does not meet are 0.
    """
    first, offset = _first_blocks(rows, columns, absmax.device)
    places = first.unsqueeze(1) + torch.arange(_most_blocks(columns), device=absmax.device)
    met = (places - first.unsqueeze(1)) * kernels.MOMENT_BLOCK < (offset + columns).unsqueeze(1)
    scales = torch.where(met, absmax[places.clamp(max=max(len(absmax) - 1, 0))] if len(absmax) else 0.0, 0.0)
    return torch.cat([offset.unsqueeze(1).to(torch.float32), scales], dim=1)


def moments_of_rows(codes: Tensor, scales: Tensor, key: str) -> tuple[Tensor, Tensor]:
    """8-bit moments of this process from their rows in a checkpoint: codes, and a scale for each 256 of them.

    Args:
        codes: rows × columns.
        scales: as `scales_of_rows` gives them, of the process that had the row.
        key: `exp_avg` or `exp_avg_sq`, which have tables of their own.
    """
    rows, columns = codes.shape
    first, offset = _first_blocks(rows, columns, codes.device)
    saved = scales[:, 0].to(torch.int64)
    blocks = math.ceil(rows * columns / kernels.MOMENT_BLOCK)
    if bool((saved == offset).all()):
        places = first.unsqueeze(1) + torch.arange(_most_blocks(columns), device=codes.device)
        met = (places - first.unsqueeze(1)) * kernels.MOMENT_BLOCK < (offset + columns).unsqueeze(1)
        absmax = scales.new_zeros(blocks)
        absmax[places[met]] = scales[:, 1:][met]
        return codes, absmax
    table = codebooks(codes.device).unsigned if key.endswith("_sq") else codebooks(codes.device).signed
    block = (saved.unsqueeze(1) + torch.arange(columns, device=codes.device)) // kernels.MOMENT_BLOCK
    values = table[codes.int()] * scales[:, 1:].gather(1, block)
    anew = kernels.quantize_8bit(values.contiguous(), table, kernels.MOMENT_BLOCK)
    return anew.codes, anew.absmax


def columns_of_scales(columns: int) -> int:
    """How many numbers `scales_of_rows` gives for each row."""
    return 1 + _most_blocks(columns)


def _most_blocks(columns: int) -> int:
    """The most blocks that a row of so many columns meets."""
    return 1 + math.ceil(columns / kernels.MOMENT_BLOCK)


def _first_blocks(rows: int, columns: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The block that each row begins in, and where in it."""
    starts = torch.arange(rows, device=device) * columns
    return starts // kernels.MOMENT_BLOCK, starts % kernels.MOMENT_BLOCK
