"""GaLore's optimizers: plain `torch.optim.Optimizer`s, usable with or without a Trainer.

A parameter group with a `rank` is projected, one without is trained full-rank, as in `galore_torch`::

    GaLoreAdamW([{"params": rest}, {"params": matrices, "rank": 128, "update_proj_gap": 200, "scale": 0.25}])
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from typing_extensions import Unpack

from .optimizer import GaLoreOptimizer, GaLoreOptions


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
        super().__init__(params, self.rule_name, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, **options)


class GaLoreAdamW8bit(GaLoreAdamW):
    """`GaLoreAdamW` with the moments in blockwise dynamic 8-bit, by bitsandbytes' kernels, on CPU and GPU.

    bitsandbytes' own rules hold: moments of fewer than 4,096 elements stay in 32 bits, and so do those of a group
    with `optim_bits: 32`, where a Trainer puts the embeddings. With no `rank` anywhere it is
    `bitsandbytes.optim.AdamW8bit`.

    Args: as of `GaLoreAdamW`. Weights are float32, bfloat16 or float16.

    Raises:
        ImportError: bitsandbytes is not installed.

    Source: GaLore (arXiv:2403.03507), section 4.3; 8-bit optimizers (arXiv:2110.02861).
    """

    rule_name = "adam_8bit"


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

    rule_name = "adafactor"

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
        super().__init__(
            params,
            self.rule_name,
            lr=lr,
            eps=eps,
            clip_threshold=clip_threshold,
            decay_rate=decay_rate,
            beta1=beta1,
            weight_decay=weight_decay,
            **options,
        )
