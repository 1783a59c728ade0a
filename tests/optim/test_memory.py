"""What moments and bases take, counted at the size of a 1B model on the meta device."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_galore import GaLoreAdamW, GaLoreAdamW8bit, GaLoreConfig
from hf_galore.config import ProjBits
from hf_galore.integrations.target_modules import find_targets
from hf_galore.optim.bases import ON_HOST
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.optim.report import Memory
from tests.support.helpers import arguments

RANK = 512
TARGETS = ["attn", "mlp"]


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    """Llama-1B as GaLore's paper trains it, with its embedding and its output head apart."""
    with torch.device("meta"):
        config = LlamaConfig(
            hidden_size=2048,
            intermediate_size=5461,
            num_hidden_layers=24,
            num_attention_heads=32,
            num_key_value_heads=32,
            vocab_size=32000,
            tie_word_embeddings=False,
        )
        model: nn.Module = LlamaForCausalLM(config).to(torch.bfloat16)
    assert sum(param.numel() for param in model.parameters()) == 1_339_082_752
    return model


def trainers_optimizer(model: nn.Module, optim: str, folder: Path, optim_args: str) -> GaLoreOptimizer:
    """The optimizer that a Trainer makes: one that gives embeddings moments in 32 bits."""
    args = arguments(folder, optim, optim_args=optim_args, optim_target_modules=TARGETS)
    cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args, model)
    optimizer = cls(model.parameters(), **kwargs)
    assert isinstance(optimizer, GaLoreOptimizer)
    return optimizer


