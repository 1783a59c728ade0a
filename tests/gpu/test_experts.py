"""Experts on a card: grouped products in bfloat16, the gradient of all experts that is never built, and no waiting."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hf_galore import make_optimizer
from hf_galore.lowrank.grouped import GroupedGradient
from hf_galore.lowrank.projection import Bases, project
from tests.support.card import DEVICE, sized, wait, waiting

# Of a layer of Qwen3-30B-A3B, but for the number of experts; and one for a CPU.
COUNT, OUTPUTS, INPUTS, TOKENS, RANK = sized((32, 1536, 2048, 8192, 128), (4, 48, 64, 96, 16))


def factors() -> tuple[GroupedGradient, list[int]]:
    """Of experts of which the second has no tokens."""
    generator = torch.Generator(DEVICE).manual_seed(0)
    shares = torch.rand(COUNT, generator=generator, device=DEVICE)
    shares[1] = 0
    ends = (shares.cumsum(0) / shares.sum() * TOKENS).round().to(torch.int32)
    delta, x = (
        torch.randn(TOKENS, width, generator=generator, device=DEVICE).bfloat16() for width in (OUTPUTS, INPUTS)
    )
    return GroupedGradient(delta, x, ends), ends.tolist()


def basis(rows: int) -> Tensor:
    sample = torch.randn(COUNT, rows, RANK, generator=torch.Generator(DEVICE).manual_seed(1), device=DEVICE)
    q: Tensor = torch.linalg.qr(sample)[0]
    return q


@pytest.mark.parametrize("side", ["left", "right", "full"])
def test_groups_are_projected_each_by_its_basis(side: str) -> None:
    gradient, ends = factors()
    bases = Bases(basis(OUTPUTS) if side != "right" else None, basis(INPUTS) if side != "left" else None)
    found = project(gradient, bases)
    assert found.dtype == torch.bfloat16
    for index, (start, end) in enumerate(zip([0, *ends[:-1]], ends, strict=True)):
        delta, x = (factor[start:end].float() for factor in gradient[:2])
        of_one = Bases(*(None if one is None else one[index] for one in bases))
        expected = project(delta.mT @ x, of_one)
        # bfloat16 has 8 bits, and rounds both the bases and what is between the two products.
        assert (found[index].float() - expected).norm() <= 0.02 * expected.norm()
    assert not found[1].any()


def mixture() -> Any:
    torch.manual_seed(0)
    width = sized(512, 64)
    config = Qwen3MoeConfig(
        vocab_size=512, hidden_size=width, moe_intermediate_size=sized(768, 48), num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=width // 4, num_experts=sized(16, 4),
        num_experts_per_tok=2, mlp_only_layers=[], intermediate_size=width,
    )  # fmt: skip
    return Qwen3MoeForCausalLM(config).to(DEVICE, torch.bfloat16)


class Training:
    """A mixture of experts that refreshes in its first steps only."""

    def __init__(self, optim: str, **options: Any) -> None:
        self.model = mixture()
        config = {"rank": sized(128, 16), "update_proj_gap": 10**6, "stagger": False, **options}
        self.optimizer = make_optimizer(self.model, optim=optim, optim_args=config, lr=1e-3)
        self.tokens = torch.randint(0, 512, (8, 64), generator=torch.Generator().manual_seed(2)).to(DEVICE)

    def step(self, mode: str = "default") -> Tensor:
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        wait()
        with waiting(mode):
            loss.backward()
            self.optimizer.step()
            self.optimizer.zero_grad()
        return loss.detach()


@pytest.mark.parametrize("optim", ["galore_adamw_layerwise", "galore_adamw_8bit_layerwise"])
def test_a_steady_step_does_not_wait(optim: str) -> None:
    training = Training(optim)
    for _ in range(4):  # by then every expert has had tokens
        training.step()
    counters = [state["refreshed_at"] for state in training.optimizer.state.values() if "refreshed_at" in state]
    assert all((counter >= 0).all() for counter in counters), "an expert has had no tokens: take another seed"
    for _ in range(2):
        training.step("error")


def test_experts_learn_as_with_whole_gradients() -> None:
    ends = {}
    for name in ("galore_adamw", "galore_adamw_layerwise"):
        training = Training(name, update_proj_gap=5)
        losses = [training.step().item() for _ in range(sized(30, 10))]
        assert losses[-1] < losses[0] - 0.5
        ends[name] = losses[-1]
    # One batch, learnt by heart in bfloat16: R is rounded in other places.
    assert ends["galore_adamw_layerwise"] == pytest.approx(ends["galore_adamw"], rel=0.1)
