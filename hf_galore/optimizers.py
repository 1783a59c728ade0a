"""GaLore's optimizers: plain `torch.optim.Optimizer`s, usable with or without a Trainer.

A parameter group with a `rank` is projected, one without is trained full-rank, as in `galore_torch`::

    GaLoreAdamW([{"params": rest}, {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 0.25}])

State is plain tensors, made at construction with a fixed set of keys and shapes, so that a checkpoint loads with
`weights_only=True`, into tensors that are already there. What follows from the group and the shape (side, rank)
is not in it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, cast, overload

import torch
from torch import Tensor, nn

from .config import GaLoreConfig
from .projection import Bases, add_projected_back_, basis_shapes, is_projectable, low_rank_shape, project, side_of
from .refresh import svd_bases
from .update import (
    Codebooks,
    QuantizedMoments,
    adafactor_direction,
    adam_8bit_,
    adam_8bit_direction,
    adam_32bit_,
    adam_direction,
    blockwise_absmax_shape,
    dynamic_codebooks,
)

if TYPE_CHECKING:
    from .layerwise import LayerwiseHooks

logger = logging.getLogger(__name__)

Group = dict[str, Any]
State = dict[str, Tensor]
ParamOptions = Mapping[Tensor, Mapping[str, Any]]

# bitsandbytes keeps the moments of smaller tensors in 32 bits: they save nothing and hurt most.
MIN_8BIT_ELEMENTS = 4096


class GaLoreOptimizer(torch.optim.Optimizer):
    """What the three optimizers share: groups, bases, projection, layerwise hooks, loading.

    A subclass says what its moments are (`_moment_shapes`) and how they turn a gradient into a direction.
    """

    def __init__(
        self,
        params: Iterable[Any],
        defaults: dict[str, Any],
        *,
        param_options: ParamOptions | None = None,
        layerwise: nn.Module | None = None,
    ) -> None:
        self._hooks: LayerwiseHooks | None = None
        super().__init__(_split_groups(params, param_options or {}), defaults)
        if layerwise is not None:
            from .layerwise import LayerwiseHooks

            self._hooks = LayerwiseHooks(self, layerwise)

    # ---- groups and state

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its state.

        Raises:
            ValueError: GaLore's options are out of range, or a parameter of a group with a `rank` is not a matrix.
        """
        config = GaLoreConfig.from_group(param_group)
        if config is not None:
            param_group = {**param_group, **config.group_options()}
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group)
        except ValueError:
            del self.param_groups[-1]
            raise
        for param in group["params"]:
            if param.requires_grad:
                self.state[param] = self._new_state(param, group)

    def _check_group(self, group: Group) -> None:
        names = dict(zip(map(id, group["params"]), group.get("param_names", ()), strict=False))
        full_rank = []
        for param in group["params"]:
            if _is_dtensor(param):
                raise ValueError(
                    "GaLore cannot train a parameter that is sharded over processes (a DTensor, as FSDP2 makes "
                    "them). Run it on one GPU, or under DDP without a layerwise optimizer."
                )
            if "rank" not in group:
                continue
            name = names.get(id(param), f"a parameter of shape {tuple(param.shape)}")
            if param.ndim != 2:
                raise ValueError(
                    f"Only matrices can be projected, but {name} has {param.ndim} dimension(s): {tuple(param.shape)}. "
                    "Move it to a group without a rank."
                )
            if not is_projectable(param.shape, group["rank"]):
                full_rank.append(name)
        if full_rank:
            logger.info(
                "Trained full-rank, because rank %d is not below the smaller side: %s.",
                group["rank"],
                ", ".join(full_rank),
            )

    def _new_state(self, param: Tensor, group: Group) -> State:
        shape: tuple[int, ...] = tuple(param.shape)
        bases: State = {}
        if _is_target(param, group):
            side = side_of(shape, group["proj_type"])
            shapes = basis_shapes(shape, side, group["rank"])
            if shapes.left is not None:
                bases["basis_left"] = param.new_zeros(shapes.left)
            if shapes.right is not None:
                bases["basis_right"] = param.new_zeros(shapes.right)
            shape = low_rank_shape(shape, side, group["rank"])
        # `step` lives on the CPU, as in torch.optim: reading it never waits for the device.
        return {"step": torch.tensor(0.0), **bases, **self._new_moments(param, shape, group)}

    def _new_moments(self, param: Tensor, shape: tuple[int, ...], group: Group) -> State:
        """Moments for a gradient of `shape`: that of the parameter, or low-rank for a target."""
        raise NotImplementedError

    # ---- the update

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; with layerwise hooks, those that they left."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self.update_parameter(param, group)
        if self._hooks is not None:
            self._hooks.end_step()
        return loss

    @torch.no_grad()
    def update_parameter(self, param: Tensor, group: Group) -> None:
        """One optimizer step of one parameter from its `.grad`, which is left as it is.

        Raises:
            RuntimeError: the gradient is sparse.
        """
        gradient = param.grad
        assert gradient is not None
        if gradient.is_sparse:
            raise RuntimeError(
                f"{type(self).__name__} cannot use sparse gradients. Build the embedding with sparse=False."
            )
        state = cast("State", self.state[param])
        if not state:  # frozen when the optimizer was made
            state.update(self._new_state(param, group))
        # Out of place: under fake tensors the value of a CPU scalar survives that, and not `+=`.
        state["step"] = state["step"] + 1
        step = int(state["step"].item())
        if not _is_target(param, group):
            self._update_full_rank(param, gradient, state, group, step)
            return
        if (step - 1) % group["update_proj_gap"] == 0:
            _refresh(param, gradient, state, group)
        bases = Bases(state.get("basis_left"), state.get("basis_right"))
        direction, step_size = self._direction(project(gradient, bases), state, group, step)
        add_projected_back_(param, direction, bases, decay=_decay(group), alpha=-step_size * group["scale"])

    def _direction(self, gradient: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, float]:
        """N for a gradient of the moments' shape, and the factor that it is subtracted with; updates the moments."""
        raise NotImplementedError

    def _update_full_rank(self, param: Tensor, gradient: Tensor, state: State, group: Group, step: int) -> None:
        direction, step_size = self._direction(gradient, state, group, step)
        param.mul_(_decay(group))
        param.add_(direction, alpha=-step_size)

    # ---- layerwise

    @property
    def layerwise_hooks(self) -> LayerwiseHooks | None:
        """The hooks that update weights during the backward pass; `None` for a plain optimizer."""
        return self._hooks

    def close(self) -> None:
        """Remove the layerwise hooks, if any: the model is as it was, and `step()` alone updates it."""
        if self._hooks is not None:
            self._hooks.detach()

    # ---- loading

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` gave, bit for bit, into the tensors that are there.

        `torch.optim.Optimizer` would cast every floating-point tensor to the dtype of its parameter: float32
        moments of bfloat16 weights would lose their lower half.

        Raises:
            ValueError: the groups, GaLore's hyperparameters, or keys and shapes of the state are not this
                optimizer's. Nothing is loaded then.
        """
        groups, saved_groups = self.param_groups, state_dict["param_groups"]
        if [len(group["params"]) for group in groups] != [len(group["params"]) for group in saved_groups]:
            raise ValueError(
                "The checkpoint's optimizer state was made for other parameter groups: it has "
                f"{[len(g['params']) for g in saved_groups]} parameters in its groups, this optimizer has "
                f"{[len(g['params']) for g in groups]}. Resume with the optim, optim_target_modules and model of "
                "the run that wrote it, or start from its weights only."
            )
        copies: list[tuple[Tensor, str, Tensor]] = []
        for group, saved_group in zip(groups, saved_groups, strict=True):
            _check_same_options(group, saved_group)
            for param, index in zip(group["params"], saved_group["params"], strict=True):
                saved = state_dict["state"].get(index, {})
                self._check_same_state(param, index, group, saved)
                copies.extend((param, key, value) for key, value in saved.items())

        # The parent restores groups and runs its hooks; it gets no state, which it would cast.
        state = self.state
        super().load_state_dict({**state_dict, "state": {}})
        self.state = state
        for param, key, value in copies:
            current = self.state[param]
            device = torch.device("cpu") if key == "step" else param.device
            if key in current and current[key].device == device:
                if current[key] is not value:
                    current[key].copy_(value)
            else:  # the model has moved since the state was made, or the parameter was frozen then
                current[key] = value.to(device, copy=True)

    def _check_same_state(self, param: Tensor, index: int, group: Group, saved: Mapping[str, Tensor]) -> None:
        if not saved and not self.state.get(param):
            return
        with torch.device("meta"):
            expected = {
                key: (tuple(value.shape), value.dtype)
                for key, value in self._new_state(param.detach().to("meta"), group).items()
            }
        found = {key: (tuple(value.shape), value.dtype) for key, value in saved.items()}
        if found == expected:
            return
        differing = sorted(key for key in {**found, **expected} if found.get(key) != expected.get(key))
        details = "; ".join(f"{key}: saved {found.get(key)}, needed {expected.get(key)}" for key in differing)
        raise ValueError(
            f"The checkpoint's optimizer state does not fit {type(self).__name__} at parameter {index} of shape "
            f"{tuple(param.shape)} ({details}). Resume with the optim and optim_args of the run that wrote it, or "
            "start from its weights only."
        )


class GaLoreAdamW(GaLoreOptimizer):
    """AdamW on the low-rank gradient, with float32 moments. With no `rank` anywhere it is `torch.optim.AdamW`.

    Args:
        params: parameters, or groups. A group with a `rank` is projected; `update_proj_gap`, `scale` and
            `proj_type` may go with it (see `GaLoreConfig`). Groups may set `lr`, `betas`, `eps`, `weight_decay`.
        lr: learning rate η.
        betas: decay rates β₁, β₂ of the moments.
        eps: ε, added to √v̂.
        weight_decay: λ, decoupled; applied before the update and to targets too.
        param_options: group entries for single parameters (`{weight: {"rank": 128}}`): a group with such
            parameters is split. The way to project parameters of groups that somebody else has made.
        layerwise: the model, to update its weights during its backward pass; see `hf_galore.layerwise`.

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
        *,
        param_options: ParamOptions | None = None,
        layerwise: nn.Module | None = None,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults, param_options=param_options, layerwise=layerwise)

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        _check_not_negative(group, "lr", "eps", "weight_decay")
        betas = group["betas"]
        if len(betas) != 2 or not all(0.0 <= beta < 1.0 for beta in betas):
            raise ValueError(f"betas have to be two numbers of at least 0 and below 1, but are {betas!r}.")

    def _new_moments(self, param: Tensor, shape: tuple[int, ...], group: Group) -> State:
        return {key: _new_moment(param, shape) for key in ("exp_avg", "exp_avg_sq")}

    def _direction(self, gradient: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, float]:
        direction = adam_direction(
            gradient, state["exp_avg"], state["exp_avg_sq"], step=step, betas=group["betas"], eps=group["eps"]
        )
        return direction, float(group["lr"])


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
        *,
        param_options: ParamOptions | None = None,
        layerwise: nn.Module | None = None,
    ) -> None:
        try:
            import bitsandbytes  # noqa: F401  (fail here, not in the first step)
        except ImportError as error:
            raise ImportError(
                f"{type(self).__name__} needs bitsandbytes: pip install bitsandbytes. The 32-bit optimizers work "
                "without it."
            ) from error
        self._codebooks: dict[torch.device, Codebooks] = {}
        super().__init__(params, lr, betas, eps, weight_decay, param_options=param_options, layerwise=layerwise)

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

    def _codebooks_on(self, device: torch.device) -> Codebooks:
        if device not in self._codebooks:
            self._codebooks[device] = dynamic_codebooks(device)
        return self._codebooks[device]

    def _direction(self, gradient: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, float]:
        moments = _quantized_moments(state)
        if moments is None:
            return super()._direction(gradient, state, group, step)
        direction = adam_8bit_direction(
            gradient,
            moments,
            self._codebooks_on(gradient.device),
            step=step,
            betas=group["betas"],
            eps=group["eps"],
        )
        return direction, float(group["lr"])

    def _update_full_rank(self, param: Tensor, gradient: Tensor, state: State, group: Group, step: int) -> None:
        if not param.is_contiguous():  # bitsandbytes' kernels walk the memory as if it were
            super()._update_full_rank(param, gradient, state, group, step)
            return
        lr = float(group["lr"])
        options = {key: group[key] for key in ("betas", "eps", "weight_decay")}
        moments = _quantized_moments(state)
        if moments is None:
            adam_32bit_(param, gradient, state["exp_avg"], state["exp_avg_sq"], step=step, lr=lr, **options)
        else:
            adam_8bit_(param, gradient, moments, self._codebooks_on(param.device), step=step, lr=lr, **options)


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
        param_options: as `GaLoreAdamW`.
        layerwise: as `GaLoreAdamW`.

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
        *,
        param_options: ParamOptions | None = None,
        layerwise: nn.Module | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "eps": eps,
            "clip_threshold": clip_threshold,
            "decay_rate": decay_rate,
            "beta1": beta1,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults, param_options=param_options, layerwise=layerwise)

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

    def _direction(self, gradient: Tensor, state: State, group: Group, step: int) -> tuple[Tensor, float]:
        direction = adafactor_direction(
            gradient,
            exp_avg_sq=state.get("exp_avg_sq"),
            exp_avg_sq_row=state.get("exp_avg_sq_row"),
            exp_avg_sq_col=state.get("exp_avg_sq_col"),
            step=step,
            decay_rate=group["decay_rate"],
            eps=group["eps"],
            clip_threshold=group["clip_threshold"],
        )
        lr = float(group["lr"])
        if group["beta1"] is None:
            return direction, lr
        # transformers averages updates that the learning rate is already in.
        exp_avg = state["exp_avg"].lerp_(direction.mul_(lr), 1 - group["beta1"])
        return exp_avg, 1.0


def _split_groups(params: Iterable[Any], options: ParamOptions) -> list[dict[str, Any]]:
    """Groups in which all parameters have the same options: those of each group, in the order given."""
    groups = list(params)
    if not groups:
        raise ValueError("The optimizer was given no parameters.")
    if not isinstance(groups[0], dict):
        groups = [{"params": groups}]
    split: list[dict[str, Any]] = []
    for group in groups:
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        # Keyed by the options themselves: parameters with equal options share a group.
        parts: dict[tuple[tuple[str, Any], ...], list[Any]] = {}
        for entry in entries:
            param = entry[1] if isinstance(entry, tuple) else entry
            parts.setdefault(tuple(sorted(options.get(param, {}).items())), []).append(entry)
        # A group that was empty stays: callers may fill it later.
        split.extend({**group, **dict(key), "params": part} for key, part in (parts or {(): []}).items())
    return split


def _is_target(param: Tensor, group: Group) -> bool:
    return "rank" in group and is_projectable(param.shape, group["rank"])


def _is_dtensor(param: Tensor) -> bool:
    return hasattr(param, "device_mesh")  # without importing torch.distributed.tensor, which takes a second


def _decay(group: Group) -> float:
    return 1.0 - float(group["lr"] * group["weight_decay"])


def _refresh(param: Tensor, gradient: Tensor, state: State, group: Group) -> None:
    bases = svd_bases(gradient, side_of(param.shape, group["proj_type"]), group["rank"])
    for key, basis in (("basis_left", bases.left), ("basis_right", bases.right)):
        if basis is not None:
            state[key].copy_(basis)


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


def _check_same_options(group: Group, saved_group: Group) -> None:
    own, saved = GaLoreConfig.from_group(group), GaLoreConfig.from_group(saved_group)
    if own == saved:
        return

    def words(config: GaLoreConfig | None) -> str:
        if config is None:
            return "no projection"
        return ", ".join(f"{key}={value}" for key, value in config.group_options().items())

    raise ValueError(
        f"The checkpoint was written with {words(saved)}, this optimizer was made with {words(own)}. A resumed run "
        "continues the old one: give it the same, or start a new one from the checkpoint's weights."
    )
