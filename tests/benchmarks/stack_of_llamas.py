"""Many small Llamas trained at once, as one: they differ in seed and in learning rates, and an optimizer has them all.

Every parameter has a dimension k before its own, one for each model; products are batched. The models have nothing to
do with each other: the gradient of the sum of their losses is each one's own. So a grid of learning rates, with several
seeds, is one training, which takes a card little longer than one model would.

Optimizers are made with a learning rate of 1 and a scale of 1. What they subtract from the weights of a model is
multiplied by its own rates afterwards: without weight decay neither moments nor bases depend on the weights other than
by gradients, so that each model is trained as it would be alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

ROPE_THETA, NORM_EPS, INITIAL_STD = 10_000.0, 1e-6, 0.02


@dataclasses.dataclass(frozen=True)
class Shape:
    """What transformers' `LlamaConfig` would have."""

    hidden: int = 256
    layers: int = 4
    vocabulary: int = 4096
    heads: int = 4
    intermediate: int = 704


class Llamas(nn.Module):
    """k Llamas with an untied head, each initialised from a seed, as transformers would.

    Args:
        shape: of each.
        seeds: one a model; models of the same seed start alike.
        adapters: the rank of LoRA adapters beside each matrix (alpha equals it), which is frozen then; 0 for none.
    """

    def __init__(self, shape: Shape, seeds: Sequence[int], adapters: int = 0) -> None:
        super().__init__()
        self.shape, self.seeds = shape, tuple(seeds)
        h, i = shape.hidden, shape.intermediate
        sizes: dict[str, tuple[int, ...]] = {"embed": (shape.vocabulary, h)}
        for layer in range(shape.layers):
            linear = {"q": (h, h), "k": (h, h), "v": (h, h), "o": (h, h), "gate": (i, h), "up": (i, h), "down": (h, i)}
            sizes |= {f"{layer}_{name}": size for name, size in linear.items()}
            sizes |= {f"{layer}_norm{number}": (h,) for number in (1, 2)}
        sizes |= {"norm": (h,), "head": (shape.vocabulary, h)}
        for name, size in sizes.items():
            value = torch.ones(size) if len(size) == 1 else None
            by_seed = {seed: _normal(seed, name, size) if value is None else value for seed in set(self.seeds)}
            self.register_parameter(name, nn.Parameter(torch.stack([by_seed[seed] for seed in self.seeds])))
        self.adapted = adapters > 0
        if self.adapted:
            for name in self.target_names():
                _, rows, columns = self.get_parameter(name).shape
                self.get_parameter(name).requires_grad_(False)
                bound = math.sqrt(1 / columns)  # peft: kaiming_uniform_ with a = √5
                a = [_normal(seed, f"{name}_a", (adapters, columns), uniform=bound) for seed in self.seeds]
                self.register_parameter(f"{name}_a", nn.Parameter(torch.stack(a)))
                self.register_parameter(f"{name}_b", nn.Parameter(torch.zeros(len(self.seeds), rows, adapters)))

    def target_names(self) -> list[str]:
        """The names of the matrices of attention and MLP."""
        kinds = ("q", "k", "v", "o", "gate", "up", "down")
        return [f"{layer}_{kind}" for layer in range(self.shape.layers) for kind in kinds]

    def matrices(self) -> list[nn.Parameter]:
        """What learns at the matrices' rate: the targets, or their adapters."""
        names = self.target_names()
        if self.adapted:
            names = [f"{name}_{part}" for name in names for part in "ab"]
        return [self.get_parameter(name) for name in names]

    def rest(self) -> list[nn.Parameter]:
        """All else that is trained."""
        chosen = set(map(id, self.matrices()))
        return [param for param in self.parameters() if id(param) not in chosen and param.requires_grad]

    def _linear(self, name: str, x: Tensor) -> Tensor:
        """x (k × T × n) times a matrix's transpose."""
        y = x @ self.get_parameter(name).mT
        if self.adapted:
            y = y + (x @ self.get_parameter(f"{name}_a").mT) @ self.get_parameter(f"{name}_b").mT
        return y

    def _normed(self, name: str, x: Tensor) -> Tensor:
        return functional.rms_norm(x, x.shape[-1:], eps=NORM_EPS) * self.get_parameter(name).unsqueeze(1)

    def hidden(self, ids: Tensor) -> Tensor:
        """What the head gets, k × rows · length × hidden, of tokens of k × rows × length."""
        k, rows, length = ids.shape
        own_rows = self.shape.vocabulary * torch.arange(k, device=ids.device).view(k, 1, 1)
        x = functional.embedding(ids + own_rows, self.get_parameter("embed").flatten(0, 1)).view(k, rows * length, -1)
        cos, sin = _rotary(length, self.shape.hidden // self.shape.heads, ids.device)
        for layer in range(self.shape.layers):
            normed = self._normed(f"{layer}_norm1", x)
            q, key, v = (
                self._linear(f"{layer}_{name}", normed).view(k * rows, length, self.shape.heads, -1).transpose(1, 2)
                for name in "qkv"
            )
            q, key = _rotated(q, cos, sin), _rotated(key, cos, sin)
            attended = functional.scaled_dot_product_attention(q, key, v, is_causal=True)
            x = x + self._linear(f"{layer}_o", attended.transpose(1, 2).reshape(k, rows * length, -1))
            normed = self._normed(f"{layer}_norm2", x)
            gate = functional.silu(self._linear(f"{layer}_gate", normed))
            x = x + self._linear(f"{layer}_down", gate * self._linear(f"{layer}_up", normed))
        return self._normed("norm", x)

    def forward(self, ids: Tensor) -> Tensor:
        """The logits, k × rows × length × vocabulary, of tokens of k × rows × length."""
        return (self.hidden(ids) @ self.get_parameter("head").mT).view(*ids.shape, -1)

    def losses(self, ids: Tensor, labels: Tensor) -> Tensor:
        """The mean loss of each model over the tokens that its labels (k × rows × length) do not set to −100."""
        # The labels are moved, and not the logits cut: those are large.
        wanted = functional.pad(labels[:, :, 1:], (0, 1), value=-100)
        logits = self(ids)
        each = functional.cross_entropy(logits.flatten(0, 2), wanted.flatten(), reduction="none", ignore_index=-100)
        counts = (wanted != -100).flatten(1).sum(1)
        return each.view(len(ids), -1).sum(1) / counts


def _normal(seed: int, name: str, size: tuple[int, ...], uniform: float | None = None) -> Tensor:
    of_name = int.from_bytes(hashlib.sha256(name.encode()).digest()[:5], "big")
    generator = torch.Generator().manual_seed(seed * 2**40 + of_name)
    if uniform is not None:
        return torch.empty(size).uniform_(-uniform, uniform, generator=generator)
    return torch.empty(size).normal_(0, INITIAL_STD, generator=generator)


def _rotary(length: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = ROPE_THETA ** -(torch.arange(0, width, 2, device=device) / width)
    angles = torch.outer(torch.arange(length, device=device).float(), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# ---- training


@dataclasses.dataclass(frozen=True)
class Rates:
    """The learning rates of one model."""

    lr: float
    """η, of what is not a matrix of attention and MLP."""
    scale: float
    """What η is multiplied with for those."""


class ManyRates:
    """Subtracts what an optimizer would, each model's share multiplied by its own rates.

    Args:
        optimizer: made with a rate of 1, a scale of 1 and no decay.
        model: whose parameters it has.
        rates: one a model.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: Llamas, rates: Sequence[Rates]) -> None:
        self.optimizer = optimizer
        device = model.get_parameter("embed").device
        lr = torch.tensor([rate.lr for rate in rates], device=device)
        of_matrices = lr * torch.tensor([rate.scale for rate in rates], device=device)
        matrices = set(map(id, model.matrices()))
        trained = [param for param in model.parameters() if param.requires_grad]
        self._params = [(param, of_matrices if id(param) in matrices else lr) for param in trained]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One step, at the peak rates times a factor: the schedule's."""
        before = [param.detach().clone() for param, _ in self._params]
        for param, _ in self._params:
            param.zero_()  # rather than to subtract steps of 1 from weights of 0.02, which would round them
        self.optimizer.step()
        for (param, rate), old in zip(self._params, before, strict=True):
            param.mul_((factor * rate).view(-1, *[1] * (param.ndim - 1))).add_(old)


@torch.no_grad()
def clip_each(model: Llamas, max_norm: float) -> None:
    """Clip the gradients of each model to a norm of its own."""
    gradients = [param.grad for param in model.parameters() if param.grad is not None]
    squares = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
    factors = (max_norm / (squares.sqrt() + 1e-6)).clamp_max(1.0)
    for gradient in gradients:
        gradient.mul_(factors.view(-1, *[1] * (gradient.ndim - 1)))


def cosine(step: int, steps: int, warmup: float = 0.1) -> float:
    """The factor of a cosine schedule with warmup at a step, from 0, as transformers has it."""
    rising = int(warmup * steps)
    if step < rising:
        return step / rising
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising))))


