"""The hyperparameters of GaLore: one frozen, validated object, from keywords or from an ``optim_args`` string.

Knows nothing of torch, so that a recipe can be checked without loading anything heavy.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any, Literal, get_args

from .option import Key as Key
from .option import Option, boolean, integer_from, one_of, or_auto, or_none, positive_float, written
from .synonyms import GALORE, GALORE_PHRASES, plain, synonym
from .together import check_together

ProjType = Literal["std", "reverse_std", "left", "right", "full"]
PROJ_TYPES: tuple[ProjType, ...] = get_args(ProjType)
RefreshMethod = Literal["svd", "randomized", "subspace", "random"]
REFRESH_METHODS: tuple[RefreshMethod, ...] = get_args(RefreshMethod)
Moments = Literal["keep", "rotate", "reset"]
MOMENTS: tuple[Moments, ...] = get_args(Moments)
ProjBits = Literal[16, 8, 4]
PROJ_BITS: tuple[ProjBits, ...] = get_args(ProjBits)
GradientBits = Literal[16, 8]
GRADIENT_BITS: tuple[GradientBits, ...] = get_args(GradientBits)
RuleName = Literal["adam", "adafactor", "lion", "muon"]
RULE_NAMES: tuple[RuleName, ...] = get_args(RuleName)
Exchange = Literal["low_rank", "dense"]
EXCHANGES: tuple[Exchange, ...] = get_args(Exchange)
EmbeddingBits = Literal[32, 8]
EMBEDDING_BITS: tuple[EmbeddingBits, ...] = get_args(EmbeddingBits)
Residual = Literal["none", "fira", "sign", "muon", "normuon"]
RESIDUALS: tuple[Residual, ...] = get_args(Residual)
Scaling = Literal["none", "channel", "tensor"]
SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
ResidualBits = Literal[0, 8]
RESIDUAL_BITS: tuple[ResidualBits, ...] = get_args(ResidualBits)
NORM_PROBES = 8
"""The default of `norm_probes`, also of what was saved before there was such an option."""

_GROUP_OPTIONS: dict[str, Option] = {
    "rank": integer_from(1),
    "update_proj_gap": integer_from(1),
    "scale": or_auto(positive_float()),
    "proj_type": one_of(PROJ_TYPES),
    "refresh": one_of(REFRESH_METHODS),
    "stagger": boolean(),
    "lazy_refresh": boolean(),
    "moments": one_of(MOMENTS),
    "proj_bits": one_of(PROJ_BITS),
    "gradient_bits": one_of(GRADIENT_BITS),
    "norm_probes": integer_from(0),
    "rule": or_none(one_of(RULE_NAMES)),
    "residual": one_of(RESIDUALS),
    "residual_scale": positive_float(),
    "residual_bits": one_of(RESIDUAL_BITS),
    "scaling": one_of(SCALINGS),
}
# These concern the optimizer as a whole.
_OPTIONS: dict[str, Option] = {
    **_GROUP_OPTIONS,
    "stochastic_rounding": boolean(),
    "projected_backward": or_none(boolean()),
    "exchange": or_none(one_of(EXCHANGES)),
    "embedding_bits": one_of(EMBEDDING_BITS),
}


GROUP_OPTIONS: tuple[str, ...] = tuple(_GROUP_OPTIONS)
"""The options that a parameter group may set."""
OPTIONS: tuple[str, ...] = tuple(_OPTIONS)
"""All of GaLore's arguments."""

_MEANINGS = {
    "rank": "columns of a basis",
    "update_proj_gap": "steps from one refresh to the next",
    "scale": "multiplies updates",
    "proj_type": "the side",
    "refresh": "how a basis is computed",
    "stagger": "refreshes spread over the gap",
    "lazy_refresh": "longer gaps for stable subspaces",
    "moments": "what a refresh does to them",
    "proj_bits": "of an element of a basis",
    "gradient_bits": "of low-rank gradients that are held",
    "norm_probes": "columns for the true norm; 0: R's",
    "rule": "if not optim's rule",
    "residual": "use of the rest of G",
    "residual_scale": "multiplies the residual's update",
    "residual_bits": "of a momentum of its own; 0: none",
    "scaling": "G itself, scaled; no basis kept",
    "stochastic_rounding": "of bfloat16 weights",
    "projected_backward": "no full gradient; on if layerwise",
    "exchange": "what the processes of DDP reduce",
    "embedding_bits": "of moments of embeddings, in 8-bit optimizers",
}
_DEFAULTS_ELSEWHERE = {
    "rule": "as optim says",
    "projected_backward": "layerwise: true, else false",
    "exchange": "with projected_backward low_rank, else dense",
}


def keys() -> tuple[Key, ...]:
    """All keys of `optim_args`, in words."""
    as_written = {key: written(value) for key, value in dataclasses.asdict(GaLoreConfig()).items()}
    defaults = {**as_written, **_DEFAULTS_ELSEWHERE}
    return tuple(
        Key(name, option.values, defaults[name], _MEANINGS[name], is_set=name not in _DEFAULTS_ELSEWHERE)
        for name, option in _OPTIONS.items()
    )


