"""The head's gradient in parts of the vocabulary: the same numbers as TRL's, and TRL's own function elsewhere."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
import re
import sys
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
import trl.trainer.utils
from torch import Tensor, nn
from transformers import PhiConfig, PhiForCausalLM
from trl import SFTTrainer

import hf_galore
import hf_galore.integrations.trainer
import hf_galore.integrations.trl_head
from hf_galore import GaLoreAdamW
from hf_galore.backward.gradient import LowRankGradient
from hf_galore.backward.hooks import hooks_on
from hf_galore.integrations.trl_head import _FusedHead, is_right, restore_fused_head, use_fused_head, why_not_known
from hf_galore.optim.optimizer import GaLoreOptimizer
from hf_galore.plan.tracking import BACKWARD, StorageTracker
from tests.support import planning
from tests.support.helpers import (
    OPTIM_ARGS,
    assert_identical,
    assert_same_but_for_rounding,
    perturbed,
    snapshot,
    target_of,
    tiny_llama,
)
from tests.support.planning import LENGTH
from tests.support.releases import FUSED_HEAD

PART, VOCABULARY, HIDDEN, TOKENS = 40, 96, 24, 30

if not FUSED_HEAD:
    pytest.skip("TRL before 1.16 has another fused loss, or none", allow_module_level=True)

_FOUND = trl.trainer.utils._ChunkedLogProbFunction
TRL_OWN = getattr(_FOUND, "original", _FOUND)  # another test's run may have come first


def current() -> Any:
    """What TRL's fused loss calls."""
    return trl.trainer.utils._ChunkedLogProbFunction


def is_trl_own() -> bool:
    return current() is TRL_OWN


