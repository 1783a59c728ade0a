"""The gradient of the output head under TRL's fused loss, in pieces of the vocabulary.

TRL computes loss and logits together, tile by tile, but its backward pass gathers the head's gradient in a float32
matrix of the head's size: at the moment when the activations of the whole model are alive, 0.5 GiB for Llama-2-7B and
2 GiB for Llama-3-8B, and half of that again for the cast. Here it takes the vocabulary in parts: only a part's gradient
is ever float32, and where the head is a target with a basis, its gradient is projected part by part and never exists.

For that TRL's own function is called with contexts that it has not made itself, a private protocol. Two guards keep a
new TRL from training with wrong gradients in silence: its signatures have to be the known ones, which say what is
passed in; and before its first use on a kind of device, and with other options, a small example has to have the same
losses and gradients in parts as in one piece, which says that its backward pass needs nothing of its forward pass but
what is given here. Where one of them fails, one line says so, and TRL's own function trains the head. The version of
TRL decides nothing: most releases change other things, and a patched one keeps its number.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _disable_current_modes

from ..backward.hooks import BackwardHooks, hooks_on
from ..backward.linear import asked_for
from ..log import logger
from ..lowrank.projection import Bases, project

# Rows of the head at a time: the tile of logits for TRL's 4,096 tokens takes 32 MiB in bfloat16, the part of the
# gradient 64 MiB in float32 at a hidden size of 4,096. (TRL's own 32,768 rows: 256 MiB.)
VOCABULARY_PART = 4096

# TRL's module that looks the loss function up at each call, and its name there.
_MODULE, _NAME = "trl.trainer.utils", "_ChunkedLogProbFunction"
_NONE = object()

# What the function's passes are called with.
KNOWN: dict[str, tuple[str, ...]] = {
    "forward": (
        *("ctx", "hidden", "weight", "bias", "targets", "temperature", "chunk_size"),
        *("final_logit_softcapping", "logit_scale", "outputs"),
    ),
    "backward": ("ctx", "grad_logprobs", "grad_entropy", "_"),
}

# How far apart the two ways of the example may be, relative to the largest element. A GPU may multiply in TF32.
_TOLERANCE = {"cpu": 1e-4}
_TOLERANCE_ELSEWHERE = 5e-3

# TRL's function, a kind of device and options: whether the parts give what it gives.
_verdicts: dict[tuple[Any, str, str], bool] = {}


def use_fused_head() -> None:
    """Let TRL's fused loss come here; of no effect where TRL has not been imported, or is another than expected.

    Heads that no GaLore hooks serve go on to TRL's own function.
    """
    module = sys.modules.get(_MODULE)
    original = getattr(module, _NAME, _NONE)
    if module is None or isinstance(original, _Dispatch) or (original is _NONE and not _fuses_otherwise()):
        return
    reason = why_not_known(original)
    if reason is None:
        setattr(module, _NAME, _Dispatch(original))
    else:
        _say_standing_back(reason)


def _fuses_otherwise() -> bool:
    """Whether TRL has a fused loss by another name: since 1.15 kernels, before in `sft_trainer`, in 0.24 none."""
    trainers = sys.modules.get("trl.trainer.sft_trainer")
    return "trl.kernels" in sys.modules or hasattr(trainers, "_chunked_cross_entropy_loss")


def restore_fused_head() -> None:
    """Give TRL its own function back."""
    module = sys.modules.get(_MODULE)
    current = getattr(module, _NAME, None)
    if module is not None and isinstance(current, _Dispatch):
        setattr(module, _NAME, current.original)


def why_not_known(original: Any) -> str | None:
    """What of TRL's function is not as it is known here, in words; `None` where all is."""
    if original is _NONE:
        return f"{_MODULE} has no {_NAME}"
    if not isinstance(original, type) or not issubclass(original, torch.autograd.Function):
        return f"{_NAME} is no autograd function"
    for name, known in KNOWN.items():
        found = tuple(inspect.signature(getattr(original, name)).parameters)
        if found != known:
            return f"{_NAME}.{name} takes ({', '.join(found)}), not ({', '.join(known)})"
    return None


def is_right(original: Any, device: torch.device, options: tuple[Any, ...]) -> bool:
    """Whether TRL's function gives the same in parts as in one piece; tried once for a kind of device and options.

    Args:
        original: the function.
        device: where to try it.
        options: what it is called with after the targets: temperature, chunk size, ...
    """
    key = (original, device.type, repr(options[1:]))
    if key not in _verdicts:
        try:
            problem = _problem_on(original, device, options)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            problem = f"fails ({type(error).__name__}: {error})"
        _verdicts[key] = problem is None
        if problem is not None:
            _say_standing_back(f"{_NAME} {problem} where it is called for parts of the vocabulary")
    return _verdicts[key]