def bytes_of(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def bytes_in(optimizer: torch.optim.Optimizer) -> int:
    """All that the state holds on the device: moments, bases, scales."""
    on_device = [v for state in optimizer.state.values() for key, v in state.items() if key not in ON_HOST]
    return sum(bytes_of(value) for value in on_device)


@pytest.mark.parametrize(
    ("optim", "adamw_moment", "saved"),
    [
        # What the paper's abstract claims: up to 65.5 % less optimizer memory. 8 bytes a parameter in AdamW.
        pytest.param("galore_adamw", torch.float32, 0.655, id="float32-moments-against-float32"),
        # Against AdamW in a model all in bfloat16: 4 bytes a parameter.
        pytest.param("galore_adamw_8bit", torch.bfloat16, 0.74, id="8-bit-moments-against-bfloat16"),
    ],
)
def test_the_defaults_save_what_they_promise(
    llama: nn.Module, optim: str, adamw_moment: torch.dtype, saved: float, tmp_path: Path
) -> None:
    """Bases and the full-rank embedding, head and norms included."""
    adamw = sum(2 * param.numel() * adamw_moment.itemsize for param in llama.parameters())
    ours = bytes_in(trainers_optimizer(llama, optim, tmp_path, f"rank={RANK}"))
    assert 1 - ours / adamw >= saved


@pytest.mark.parametrize("optim", ["galore_adamw", "galore_adamw_8bit", "galore_adafactor"])
@pytest.mark.parametrize("proj_bits", [16, 8, 4])
def test_memory_is_what_the_state_holds(llama: nn.Module, optim: str, proj_bits: ProjBits, tmp_path: Path) -> None:
    optimizer = trainers_optimizer(llama, optim, tmp_path, f"rank={RANK}, proj_bits={proj_bits}")
    memory = optimizer.memory()
    assert memory.moment_bytes + memory.basis_bytes == bytes_in(optimizer)
    bits = {16: 16, 8: 8.125, 4: 4.25}[proj_bits]
    # The smaller side is 2048 for all seven matrices of a layer: a whole number of blocks.
    assert 8 * memory.basis_bytes == 24 * 7 * 2048 * RANK * bits
    assert memory.targets == 24 * 7
    assert memory.full_rank == 24 * 2 + 3  # two norms a layer; the embedding, the head and the last norm


def documented() -> list[tuple[str, str, str]]:
    """The rows of docs/benchmarks.md that have options: these, and the GB of either optimizer."""
    text = (Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text("utf-8")
    rows = re.findall(r"^\| `(rank=[^`]*)` \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    assert len(rows) == 10
    return rows


@pytest.mark.parametrize(("optim_args", "in_float32", "in_8_bits"), documented(), ids=lambda value: value)
def test_the_documentation_has_what_each_option_takes(
    llama: nn.Module, optim_args: str, in_float32: str, in_8_bits: str, tmp_path: Path
) -> None:
    for optim, documented_bytes in (("galore_adamw", in_float32), ("galore_adamw_8bit", in_8_bits)):
        optimizer = trainers_optimizer(llama, optim, tmp_path, optim_args)
        memory = optimizer.memory()
        assert memory.moment_bytes + memory.basis_bytes == bytes_in(optimizer)
        assert f"{bytes_in(optimizer) / 1e9:.2f}" == documented_bytes


def test_what_the_options_add_and_save(llama: nn.Module, tmp_path: Path) -> None:
    """A float32 for each matrix; no bases; one moment for two; a byte for each element, and 4 for 256; a float32 for
    each line of the longer side."""

    def memory(options: str) -> Memory:
        return trainers_optimizer(llama, "galore_adamw", tmp_path, f"rank={RANK}{options}").memory()

    default, fira, sign, channel, muon, whole, momentum, lines = map(
        memory,
        [
            "",
            ", residual=fira",
            ", residual=sign",
            ", scaling=channel",
            ", rule=muon",
            ", rule=muon, residual=muon",
            ", rule=muon, residual=muon, residual_bits=8",
            ", rule=muon, residual=normuon",
        ],
    )
    assert fira.moment_bytes + fira.basis_bytes == default.moment_bytes + default.basis_bytes + 4 * default.targets
    assert sign == default
    assert channel.moment_bytes + channel.basis_bytes == default.moment_bytes + 4 * default.targets
    low_rank = 24 * RANK * (4 * 2048 + 3 * 5461)  # elements of R
    assert default.moment_bytes - muon.moment_bytes == 4 * low_rank
    assert muon.basis_bytes == default.basis_bytes
    assert whole == muon
    elements = 24 * 2048 * (4 * 2048 + 3 * 5461)
    assert momentum.moment_bytes - whole.moment_bytes == elements + 4 * elements // 256
    assert momentum.basis_bytes == whole.basis_bytes
    assert lines.moment_bytes - whole.moment_bytes == 4 * 24 * (4 * 2048 + 3 * 5461)
    assert lines.basis_bytes == whole.basis_bytes


def test_float32_moments_take_what_the_formula_says(llama: nn.Module, tmp_path: Path) -> None:
    """4 bytes for each of m and v: low-rank for targets, full-rank for the rest."""
    targets = find_targets(llama, TARGETS, GaLoreConfig(rank=RANK)).projected
    low_rank = sum(weight.numel() // min(weight.shape) * RANK for weight in targets.values())
    projected = {id(weight) for weight in targets.values()}
    full_rank = sum(param.numel() for param in llama.parameters() if id(param) not in projected)
    memory = trainers_optimizer(llama, "galore_adamw", tmp_path, f"rank={RANK}").memory()
    assert memory.moment_bytes == 8 * (low_rank + full_rank)


@pytest.mark.parametrize(("embedding_bits", "bytes_each"), [(32, 8.0), (8, 2 + 2 * 4 / 256)])
def test_an_embedding_takes_the_bits_of_its_group(embedding_bits: int, bytes_each: float) -> None:
    """In 8 bits: a byte each for m and v, and a float32 scale each for 256 of them."""
    weight = nn.Parameter(torch.empty(32000, 2048, device="meta", dtype=torch.bfloat16))
    optimizer = GaLoreAdamW8bit([{"params": [weight], "optim_bits": embedding_bits}])
    assert optimizer.memory().moment_bytes == bytes_each * weight.numel()


@pytest.mark.parametrize(
    ("options", "of_bases", "of_limits"),
    [
        ("residual=fira", 2048 * RANK * 4.25 / 8, 4),
        ("residual=sign", 2048 * RANK * 4.25 / 8, 0),
        ("scaling=channel", 0, 4),
        ("scaling=tensor", 0, 4),
    ],
)
def test_options_that_need_gradients_keep_one_number(
    llama: nn.Module, options: str, of_bases: float, of_limits: int, tmp_path: Path
) -> None:
    """Beside the moments; and random projections nothing."""
    plain = trainers_optimizer(llama, "galore_adamw_8bit", tmp_path, f"rank={RANK}").memory()
    optimizer = trainers_optimizer(llama, "galore_adamw_8bit", tmp_path, f"rank={RANK}, {options}")
    memory = optimizer.memory()
    assert memory.moment_bytes == plain.moment_bytes + 24 * 7 * of_limits
    assert memory.basis_bytes == 24 * 7 * of_bases
    assert memory.moment_bytes + memory.basis_bytes == bytes_in(optimizer)
    assert (memory.targets, memory.full_rank) == (plain.targets, plain.full_rank)


def test_counters_are_not_counted() -> None:
    param = nn.Parameter(torch.zeros(12, 7))
    options: dict[str, Any] = {"rank": 3, "proj_bits": 16, "lazy_refresh": True}
    memory = GaLoreAdamW([{"params": [param], **options}]).memory()
    assert (memory.moment_bytes, memory.basis_bytes) == (2 * 4 * 12 * 3, 4 * 7 * 3)
    assert (memory.targets, memory.full_rank) == (1, 0)


def test_what_is_frozen_takes_nothing() -> None:
    params = [nn.Parameter(torch.zeros(12, 7), requires_grad=index > 0) for index in range(2)]
    memory = GaLoreAdamW(params).memory()
    assert (memory.moment_bytes, memory.full_rank) == (2 * 4 * 12 * 7, 1)