@pytest.fixture(autouse=True)
def _small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three parts of the vocabulary, the last one smaller."""
    monkeypatch.setattr(hf_galore.integrations.trl_head, "VOCABULARY_PART", PART)
    # An example would be among what a test counts.
    monkeypatch.setattr(hf_galore.integrations.trl_head, "is_right", lambda *args: True)
    restore_fused_head()
    yield
    restore_fused_head()


# ---- what we rely on


def test_trl_is_as_we_need_it() -> None:
    """Where this fails, TRL has moved what `integrations.trl_head` stands in for: nothing below means anything."""
    assert why_not_known(TRL_OWN) is None
    parameters = inspect.signature(TRL_OWN.backward).parameters.values()
    assert [p.kind for p in parameters][-1] is inspect.Parameter.VAR_POSITIONAL
    assert "_ChunkedLogProbFunction.apply(" in inspect.getsource(trl.trainer.utils.add_fused_lm_head)


CPU = torch.device("cpu")
OPTIONS_OF_TRL = (1.0, 32768, None, 1.0, ("entropy", "is_top1"))


@pytest.mark.parametrize("options", [OPTIONS_OF_TRL, (0.7, 32768, 2.0, 0.5, ()), (1.0, 7)], ids=str)
def test_trl_computes_in_parts_what_it_computes_whole(options: tuple[Any, ...]) -> None:
    """Where this fails, its backward pass needs something else of its forward pass than we give it."""
    assert hf_galore.integrations.trl_head._problem_on(TRL_OWN, CPU, options) is None


class _Context(types.SimpleNamespace):
    """What a forward pass may do with its context; all that it leaves there can be looked at."""

    def set_materialize_grads(self, value: bool) -> None:
        pass

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        pass

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        self.saved_tensors = tensors


def test_what_trl_keeps_for_its_backward_pass_is_what_we_give_it() -> None:
    hidden, weight, targets = torch.randn(TOKENS, HIDDEN), torch.randn(VOCABULARY, HIDDEN), torch.arange(TOKENS)
    context = _Context()
    outputs = TRL_OWN.forward(context, hidden, weight, None, targets, 1.0, PART, None, 1.0, ("log_probs",))
    assert set(vars(context)) == {"saved_tensors", "compute_dtype", "chunk_size", "kernel_args"}
    assert len(context.saved_tensors) == 6
    for saved, expected in zip(context.saved_tensors, (hidden, weight, None, targets), strict=False):
        assert saved is expected
    # And nothing else is asked for: with these alone the backward pass runs.
    alone = types.SimpleNamespace(
        saved_tensors=context.saved_tensors,
        needs_input_grad=(True, True, False),
        compute_dtype=context.compute_dtype,
        chunk_size=context.chunk_size,
        kernel_args=context.kernel_args,
    )
    gradients = TRL_OWN.backward(alone, torch.ones_like(outputs[0]), *(None,) * 4)
    assert [None if each is None else tuple(each.shape) for each in gradients[:3]] == [
        (TOKENS, HIDDEN),
        (VOCABULARY, HIDDEN),
        None,
    ]
    assert len(gradients) == 9


# ---- gradients

OPTIONS: dict[str, Any] = {"lr": 1e-2, "layerwise": True, "hold_gradients": True, "projected_backward": True}


class Head(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.head = nn.Linear(HIDDEN, VOCABULARY, bias=bias)


def head_and_optimizer(*, bias: bool, target: bool, **group: Any) -> tuple[nn.Linear, GaLoreOptimizer]:
    net = Head(bias)
    options = {"rank": 8, "update_proj_gap": 100, "proj_bits": 16, **group}
    param_options = {net.head.weight: options} if target else {}
    optimizer = GaLoreAdamW(net.parameters(), module=net, param_options=param_options, **OPTIONS)
    optimizer.net = net  # type: ignore[attr-defined]  # alive as long as its optimizer
    return net.head, optimizer


def fused(
    hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> Tensor:
    hooks = hooks_on(head.weight)
    assert hooks is not None
    log_probs: Tensor = _FusedHead.apply(
        TRL_OWN, hooks, hidden, head.weight, head.bias, targets, temperature, 32768, softcap, 1.0, ("log_probs",)
    )[0]
    return log_probs


def exact(
    hidden: Tensor, head: nn.Linear, targets: Tensor, temperature: float = 1.0, softcap: float | None = None
) -> tuple[Tensor, nn.Linear, Tensor]:
    """In float64: the log-probabilities, and what their gradients go to."""
    hidden, head = hidden.detach().double().requires_grad_(), copy.deepcopy(head).double()
    for param in head.parameters():
        setattr(param, "_post_accumulate_grad_hooks", None)  # noqa: B010  (its stub has a dictionary)
    logits = nn.functional.linear(hidden, head.weight, head.bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    log_probs = torch.log_softmax(logits / temperature, -1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    return hidden, head, log_probs


def assert_close(found: Tensor | None, expected: Tensor | None, tolerance: float = 1e-5) -> None:
    assert found is not None
    assert expected is not None
    assert found.shape == expected.shape
    error = ((found.double() - expected).norm() / expected.norm()).item()
    assert error <= tolerance


def captured(optimizer: GaLoreOptimizer, head: nn.Linear) -> dict[str, Tensor]:
    """Gradients that the optimizer left alone, as `hold_gradients` has it do with those of full rank."""
    return {name: param.grad for name, param in head.named_parameters() if param.grad is not None}


@pytest.mark.parametrize("settings", [{}, {"temperature": 0.7}, {"softcap": 2.0}], ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_are_those_of_log_softmax(bias: bool, settings: dict[str, float]) -> None:
    head, optimizer = head_and_optimizer(bias=bias, target=False)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[:4] = torch.tensor([0, PART - 1, PART, VOCABULARY - 1])  # at the borders of parts
    upstream = torch.randn(TOKENS)
    log_probs = fused(hidden, head, targets, **settings)
    exact_hidden, exact_head, exact_log_probs = exact(hidden, head, targets, **settings)
    assert_close(log_probs, exact_log_probs)
    log_probs.backward(upstream)
    exact_log_probs.backward(upstream.double())
    assert_close(hidden.grad, exact_hidden.grad)
    found = captured(optimizer, head)
    assert set(found) == ({"weight", "bias"} if bias else {"weight"})
    for name, param in exact_head.named_parameters():
        assert_close(found[name], param.grad)


@pytest.mark.parametrize("needs", ["hidden", "weight", "bias"])
def test_one_gradient_alone(needs: str) -> None:
    head, optimizer = head_and_optimizer(bias=True, target=False)
    hooks = hooks_on(head.weight)
    assert hooks is not None
    inputs = {"hidden": torch.randn(TOKENS, HIDDEN), "weight": head.weight.detach(), "bias": head.bias.detach()}
    inputs[needs] = inputs[needs].clone().requires_grad_()
    targets = torch.randint(VOCABULARY, (TOKENS,))
    rest = (targets, 1.0, 32768, None, 1.0, ("log_probs",))
    log_probs = _FusedHead.apply(TRL_OWN, hooks, *inputs.values(), *rest)[0]
    (found,) = torch.autograd.grad(log_probs.sum(), inputs[needs])
    expected = {name: tensor.detach().double().requires_grad_(name == needs) for name, tensor in inputs.items()}
    logits = nn.functional.linear(expected["hidden"], expected["weight"], expected["bias"])
    torch.log_softmax(logits, -1).gather(-1, targets.unsqueeze(-1)).sum().backward()
    assert_close(found, expected[needs].grad)
    del optimizer


def test_the_gradient_of_the_entropy() -> None:
    head, optimizer = head_and_optimizer(bias=False, target=False)
    hooks = hooks_on(head.weight)
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    rest = (None, targets, 1.0, 32768, None, 1.0, ("log_probs", "entropy"))
    log_probs, entropy, *_ = _FusedHead.apply(TRL_OWN, hooks, hidden, head.weight, *rest)
    (log_probs.sum() + 0.3 * entropy.sum()).backward()
    exact_hidden, exact_head, exact_log_probs = exact(hidden, head, targets)
    logits = torch.log_softmax(exact_hidden @ exact_head.weight.mT, -1)
    (exact_log_probs.sum() - 0.3 * (logits.exp() * logits).sum()).backward()
    assert_close(hidden.grad, exact_hidden.grad)
    assert_close(captured(optimizer, head)["weight"], exact_head.weight.grad)


def test_a_target_gets_its_low_rank_gradient_and_no_other() -> None:
    head, optimizer = head_and_optimizer(bias=False, target=True)
    hidden = torch.randn(TOKENS, HIDDEN)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    fused(hidden, head, targets).sum().backward()  # the first makes the basis, from a whole gradient
    optimizer.step()
    optimizer.zero_grad()
    assert optimizer.hooks is not None
    target = target_of(optimizer, head.weight)
    right = target.with_probes(target.bases()).right
    assert right is not None
    for runs in (1, 2):  # the second is added
        fused(hidden, head, targets).sum().backward()
        _, exact_head, log_probs = exact(hidden, head, targets)
        log_probs.sum().backward()
        assert exact_head.weight.grad is not None
        (held,) = optimizer.hooks.held()
        assert (
            held.shape == (VOCABULARY, right.shape[1]) == (VOCABULARY, 8 + 8)
        )  # of 24, which leaves 16: half of these for norm probes
        assert_close(held, runs * exact_head.weight.grad @ right.double())
        assert isinstance(head.weight.grad, LowRankGradient)
        assert head.weight.grad.low_rank is held


@pytest.mark.parametrize(("proj_type", "served"), [("right", True), ("left", False), ("full", False)])
def test_only_rows_that_stand_alone_are_projected_in_parts(proj_type: str, served: bool) -> None:
    head, optimizer = head_and_optimizer(bias=False, target=True, proj_type=proj_type)
    assert optimizer.hooks is not None
    assert optimizer.hooks.bases_for_rows(head.weight) is None  # a refresh is due
    hidden, targets = torch.randn(TOKENS, HIDDEN), torch.randint(VOCABULARY, (TOKENS,))
    fused(hidden, head, targets).sum().backward()
    optimizer.step()
    assert (optimizer.hooks.bases_for_rows(head.weight) is not None) == served


@pytest.mark.parametrize("target", [False, True])
def test_no_float32_matrix_of_the_heads_size(target: bool) -> None:
    """What it is for: of a bfloat16 head only a part's gradient is ever float32, and a target's is never whole."""
    vocabulary, hidden_size = 4096, 64
    net = nn.Module()
    net.head = nn.Linear(hidden_size, vocabulary, bias=False).to(torch.bfloat16)
    param_options = {net.head.weight: {"rank": 4, "update_proj_gap": 100, "proj_bits": 16}} if target else {}
    optimizer = GaLoreAdamW(net.parameters(), module=net, param_options=param_options, **OPTIONS)
    hidden, targets = torch.randn(8, hidden_size, dtype=torch.bfloat16), torch.randint(vocabulary, (8,))
    for _ in range(2):  # the first makes the basis
        with StorageTracker(torch.device("cpu")) as tracker:
            tracker.label([net.head.weight], "weights")
            fused(hidden, net.head, targets).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    (peak,) = (peak for peak in tracker.peaks() if peak.phase == BACKWARD)
    made = peak.nbytes - tracker.breakdown(peak.event)["weights"]
    gradient = 2 * vocabulary * hidden_size
    # The bfloat16 gradient, or R of 4 columns of 64 and 8 of norm probes; a part and its tile are small.
    low, high = (gradient * 12 // 64, gradient * 20 // 64) if target else (gradient, 1.25 * gradient)
    assert low < made < high


# ---- training


def llama(**overrides: Any) -> Any:
    return tiny_llama(vocab_size=VOCABULARY, num_hidden_layers=1, **overrides)


def phi() -> PhiForCausalLM:
    """Its head has a bias."""
    torch.manual_seed(0)
    return PhiForCausalLM(
        PhiConfig(
            vocab_size=VOCABULARY,
            hidden_size=64,
            intermediate_size=256,
            num_hidden_layers=1,
            num_attention_heads=4,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attention_dropout=0.0,
            max_position_embeddings=64,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def sft(folder: Path, model: Any, optim: str = "galore_adamw_layerwise", **overrides: Any) -> SFTTrainer:
    tokens = [[3 + (7 * row + column) % (VOCABULARY - 3) for column in range(LENGTH)] for row in range(32)]
    galore = {"optim_target_modules": ["attn", "mlp"], "optim_args": OPTIM_ARGS} if optim.startswith("galore") else {}
    values = {
        **galore,
        "learning_rate": 1e-2,
        "adam_epsilon": 1e-3,  # as in test_layerwise: Adam magnifies rounding where gradients are small
        "max_steps": 8,
        "per_device_eval_batch_size": 8,  # all rows at once
        **overrides,
    }
    data = datasets.Dataset.from_dict({"input_ids": tokens, "labels": tokens})
    return planning.sft(folder, optim, lambda: model, data, **values)()


class Calls:
    """Counts the calls of an autograd function's passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, function: Any) -> None:
        self.forward = self.backward = 0
        for name in ("forward", "backward"):
            monkeypatch.setattr(function, name, staticmethod(self._counting(name, getattr(function, name))))

    def _counting(self, name: str, original: Any) -> Any:
        @functools.wraps(original)
        def call(*args: Any) -> Any:
            setattr(self, name, getattr(self, name) + 1)
            return original(*args)

        return call


