"""GaLore's optimizers: plain `torch.optim.Optimizer`s, usable with or without a Trainer.

A parameter group with a `rank` is projected, one without is trained full-rank, as in `galore_torch`::

    GaLoreAdamW([{"params": rest}, {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 0.25}])
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from ..lowrank.nonfinite import known_skip
from ..lowrank.rotation import Rotation, rotate, rotate_adam, rotate_factored
from ..rules.update import (
    Codebooks,
    QuantizedMoments,
    adafactor_direction,
    adam_,
    adam_8bit_,
    adam_8bit_direction,
    adam_32bit_,
    adam_direction,
    adam_in_parts_,
    blockwise_absmax_shape,
    dequantize_moments,
    dynamic_codebooks,
    quantize_moments_,
)
from .bases import State
from .groups import Group
from .optimizer import GaLoreOptimizer, GaLoreOptions

# bitsandbytes keeps the moments of smaller tensors in 32 bits: they save nothing and hurt most.
MIN_8BIT_ELEMENTS = 4096


class GaLoreAdamW(GaLoreOptimizer):
    """AdamW on the low-rank gradient, with float32 moments. With no `rank` anywhere it is `torch.optim.AdamW`.

    Args:
        params: parameters, or groups. A group with a `rank` is projected; `update_proj_gap`, `scale` and
            `proj_type` may go with it (see `GaLoreConfig`). Groups may set `lr`, `betas`, `eps`, `weight_decay`.
        lr: learning rate η.
        betas: decay rates β₁, β₂ of the moments.
        eps: ε, added to √v̂.
        weight_decay: λ, decoupled; applied before the update and to targets too.
        options: see `GaLoreOptions`.

    Raises:
        ValueError: a hyperparameter is out of range, or a parameter of a group with a `rank` is no matrix.

    Source: GaLore (Zhao et al., 2024, arXiv:2403.03507), algorithm 2; AdamW (arXiv:1711.05101), algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[GaLoreOptions],
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, **options)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        _check_not_negative(group, "lr", "eps", "weight_decay")
        betas = group["betas"]
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas have to be two numbers of at least 0 and below 1, but are {betas!r}.")

    def _new_moments(self, param: Tensor, shape: tuple[int, ...], group: Group) -> State:
        return {key: _new_moment(param, shape) for key in ("exp_avg", "exp_avg_sq")}

    def _rotate_moments(self, state: State, group: Group, rotation: Rotation, step: int) -> None:
        moments = rotate_adam(state["exp_avg"], state["exp_avg_sq"], rotation, step=step, betas=group["betas"])
        for key, value in zip(("exp_avg", "exp_avg_sq"), moments, strict=True):
            state[key].copy_(value)

    def _direction(self, gradient: Tensor, state: State, group: Group, step: int, skip: Tensor) -> tuple[Tensor, float]:
        direction = adam_direction(
            gradient,
            state["exp_avg"],
            state["exp_avg_sq"],
            step=step,
            betas=group["betas"],
            eps=group["eps"],
            skip=skip,
        )
        return direction, float(group["lr"])

    def _update_full_rank(
        self, param: Tensor, gradient: Tensor, state: State, group: Group, step: int, skip: Tensor
    ) -> None:
        if param.dtype != state["exp_avg"].dtype or not param.is_contiguous():
            super()._update_full_rank(param, gradient, state, group, step, skip)
            return
        adam_(
            param,
            gradient.contiguous(),
            state["exp_avg"],
            state["exp_avg_sq"],
            step=step,
            betas=group["betas"],
            eps=group["eps"],
            lr=float(group["lr"]),
            weight_decay=group["weight_decay"],
            skip=skip,
        )


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` with the moments in blockwise dynamic 8-bit, by bitsandbytes' kernels, on CPU and GPU.

    bitsandbytes' own rules hold: moments of fewer than 4,096 elements stay in 32 bits, and so do those of a group
    with `optim_bits: 32`, where a Trainer puts the embeddings. With no `rank` anywhere it is
    `bitsandbytes.optim.AdamW8bit`.

    Args: as `GaLoreAdamW`; a group may set `optim_bits` to 8 or 32.

    Raises:
        ImportError: bitsandbytes is not installed.
        ValueError: as `GaLoreAdamW`, and for weights that are not float32, bfloat16 or float16.

    Source: GaLore (arXiv:2403.03507), section 4.3; 8-bit optimizers (arXiv:2110.02861).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Unpack[GaLoreOptions],
    ) -> None:
        try:
            import bitsandbytes  # noqa: F401  (fail here, not in the first step)
        except ImportError as error:
            raise ImportError(
                f"{type(self).__name__} needs bitsandbytes: pip install bitsandbytes. The 32-bit optimizers work "
                "without it."
            ) from error
        super().__init__(params, lr, betas, eps, weight_decay, **options)

    def _init_unsaved(self) -> None:
        super()._init_unsaved()
        self._codebooks: dict[torch.device, Codebooks] = {}

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        bits = group.setdefault("optim_bits", 8)
        if bits not in (8, 32):
            raise ValueError(f"optim_bits has to be 8 or 32, but is {bits!r}.")
        for param in group["params"]:
            if param.dtype not in (torch.float32, torch.bfloat16, torch.float16):
                raise ValueError(
                    f"bitsandbytes trains float32, bfloat16 and float16 weights, but one of shape "
                    f"{tuple(param.shape)} is {param.dtype}. Use GaLoreAdamW for it."
                )

    def _new_moments(self, param: Tensor, shape: tuple[int, ...], group: Group) -> State:
        numel = torch.Size(shape).numel()
        if group["optim_bits"] == 32 or numel < MIN_8BIT_ELEMENTS:
            return super()._new_moments(param, shape, group)
        moments: State = {}
        for key in ("exp_avg", "exp_avg_sq"):
            moments[key] = param.new_zeros(shape, dtype=torch.uint8)
            moments[f"{key}_absmax"] = param.new_zeros(blockwise_absmax_shape(numel), dtype=torch.float32)
        return moments

    def _rotate_moments(self, state: State, group: Group, rotation: Rotation, step: int) -> None:
        moments = _quantized_moments(state)
        if moments is None:
            super()._rotate_moments(state, group, rotation, step)
            return
        codebooks = self._codebooks_on(moments.exp_avg.device)
        exp_avg, exp_avg_sq = dequantize_moments(moments, codebooks)
        rotated = rotate_adam(exp_avg, exp_avg_sq, rotation, step=step, betas=group["betas"])
        quantize_moments_(moments, *rotated, codebooks)

    def _codebooks_on(self, device: torch.device) -> Codebooks:
        if device not in self._codebooks:
            self._codebooks[device] = dynamic_codebooks(device)
        return self._codebooks[device]

    def _direction(self, gradient: Tensor, state: State, group: Group, step: int, skip: Tensor) -> tuple[Tensor, float]:
        moments = _quantized_moments(state)
        if moments is None:
            return super()._direction(gradient, state, group, step, skip)
        direction = adam_8bit_direction(
            gradient,
            moments,
            self._codebooks_on(gradient.device),
            step=step,
            betas=group["betas"],
            eps=group["eps"],
            skip=skip,
        )
        return direction, float(group["lr"])

    def _update_full_rank(
        self, param: Tensor, gradient: Tensor, state: State, group: Group, step: int, skip: Tensor
    ) -> None:
        # bitsandbytes' kernels walk the memory as if it were contiguous, and round to the nearest.
        if not param.is_contiguous() or self._rounds_stochastically(param, group):
            super()._update_full_rank(param, gradient, state, group, step, skip)
            return
        options = {key: group[key] for key in ("betas", "eps", "lr", "weight_decay")}
        moments = _quantized_moments(state)
        if known_skip(skip) is None:
            kept = moments or (state["exp_avg"], state["exp_avg_sq"])
            adam_in_parts_(param, gradient, kept, self._codebooks_on(param.device), step=step, skip=skip, **options)
        elif moments is None:
            adam_32bit_(param, gradient, state["exp_avg"], state["exp_avg_sq"], step=step, **options)
        else:
            adam_8bit_(param, gradient, moments, self._codebooks_on(param.device), step=step, **options)


class GaLoreAdafactor(GaLoreOptimizer):
    """`transformers.Adafactor` on the low-rank gradient, with the second moment of R factored.

    Args:
        params: as `GaLoreAdamW`; groups may set the options below.
        lr: learning rate η. It is set from outside, as the Trainer does: Adafactor's relative steps and its scaling by
            the weight are not offered (`relative_step=False, scale_parameter=False` in transformers).
        eps: ε₁, added to the squared gradient.
        clip_threshold: the largest root mean square of an update before the learning rate.
        decay_rate: exponent of β₂ₜ = 1 − t^decay_rate.
        beta1: decay rate of a first moment of the updates; `None` for none.
        weight_decay: λ, applied before the update, as in `transformers`.
        options: see `GaLoreOptions`.

    Source: GaLore (arXiv:2403.03507), section 4.3; Adafactor (arXiv:1804.04235), algorithm 4.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        eps: float = 1e-30,
        clip_threshold: float = 1.0,
        decay_rate: float = -0.8,
        beta1: float | None = None,
        weight_decay: float = 0.0,
        **options: Unpack[GaLoreOptions],
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, **options)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        _check_not_negative(group, "lr", "eps", "weight_decay")
        if not group["clip_threshold"] > 0:
            raise ValueError(f"clip_threshold has to be above 0, but is {group['clip_threshold']!r}.")
        if not group["decay_rate"] < 0:
            raise ValueError(f"decay_rate has to be below 0, but is {group['decay_rate']!r}.")
        if group["beta1"] is not None and not 0.0 <= group["beta1"] < 1.0:
            raise ValueError(f"beta1 has to be None, or at least 0 and below 1, but is {group['beta1']!r}.")

    def _new_moments(self, param: Tensor, shape: tuple[int, ...], group: Group) -> State:
        moments: State = {}
        if len(shape) >= 2:
            moments["exp_avg_sq_row"] = _new_moment(param, shape[:-1])
            moments["exp_avg_sq_col"] = _new_moment(param, shape[:-2] + shape[-1:])
        else:
            moments["exp_avg_sq"] = _new_moment(param, shape)
        if group["beta1"] is not None:
            moments["exp_avg"] = _new_moment(param, shape)
        return moments

    def _rotate_moments(self, state: State, group: Group, rotation: Rotation, step: int) -> None:
        factors = rotate_factored(state["exp_avg_sq_row"], state["exp_avg_sq_col"], rotation)
        for key, value in zip(("exp_avg_sq_row", "exp_avg_sq_col"), factors, strict=True):
            state[key].copy_(value)
        if group["beta1"] is not None:
            state["exp_avg"].copy_(rotate(state["exp_avg"], rotation))

    def _direction(self, gradient: Tensor, state: State, group: Group, step: int, skip: Tensor) -> tuple[Tensor, float]:
        direction = adafactor_direction(
            gradient,
            exp_avg_sq=state.get("exp_avg_sq"),
            exp_avg_sq_row=state.get("exp_avg_sq_row"),
            exp_avg_sq_col=state.get("exp_avg_sq_col"),
            step=step,
            decay_rate=group["decay_rate"],
            eps=group["eps"],
            clip_threshold=group["clip_threshold"],
            skip=skip,
        )
        lr = float(group["lr"])
        if group["beta1"] is None:
            return direction, lr
        # transformers averages updates that the learning rate is already in.
        keep = 1 - skip.to(direction.dtype)
        exp_avg = state["exp_avg"].lerp_(direction.mul_(lr), keep * (1 - group["beta1"]))
        return exp_avg * keep, 1.0


def _new_moment(param: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Zeros of at least float32: bfloat16 moments with β₂ = 0.999 would hardly decay."""
    return param.new_zeros(shape, dtype=torch.promote_types(param.dtype, torch.float32))


def _quantized_moments(state: State) -> QuantizedMoments | None:
    if "exp_avg_absmax" not in state:
        return None
    return QuantizedMoments(*(state[key] for key in QuantizedMoments._fields))


def _check_not_negative(group: Group, *keys: str) -> None:
    for key in keys:
        if not group[key] >= 0:
            raise ValueError(f"{key} has to be at least 0, but is {group[key]!r}.")
