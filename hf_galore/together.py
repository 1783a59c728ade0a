"""Which options go with each other: none of them may be without effect, or contradict another."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from .option import OF_WHOLE_MATRICES, written

if TYPE_CHECKING:
    from .config import GaLoreConfig


def check_together(config: GaLoreConfig) -> None:
    """Check that options go with each other.

    Raises:
        ValueError: one is without effect, or contradicts another.
    """
    _check_residual(config)
    if config.scaling != "none":
        _check_scaling(config)
    if config.needs_gradient:
        _check_gradient(config)


def _check_residual(config: GaLoreConfig) -> None:
    if config.residual == "none" and config.residual_scale != 1.0:
        raise ValueError(
            f"GaLore's residual_scale={config.residual_scale:g} multiplies what a residual adds, and residual=none "
            "adds nothing. Set residual to fira, sign, muon or normuon, or leave residual_scale out."
        )
    if config.residual in OF_WHOLE_MATRICES and config.rule != "muon":
        raise ValueError(
            f"GaLore's residual={config.residual} is what rule=muon may do with a residual, and "
            f"{config.rule or 'Adam'} cannot. Set rule=muon too, or residual to fira or sign, which go with any rule."
        )
    if config.residual not in OF_WHOLE_MATRICES and config.residual_bits != 0:
        raise ValueError(
            f"GaLore's residual_bits={config.residual_bits} keeps a momentum of the residual, and "
            f"residual={config.residual} has none. Set rule=muon and residual=muon (or normuon), or leave "
            "residual_bits out."
        )


def _check_scaling(config: GaLoreConfig) -> None:
    """Check that nothing is said of bases where none is kept."""
    default = {field.name: field.default for field in dataclasses.fields(config)}
    of_bases = ("residual", "refresh", "lazy_refresh", "moments", "proj_bits")
    said = [f"{key}={written(getattr(config, key))}" for key in of_bases if getattr(config, key) != default[key]]
    if config.proj_type == "full":
        said.append("proj_type=full")
    if said:
        raise ValueError(
            f"GaLore's scaling={config.scaling} keeps no basis and moves along the gradient itself, so that "
            f"{', '.join(said)} would do nothing. Leave out the one or the other."
        )


def _check_gradient(config: GaLoreConfig) -> None:
    """Check that nothing is said of gradients that are held in low rank, or not built, where they are needed whole."""
    option = f"residual={config.residual}" if config.scaling == "none" else f"scaling={config.scaling}"
    default = {field.name: field.default for field in dataclasses.fields(config)}
    for key in ("gradient_bits", "norm_probes"):
        if getattr(config, key) != default[key]:
            raise ValueError(
                f"GaLore's {option} needs the gradient itself, so that no low-rank gradients are held, and "
                f"{key}={getattr(config, key)} would do nothing. Leave out the one or the other."
            )
    if config.projected_backward:
        raise ValueError(
            f"GaLore's {option} needs the gradient itself, which projected_backward=true never builds. Leave "
            "projected_backward out."
        )