HEADS: dict[str, dict[str, Any]] = {
    "full rank": {},
    "target": {"optim_target_modules": ["attn", "mlp", "lm_head"]},
    "target, accumulated": {
        "optim_target_modules": ["attn", "mlp", "lm_head"],
        "gradient_accumulation_steps": 2,
    },
    "target, clipped": {"optim_target_modules": ["attn", "mlp", "lm_head"], "max_grad_norm": 1.0},
    "accumulated": {"gradient_accumulation_steps": 2},
    "clipped": {"max_grad_norm": 1.0},
    "checkpointed": {"activation_checkpointing": True},
    "tied": {},
    "tied, target": {"optim_target_modules": ["attn", "mlp", "lm_head"]},
    # (Accumulated or clipped they differ: a weight with two gradients takes its basis from the whole window, and is
    # clipped by the norm of its gradient where that is there.)
    "bias": {"optim_target_modules": ["attn", "fc"]},
    "bias, target": {"optim_target_modules": ["attn", "fc", "lm_head"]},
}


@pytest.mark.arithmetic
@pytest.mark.parametrize("kind", HEADS)
def test_training_is_the_same_as_with_trls_own(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But for rounding, over three refreshes; the head by itself, where bases magnify it less."""

    def model() -> Any:
        return phi() if kind.startswith("bias") else llama(tie_word_embeddings=kind.startswith("tied"))

    calls = Calls(monkeypatch, _FusedHead)
    trainer = sft(tmp_path, model(), **HEADS[kind])
    trainer.train()
    assert calls.backward == 8 * trainer.args.gradient_accumulation_steps
    with monkeypatch.context() as patch:
        patch.setattr(hf_galore.integrations.trainer, "use_fused_head", lambda: None)
        restore_fused_head()
        expected, nearby = (sft(tmp_path, each, **HEADS[kind]) for each in (model(), perturbed(model())))
        for run in (expected, nearby):
            run.train()
        assert is_trl_own()
    assert calls.backward == 8 * trainer.args.gradient_accumulation_steps
    found, reference, near, start = (snapshot(each) for each in (trainer.model, expected.model, nearby.model, model()))
    assert_same_but_for_rounding(found, reference, near, start)
    head = "model.embed_tokens.weight" if kind.startswith("tied") else "lm_head."
    of_head = {name: weight for name, weight in reference.items() if name.startswith(head)}
    assert len(of_head) == (2 if kind.startswith("bias") else 1)
    assert_same_but_for_rounding(found, of_head, near, start)


def test_a_target_is_trained_without_its_gradient(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between refreshes autograd has nothing to give to the head; the first step makes the basis."""
    arguments = OPTIM_ARGS.replace("update_proj_gap=3", "update_proj_gap=100")
    trainer = sft(tmp_path, llama(), optim_target_modules=["attn", "mlp", "lm_head"], optim_args=arguments)
    seen: list[bool] = []
    weight = trainer.model.lm_head.weight
    before = weight.detach().clone()
    # What autograd brings, before our hook takes it.
    trainer.create_optimizer()
    hook: Any = next(iter(weight._post_accumulate_grad_hooks.values()))
    original = type(hook).__call__

    def watching(self: Any, param: Tensor) -> None:
        if param is weight:
            seen.append(type(param.grad) is Tensor)
        original(self, param)

    monkeypatch.setattr(type(hook), "__call__", watching)
    trainer.train()
    assert seen == [True] + [False] * 7
    assert not torch.equal(weight, before)


# ---- where it does not apply


@pytest.mark.parametrize("optim", ["galore_adamw", "adamw_torch"])
def test_without_hooks_trl_is_left_alone(optim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Calls(monkeypatch, _FusedHead), Calls(monkeypatch, TRL_OWN)
    sft(tmp_path, llama(), optim, max_steps=2).train()
    assert is_trl_own()
    assert (ours.forward, ours.backward, theirs.forward, theirs.backward) == (0, 0, 2, 2)


def test_another_model_goes_to_trls_own_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once a layerwise run has put the dispatch there, a model without our hooks still gets TRL's own."""
    sft(tmp_path, llama(), max_steps=1).train()
    assert not is_trl_own()
    assert current().original is TRL_OWN
    ours = Calls(monkeypatch, _FusedHead)
    applied = 0
    original = TRL_OWN.apply

    def apply(*args: Any) -> Any:
        nonlocal applied
        applied += 1
        return original(*args)

    monkeypatch.setattr(TRL_OWN, "apply", apply)
    sft(tmp_path, llama(), "adamw_torch", max_steps=2).train()
    assert (ours.forward, applied) == (0, 2)


def test_a_model_whose_run_is_over_goes_to_trls_own_function(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = sft(tmp_path, llama(), max_steps=1)
    trainer.train()
    ours = Calls(monkeypatch, _FusedHead)
    batch = torch.full((1, LENGTH), 5)
    trainer.model.train()
    trainer.model(input_ids=batch, labels=batch, fused_lm_head=True).loss.backward()
    assert ours.forward == 0
    assert trainer.model.lm_head.weight.grad is not None


def test_a_copy_of_the_head_goes_to_trls_own_function(monkeypatch: pytest.MonkeyPatch) -> None:
    head, optimizer = head_and_optimizer(bias=False, target=False)
    use_fused_head()
    ours = Calls(monkeypatch, _FusedHead)
    rest = (torch.arange(TOKENS), 1.0, 32768, None, 1.0, ("log_probs",))
    hidden = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    current().apply(hidden, nn.Parameter(head.weight.detach().clone()), None, *rest)
    current().apply(hidden, copy.deepcopy(head).weight, None, *rest)
    assert ours.forward == 0
    current().apply(hidden, head.weight, None, *rest)
    assert ours.forward == 1
    optimizer.close()
    current().apply(hidden, head.weight, None, *rest)
    assert ours.forward == 1


def test_evaluation_uses_trls_own_forward(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = Calls(monkeypatch, _FusedHead), Calls(monkeypatch, TRL_OWN)
    trainer = sft(tmp_path, llama(), max_steps=2, eval_strategy="steps", eval_steps=1)
    in_evaluation: list[tuple[int, int]] = []
    evaluate = trainer.evaluate

    def counting(*args: Any, **kwargs: Any) -> Any:
        before = (ours.forward, theirs.forward)
        metrics = evaluate(*args, **kwargs)
        in_evaluation.append((ours.forward - before[0], theirs.forward - before[1]))
        return metrics

    monkeypatch.setattr(trainer, "evaluate", counting)
    trainer.train()
    assert in_evaluation == [(0, 1), (0, 1)]
    assert (ours.forward, ours.backward) == (2, 2)


def test_no_grad_and_inference_mode_use_trls_own_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    head, optimizer = head_and_optimizer(bias=False, target=False)
    use_fused_head()
    ours = Calls(monkeypatch, _FusedHead)
    arguments = (torch.randn(TOKENS, HIDDEN), head.weight, None, torch.arange(TOKENS), 1.0, 32768, None, 1.0, ())
    with torch.no_grad():
        without = current().apply(*arguments)[0]
    with torch.inference_mode():
        inferred = current().apply(*arguments)[0]
    assert ours.forward == 0
    found = current().apply(*arguments)[0]
    assert ours.forward == 1
    assert torch.allclose(found, without)
    assert torch.equal(inferred, without)
    del optimizer


# ---- a TRL that is not known


class Longer(torch.autograd.Function):
    """One option more, which nobody here knows of."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        final_logit_softcapping: float | None = None,
        logit_scale: float = 1.0,
        outputs: tuple[str, ...] = (),
        normalize: bool = False,
    ) -> Any:
        rest = (targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs)
        return TRL_OWN.forward(ctx, hidden, weight, bias, *rest)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Any, grad_entropy: Any, *_: Any) -> Any:
        return (*TRL_OWN.backward(ctx, grad_logprobs, grad_entropy), None)


class KeepsMore(TRL_OWN):  # type: ignore[misc, valid-type]
    """Its backward pass needs something of its forward pass that parts do not have."""

    @staticmethod
    @functools.wraps(TRL_OWN.forward)
    def forward(ctx: Any, *args: Any) -> Any:
        ctx.sign = 1.0
        return TRL_OWN.forward(ctx, *args)

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Any, grad_entropy: Any, *_: Any) -> Any:
        return TRL_OWN.backward(ctx, ctx.sign * grad_logprobs, grad_entropy)


class Centered(TRL_OWN):  # type: ignore[misc, valid-type]
    """Takes of the head's gradient its mean over the vocabulary, which parts of it do not know."""

    @staticmethod
    def backward(ctx: Any, grad_logprobs: Any, grad_entropy: Any, *_: Any) -> Any:
        of_hidden, of_weight, *rest = TRL_OWN.backward(ctx, grad_logprobs, grad_entropy)
        return of_hidden, of_weight - of_weight.mean(dim=0), *rest


UNKNOWN: dict[str, tuple[Any, str]] = {
    "longer": (Longer, r"_ChunkedLogProbFunction\.forward takes \(ctx, .*, normalize\), not \(ctx, "),
    "keeps more": (KeepsMore, r"fails \(AttributeError: .*'sign'\) where it is called for parts of the vocabulary"),
    "centered": (Centered, "gives other gradients where it is called for parts of the vocabulary"),
    "no function of autograd": (types.SimpleNamespace(apply=TRL_OWN.apply), "is no autograd function"),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_an_unknown_function_trains_as_it_is_and_one_line_says_so(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    function, words = UNKNOWN[kind]
    hf_galore.integrations.trl_head._say_standing_back.cache_clear()
    monkeypatch.setattr(hf_galore.integrations.trl_head, "is_right", is_right)
    monkeypatch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", function)
    ours = Calls(monkeypatch, _FusedHead)
    found, reference = llama(), llama()
    with caplog.at_level(logging.INFO, "hf_galore"):
        for model in (found, llama()):
            sft(tmp_path, model, max_steps=3).train()
    (message,) = (record.getMessage() for record in caplog.records if "TRL" in record.getMessage())
    assert message.startswith(f"TRL {trl.__version__} is not as hf_galore knows it: ")
    assert re.search(words, message)
    assert ours.backward <= 1  # the example, where there was one
    with monkeypatch.context() as patch:
        patch.setattr(hf_galore.integrations.trainer, "use_fused_head", lambda: None)
        patch.setattr(trl.trainer.utils, "_ChunkedLogProbFunction", function)
        sft(tmp_path, reference, max_steps=3).train()
    assert_identical(snapshot(found), snapshot(reference))


def test_the_known_function_is_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hf_galore.integrations.trl_head, "is_right", is_right)
    verdicts: dict[Any, bool] = {}
    monkeypatch.setattr(hf_galore.integrations.trl_head, "_verdicts", verdicts)
    ours = Calls(monkeypatch, _FusedHead)
    sft(tmp_path, llama(), max_steps=3).train()
    assert list(verdicts.values()) == [True]
    assert (ours.forward, ours.backward) == (4, 4)  # and three steps


def test_a_trl_without_the_function_is_named(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    hf_galore.integrations.trl_head._say_standing_back.cache_clear()
    monkeypatch.delattr(trl.trainer.utils, "_ChunkedLogProbFunction")
    with caplog.at_level(logging.INFO, "hf_galore"):
        use_fused_head()
        use_fused_head()
    (message,) = (record.getMessage() for record in caplog.records)
    assert "trl.trainer.utils has no _ChunkedLogProbFunction" in message


def test_a_trl_that_fuses_nothing_is_not_mentioned(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As 0.24, of which LLaMA-Factory imports much: its losses are on logits, whose head is a layer like others."""
    hf_galore.integrations.trl_head._say_standing_back.cache_clear()
    monkeypatch.delattr(trl.trainer.utils, "_ChunkedLogProbFunction")
    monkeypatch.delitem(sys.modules, "trl.kernels")
    with caplog.at_level(logging.INFO, "hf_galore"):
        use_fused_head()
        assert not caplog.records
        monkeypatch.setattr("trl.trainer.sft_trainer._chunked_cross_entropy_loss", None, raising=False)
        use_fused_head()
    assert len(caplog.records) == 1


def test_the_example_leaves_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does it mind autocast, other hooks on what is saved, and the default dtype."""
    monkeypatch.setattr(hf_galore.integrations.trl_head, "_verdicts", {})
    state = torch.get_rng_state()

    def refuse(tensor: Tensor) -> Tensor:
        raise AssertionError("The example's tensors are nobody's business.")

    with (
        StorageTracker(torch.device("cpu")) as tracker,
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(refuse, refuse),
        torch.no_grad(),
    ):
        torch.set_default_dtype(torch.bfloat16)
        try:
            assert is_right(TRL_OWN, CPU, OPTIONS_OF_TRL)
        finally:
            torch.set_default_dtype(torch.float32)
        assert tracker.peaks() == []
    assert torch.equal(torch.get_rng_state(), state)


# ---- on and off


def test_unregister_restores_trls_own_and_register_works_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sft(tmp_path, llama(), max_steps=1).train()
    assert not is_trl_own()
    try:
        hf_galore.unregister()
        assert is_trl_own()
    finally:
        hf_galore.register()
    ours = Calls(monkeypatch, _FusedHead)
    sft(tmp_path, llama(), max_steps=1).train()
    assert not is_trl_own()
    assert ours.backward == 1


def test_once_or_many_times_alike() -> None:
    use_fused_head()
    dispatch = current()
    use_fused_head()
    assert current() is dispatch
    assert dispatch.original is TRL_OWN
    restore_fused_head()
    restore_fused_head()
    assert is_trl_own()


def test_a_trl_without_the_function_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(trl.trainer.utils, "_ChunkedLogProbFunction")
    use_fused_head()
    assert not hasattr(trl.trainer.utils, "_ChunkedLogProbFunction")
    restore_fused_head()
    assert not hasattr(trl.trainer.utils, "_ChunkedLogProbFunction")


def test_without_trl_nothing_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.delitem(sys.modules, "trl.trainer.utils")
    use_fused_head()
    restore_fused_head()
    assert "trl.trainer.utils" not in sys.modules