def _problem_on(original: Any, device: torch.device, options: tuple[Any, ...]) -> str | None:
    """What is wrong with parts of the vocabulary in a small example; `None` where nothing is."""
    generator = torch.Generator("cpu").manual_seed(0)
    tokens, width, rows = 8, 16, VOCABULARY_PART + 7

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(device)

    identity: Any = lambda tensor: tensor  # noqa: E731  (whatever the caller does with saved tensors)
    with (
        _disable_current_modes(),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(identity, identity),
    ):
        leaves = [normal(*shape).requires_grad_() for shape in ((tokens, width), (rows, width), (rows,))]
        targets = torch.tensor([0, 1, VOCABULARY_PART - 1, VOCABULARY_PART, rows - 2, rows - 1, 2, 3], device=device)
        upstream = normal(tokens), normal(tokens)
        results = []
        for apply in (original.apply, functools.partial(_FusedHead.apply, original, None)):
            # The log-probabilities, and the entropy where it is asked for.
            outputs = [output for output in apply(*leaves, targets, *options)[:2] if output is not None]
            loss = sum((output * weight).sum() for output, weight in zip(outputs, upstream, strict=False))
            results.append((*outputs, *torch.autograd.grad(loss, leaves)))
        tolerance = _TOLERANCE.get(device.type, _TOLERANCE_ELSEWHERE)
        for expected, found in zip(*results, strict=True):
            if not (found - expected).abs().max() <= tolerance * expected.abs().max():
                return "gives other gradients"
    return None


@functools.cache
def _say_standing_back(reason: str) -> None:
    import trl

    logger.info(
        "TRL %s is not as hf_galore knows it: %s. Its own loss computes the gradient of the output head, in a float32 "
        "matrix of the head's size; training is right, and takes that much more memory.",
        trl.__version__,
        reason,
    )


class _Dispatch:
    """Stands where TRL looks for an autograd function and calls its `apply`."""

    def __init__(self, original: Any) -> None:
        self.original = original

    def apply(self, hidden: Tensor, weight: Tensor, *rest: Any) -> Any:
        hooks = hooks_on(weight)
        if hooks is None or not torch.is_grad_enabled():
            return self.original.apply(hidden, weight, *rest)
        # Fakes have no numbers: a plan counts what a training takes where TRL's function is right.
        has_numbers = not isinstance(weight, FakeTensor) and weight.device.type != "meta"
        if has_numbers and not is_right(self.original, weight.device, rest[2:]):
            return self.original.apply(hidden, weight, *rest)
        return _FusedHead.apply(self.original, hooks, hidden, weight, *rest)


class _FusedHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        original: Any,
        hooks: BackwardHooks | None,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        temperature: float,
        chunk_size: int,
        *rest: Any,
    ) -> Any:
        ctx.original, ctx.hooks, ctx.weight = original, hooks, weight
        return original.forward(
            ctx, hidden, weight, bias, targets, temperature, min(chunk_size, VOCABULARY_PART), *rest
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        hidden, weight, bias, targets, *statistics = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[2:5]
        asked = asked_for(ctx, ctx.weight) if needs_weight else None
        needs_weight = asked is not None
        bases: Bases | None = ctx.hooks.bases_for_rows(ctx.weight) if asked == "accumulated" else None
        grad_hidden = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        grad_bias = torch.empty_like(bias) if bias is not None and needs_bias else None
        grad_weight = torch.empty_like(weight) if needs_weight and bases is None else None
        low_rank = None if bases is None or bases.right is None else weight.new_empty(len(weight), bases.right.shape[1])
        # In float32, for TRL would round each part's share of its gradient; the products are in the dtype it chose.
        inputs = hidden.float()
        for start in range(0, len(weight), VOCABULARY_PART):
            rows = slice(start, start + VOCABULARY_PART)
            part = types.SimpleNamespace(
                saved_tensors=(
                    inputs,
                    weight[rows],
                    None if bias is None else bias[rows],
                    targets - start,
                    *statistics,
                ),
                needs_input_grad=(needs_hidden, needs_weight, grad_bias is not None),
                compute_dtype=ctx.compute_dtype,
                chunk_size=VOCABULARY_PART,
                kernel_args=ctx.kernel_args,
            )
            of_hidden, of_weight, of_bias, *_ = ctx.original.backward(part, *gradients)
            if grad_hidden is not None:
                grad_hidden.add_(of_hidden)
            if grad_weight is not None:
                grad_weight[rows] = of_weight
            elif low_rank is not None and bases is not None:
                low_rank[rows] = project(of_weight, bases)
            if grad_bias is not None:
                grad_bias[rows] = of_bias
            del of_hidden, of_weight, of_bias
        if low_rank is not None:
            grad_weight = ctx.hooks.of_rows(ctx.weight, low_rank)
        grad_hidden = None if grad_hidden is None else grad_hidden.to(hidden.dtype)
        return None, None, grad_hidden, grad_weight, grad_bias, *(None,) * (len(ctx.needs_input_grad) - 5)