def nearest(name: str, known: list[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of `known`, or nothing where none is close."""
    close = difflib.get_close_matches(name, known, n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _check(key: str, value: Any) -> None:
    if not _option(key).is_valid(value):
        raise ValueError(f"GaLore's {key} has to be {_option(key).allowed}, but was given {value!r}.")


def _option(key: str) -> Option:
    option = _OPTIONS.get(key)
    if option is None:
        raise ValueError(f"GaLore has no argument {key!r}; it has {', '.join(OPTIONS)}.{_advice(key)}")
    return option


def _advice(key: str) -> str:
    meant = synonym(key, GALORE, OPTIONS)
    if meant:
        return f" Did you mean {meant!r}?"
    phrase = GALORE_PHRASES.get(plain(key))
    return f" {phrase}" if phrase else nearest(key, list(OPTIONS))


def _parse(key: str, text: str) -> Any:
    """A value from its text; whether it is in range is not looked at."""
    option = _option(key)
    try:
        return option.parse(text)
    except (ValueError, KeyError):
        hint = " Items are separated by commas." if ";" in text or "=" in text else ""
        raise ValueError(f"GaLore's {key} has to be {option.allowed}, but was given {text!r}.{hint}") from None


def options_in(text: str) -> dict[str, Any]:
    """What an `optim_args` string gives, each value checked by itself.

    Raises:
        ValueError: as `GaLoreConfig.from_optim_args`.
    """
    values: dict[str, Any] = {}
    for item in text.split(","):
        if not item.strip():
            continue  # a trailing comma, or an empty string
        key, equals, raw = (part.strip() for part in item.partition("="))
        if not equals or not key or not raw:
            raise ValueError(
                f"optim_args has to read 'key=value, key=value', but it holds {item.strip()!r}. "
                f"Keys: {', '.join(_OPTIONS)}."
            )
        if key in values:
            raise ValueError(f"optim_args gives {key!r} twice: {values[key]!r} and {raw!r}. Give it once.")
        values[key] = _parse(key, raw)
        _check(key, values[key])
    return values


@dataclasses.dataclass(frozen=True, kw_only=True)
class GaLoreConfig:
    """Hyperparameters of GaLore (Zhao et al., 2024, arXiv:2403.03507, algorithm 2).

    The first four have their published defaults; those of the rest were chosen by `tests/benchmarks/quality.py`.

    Args:
        rank: columns r of a basis. A matrix whose smaller side is at most r is not projected.
        update_proj_gap: optimizer steps from one refresh of a basis to the next.
        scale: multiplies the update of targets, and nothing else (α in the paper). `auto` takes the number that goes
            with the rank (`hf_galore.lowrank.scales.scale_of`), so that another rank needs no other rate.
        proj_type: which side is projected. `std` takes the smaller one, `reverse_std` the larger one,
            `left`, `right` and `full` (both) what they say.
        refresh: how a basis is computed. `svd` takes the full SVD, as published; `randomized` a range finder with
            oversampling; `subspace` power iterations from the old basis; `random` takes random numbers, whatever the
            gradient (not with `lazy_refresh`).
        stagger: whether the refreshes of the matrices are spread over the gap; or else all fall on one step. The first
            step makes all bases in any case.
        lazy_refresh: whether the gap of a matrix doubles, up to eight times its length, while its subspace is stable.
        moments: what happens to the moments when the basis changes. `keep` leaves them, as published; `rotate` carries
            them into the new basis; `reset` starts them, and their bias correction, anew. Where the residual has a
            momentum, `rotate` divides that of the whole anew, and loses nothing of it; the others leave it.
        proj_bits: bits that an element of a basis is kept in; 16 stands for the weight's own dtype.
        gradient_bits: bits that an element of a low-rank gradient is kept in while it is held until the step, by
            layerwise with accumulation or clipping and by the projected backward without layerwise; 16 stands for the
            weight's own dtype. Gradients that are used at once are never kept.
        norm_probes: random columns beside a basis, with which gradients are projected too where only R is kept of
            them, so that `grad_norm` and clipping go by the gradient's norm: an estimate without bias, off by a few
            percent (`hf_galore.lowrank.probes`). 0 goes by the norm of R. What is held is larger by as many columns.
        rule: how low-rank gradients become directions; `None` stands for what the optimizer's name says, which all
            other parameters follow in any case. Only the 8-bit optimizers' own rule, `adam`, has moments in 8 bits.
        residual: what becomes of the residual S = G − back(R), the part of a gradient that no basis has. `none`
            throws it away, as published; `fira` adds it, each channel scaled by what the rule made of that channel of
            R, and limited in its growth; `sign` adds its sign; `muon`, of `rule=muon`, orthogonalises it together with
            R's momentum; `normuon` does that too, and makes the rows of what comes of it, or the columns where these
            are more, equally long. Needs the gradient itself: no `projected_backward`.
        residual_scale: multiplies what the residual adds, besides `scale`.
        residual_bits: with `residual=muon` or `normuon`, bits of an element of a momentum that the residual has for
            itself; 0 stands for none. 8 takes a byte for each element of the whole matrix: bitsandbytes' codes of
            moments and, like those, 32 bits in matrices of fewer than 4,096 elements.
        scaling: what a target moves along. `none` stands for the direction, projected back; `channel` and `tensor` for
            the gradient itself, each channel of it, or the whole, scaled by what the rule made of R, in random
            projections of which no basis is kept.
        stochastic_rounding: whether updates of bfloat16 weights are rounded up or down at random, without bias, rather
            than to the nearest: small ones would vanish.
        projected_backward: whether linear layers compute the low-rank gradient without the gradient; `None` stands
            for: where the optimizer is layerwise.
        exchange: what the processes of `DistributedDataParallel` reduce of a target: `low_rank` gradients, or, `dense`,
            gradients; `None` stands for: low-rank ones where the backward pass is projected, and has no others.
            `low_rank` leaves low-rank gradients in `.grad`.
        embedding_bits: bits of the moments of embeddings that are not projected, in the 8-bit optimizers. 32 is
            bitsandbytes' rule, for stability in long runs; 8 saves 6 bytes a parameter.

    Raises:
        ValueError: a value is of the wrong type or out of range; the message names the key, the value and
            what is allowed.
    """

    rank: int = 128
    update_proj_gap: int = 200
    scale: float | str = 0.25
    proj_type: ProjType = "std"
    refresh: RefreshMethod = "subspace"
    stagger: bool = True
    lazy_refresh: bool = False
    moments: Moments = "keep"
    proj_bits: ProjBits = 4
    gradient_bits: GradientBits = 16
    norm_probes: int = NORM_PROBES
    rule: RuleName | None = None
    residual: Residual = "none"
    residual_scale: float = 1.0
    residual_bits: ResidualBits = 0
    scaling: Scaling = "none"
    stochastic_rounding: bool = False
    projected_backward: bool | None = None
    exchange: Exchange | None = None
    embedding_bits: EmbeddingBits = 32

    def __post_init__(self) -> None:
        for key, value in dataclasses.asdict(self).items():
            _check(key, value)
        check_together(self)

    @property
    def needs_gradient(self) -> bool:
        """Whether an update needs the gradient itself, and not the low-rank one alone."""
        return self.residual != "none" or self.scaling != "none"

    @classmethod
    def from_optim_args(cls, optim_args: str | Mapping[str, Any] | None) -> GaLoreConfig:
        """Read `TrainingArguments.optim_args`: ``"rank=1024, update_proj_gap=200, scale=2"``, or a mapping.

        Args:
            optim_args: comma-separated `key=value` items; spaces and a trailing comma are fine. Or a mapping, as YAML
                has them, whose values may be text. `None` and what is empty give the defaults.

        Raises:
            ValueError: an unknown or repeated key, a missing `=`, a value of the wrong type or out of range.
            TypeError: something other than a string, a mapping or `None`.
        """
        if optim_args is None:
            return cls()
        if isinstance(optim_args, Mapping):
            given = {str(key): value for key, value in optim_args.items()}
            values = {key: _parse(key, value) if isinstance(value, str) else value for key, value in given.items()}
            for key, value in values.items():
                _check(key, value)
            return cls(**values)
        if not isinstance(optim_args, str):
            raise TypeError(
                f"optim_args has to be a string such as 'rank=128, scale=0.25', or a mapping, but is a "
                f"{type(optim_args).__name__}: {optim_args!r}."
            )
        return cls(**options_in(optim_args))

    def optim_args(self) -> str:
        """The string that `from_optim_args` reads this from; what has its default is left out."""
        default = type(self)()
        values = {key: value for key, value in dataclasses.asdict(self).items() if value != getattr(default, key)}
        return ", ".join(f"{key}={written(value)}" for key, value in values.items())

    @classmethod
    def from_group(cls, group: Mapping[str, Any]) -> GaLoreConfig | None:
        """The configuration of an optimizer's parameter group; `None` for a group without a `rank`.

        Raises:
            ValueError: the group sets GaLore's options but no rank, or sets one out of range.
        """
        options = {key: group[key] for key in _GROUP_OPTIONS if key in group}
        if options and "rank" not in options:
            raise ValueError(
                f"A parameter group sets {', '.join(options)} but no rank. Add a rank to project its parameters, "
                "or drop these to train them full-rank."
            )
        return cls(**options) if options else None

    def group_options(self) -> dict[str, Any]:
        """What of this goes into a parameter group of an optimizer."""
        return {key: getattr(self, key) for key in _GROUP_OPTIONS}