def train(
    model: Llamas,
    optimizer: ManyRates,
    batch: Callable[[int], tuple[Tensor, Tensor]],
    steps: int,
    *,
    micro_batches: int = 1,
    max_norm: float = 1.0,
    warmup: float = 0.1,
    after_backward: Callable[[int], None] | None = None,
    before_clipping: Callable[[], None] | None = None,
) -> None:
    """Train all models.

    Args:
        model: the models.
        optimizer: of their parameters.
        batch: gives ids and labels (k × rows × length) of a step, on the models' device.
        steps: optimizer steps.
        micro_batches: that a batch is divided into, by rows.
        max_norm: of each model's gradient.
        warmup: a part of the steps.
        after_backward: called after each micro-batch with the step.
        before_clipping: called after all of a step.
    """
    for step in range(steps):
        ids, labels = batch(step)
        for some_ids, some_labels in zip(ids.chunk(micro_batches, 1), labels.chunk(micro_batches, 1), strict=True):
            with tf32():
                (model.losses(some_ids, some_labels).sum() / micro_batches).backward()
            if after_backward is not None:
                after_backward(step)
        if before_clipping is not None:
            before_clipping()
        clip_each(model, max_norm)
        optimizer.step(cosine(step, steps, warmup))
        for param in model.parameters():
            param.grad = None


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    """Within, a card multiplies float32 matrices in TF32: the models', not an optimizer's."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


@torch.no_grad()
def held_out_losses(model: Llamas, ids: Tensor, labels: Tensor, rows: int = 16) -> list[float]:
    """The loss of each model on the same rows (n × length), `rows` at a time, over all tokens."""
    k = len(model.seeds)
    total = torch.zeros(k, dtype=torch.float64, device=ids.device)
    counted = 0
    for some_ids, some_labels in zip(ids.split(rows), labels.split(rows), strict=True):
        count = int((some_labels[:, 1:] != -100).sum())
        wide_ids, wide_labels = (t.expand(k, *t.shape) for t in (some_ids, some_labels))
        total += model.losses(wide_ids, wide_labels).double() * count
        counted += count
    found: list[float] = (total / counted).tolist()
    return found
