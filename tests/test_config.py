"""`optim_args`: every value that is accepted, and one clear error for each that is not."""

from __future__ import annotations

import dataclasses
from random import Random
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hf_galore import GaLoreConfig
from hf_galore.config import GRADIENT_BITS, MOMENTS, PROJ_BITS, PROJ_TYPES, REFRESH_METHODS

configs = st.builds(
    GaLoreConfig,
    rank=st.integers(min_value=1),
    update_proj_gap=st.integers(min_value=1),
    scale=st.floats(min_value=0, exclude_min=True, allow_nan=False, allow_infinity=False),
    proj_type=st.sampled_from(PROJ_TYPES),
    refresh=st.sampled_from(REFRESH_METHODS),
    stagger=st.booleans(),
    lazy_refresh=st.booleans(),
    moments=st.sampled_from(MOMENTS),
    proj_bits=st.sampled_from(PROJ_BITS),
    gradient_bits=st.sampled_from(GRADIENT_BITS),
    norm_probes=st.integers(min_value=0),
    stochastic_rounding=st.booleans(),
    projected_backward=st.sampled_from([None, True, False]),
)


def test_defaults_are_the_published_ones() -> None:
    expected = GaLoreConfig(rank=128, update_proj_gap=200, scale=0.25, proj_type="std", projected_backward=None)
    assert GaLoreConfig() == expected
    assert [GaLoreConfig.from_optim_args(empty) for empty in (None, "", "  ", ",", " , ,")] == [expected] * 5


@pytest.mark.parametrize(
    "text",
    [
        "rank=1024,update_proj_gap=50,scale=2,proj_type=left",
        "rank=1024, update_proj_gap=50, scale=2.0, proj_type=left",
        "  rank = 1024 ,update_proj_gap= 50,\nscale =2e0 , proj_type=left , ",
        "proj_type=left,scale=2,rank=1024,update_proj_gap=50,",
        ",rank=1024,,update_proj_gap=50,scale=2,proj_type=left,,",
    ],
)
def test_spaces_order_and_stray_commas_do_not_matter(text: str) -> None:
    assert GaLoreConfig.from_optim_args(text) == GaLoreConfig(rank=1024, update_proj_gap=50, scale=2, proj_type="left")


def test_every_key_is_read_as_what_it_is() -> None:
    text = "refresh=randomized, stagger=false, lazy_refresh=true, moments=reset, proj_bits=4, gradient_bits=8, "
    text += "stochastic_rounding=true"
    config = GaLoreConfig.from_optim_args(text)
    assert (config.refresh, config.stagger, config.lazy_refresh) == ("randomized", False, True)
    assert (config.moments, config.proj_bits, config.stochastic_rounding) == ("reset", 4, True)
    assert config.gradient_bits == 8


def test_a_trailing_comma_is_fine() -> None:
    """Without hf_galore: `"rank=8,"` gave `not enough values to unpack`."""
    assert GaLoreConfig.from_optim_args("rank=8,") == GaLoreConfig(rank=8)


# What is given, and what the error has to say: the key, the value, what is allowed, the nearest key.
REFUSED = {
    "rank": ["'rank'", "key=value", "update_proj_gap"],
    "rank=": ["'rank='", "key=value"],
    "=8": ["'=8'", "key=value"],
    "rank=8, scale": ["'scale'", "key=value"],
    "rank=8;scale=1": ["rank", "'8;scale=1'", "integer of at least 1", "separated by commas"],
    "rank=8 scale=1": ["rank", "'8 scale=1'", "integer of at least 1", "separated by commas"],
    "rank=abc": ["rank", "'abc'", "integer of at least 1"],
    "rank=8.0": ["rank", "'8.0'", "integer of at least 1"],
    "rank=True": ["rank", "'True'", "integer of at least 1"],
    "rank=0": ["rank", "0", "integer of at least 1"],
    "rank=-1": ["rank", "-1", "integer of at least 1"],
    "rnak=8": ["'rnak'", "rank, update_proj_gap, scale, proj_type", "Did you mean 'rank'?"],
    "gap=8": ["'gap'", "rank, update_proj_gap, scale, proj_type"],
    "proj_typ=std": ["'proj_typ'", "Did you mean 'proj_type'?"],
    "Rank=8": ["'Rank'", "Did you mean 'rank'?"],
    "rank=8, rank=16": ["'rank'", "twice", "8", "16"],
    "rank=8, rank=8": ["'rank'", "twice"],
    "scale=0": ["scale", "0", "finite number above 0"],
    "scale=-1": ["scale", "-1", "finite number above 0"],
    "scale=nan": ["scale", "nan", "finite number above 0"],
    "scale=inf": ["scale", "inf", "finite number above 0"],
    "scale=1e999": ["scale", "inf", "finite number above 0"],
    "scale=x": ["scale", "'x'", "finite number above 0"],
    "update_proj_gap=0": ["update_proj_gap", "0", "integer of at least 1"],
    "update_proj_gap=-3": ["update_proj_gap", "-3", "integer of at least 1"],
    "update_proj_gap=2.5": ["update_proj_gap", "'2.5'", "integer of at least 1"],
    "projected_backward=no": ["projected_backward", "'no'", "true or false"],
    "projected_backward=0": ["projected_backward", "'0'", "true or false"],
    "refresh=qr": ["refresh", "'qr'", "svd, randomized, subspace"],
    "refresh=SVD": ["refresh", "'SVD'", "svd, randomized, subspace"],
    "refresh=true": ["refresh", "'true'", "svd, randomized, subspace"],
    "refreshes=svd": ["'refreshes'", "Did you mean 'refresh'?"],
    "stagger=1": ["stagger", "'1'", "true or false"],
    "stagger=yes": ["stagger", "'yes'", "true or false"],
    "stagger=None": ["stagger", "'None'", "true or false"],
    "staggered=true": ["'staggered'", "Did you mean 'stagger'?"],
    "lazy_refresh=2": ["lazy_refresh", "'2'", "true or false"],
    "lazy-refresh=true": ["'lazy-refresh'", "Did you mean 'lazy_refresh'?"],
    "moments=drop": ["moments", "'drop'", "keep, rotate, reset"],
    "moments=Rotate": ["moments", "'Rotate'", "keep, rotate, reset"],
    "moment=keep": ["'moment'", "Did you mean 'moments'?"],
    "proj_bits=5": ["proj_bits", "5", "one of 16, 8, 4"],
    "proj_bits=32": ["proj_bits", "32", "one of 16, 8, 4"],
    "proj_bits=-8": ["proj_bits", "-8", "one of 16, 8, 4"],
    "proj_bits=8.0": ["proj_bits", "'8.0'", "one of 16, 8, 4"],
    "proj_bits=nf4": ["proj_bits", "'nf4'", "one of 16, 8, 4"],
    "gradient_bits=4": ["gradient_bits", "4", "one of 16, 8"],
    "gradient_bits=32": ["gradient_bits", "32", "one of 16, 8"],
    "gradient_bits=fp8": ["gradient_bits", "'fp8'", "one of 16, 8"],
    "norm_probes=-1": ["norm_probes", "-1", "an integer of at least 0"],
    "norm_probes=many": ["norm_probes", "'many'", "an integer of at least 0"],
    "gradients_bits=8": ["'gradients_bits'", "Did you mean 'gradient_bits'?"],
    "proj_bit=8": ["'proj_bit'", "Did you mean 'proj_bits'?"],
    "stochastic_rounding=on": ["stochastic_rounding", "'on'", "true or false"],
    "stochastic_round=true": ["'stochastic_round'", "Did you mean 'stochastic_rounding'?"],
    "proj_type=foo": ["proj_type", "'foo'", "std, reverse_std, left, right, full"],
    "proj_type=STD": ["proj_type", "'STD'", "std, reverse_std, left, right, full"],
    "scale=8*auto": ["scale", "'8*auto'", "auto*8"],
    "scale=auto*0": ["scale", "'auto*0'", "auto*8"],
    "residual=Fira": ["residual", "'Fira'", "none, fira, sign, muon, normuon"],
    "residual=muon": ["residual=muon", "Adam cannot", "Set rule=muon too"],
    "residual=normuon": ["residual=normuon", "Adam cannot", "Set rule=muon too"],
    "residual=muon, rule=lion": ["residual=muon", "lion cannot", "Set rule=muon too"],
    "residual_bits=4": ["residual_bits", "4", "one of 0, 8"],
    "residual_bits=8": ["residual_bits=8", "residual=none has none", "Set rule=muon and residual=muon"],
    "residual_bits=8, residual=fira": ["residual_bits=8", "residual=fira has none", "or leave residual_bits out"],
    "scaling=rank": ["scaling", "'rank'", "none, channel, tensor"],
    "residual_scale=2": ["residual_scale=2", "residual=none", "Set residual to fira, sign, muon or normuon"],
    "norm_probes=16, residual=sign": ["residual=sign", "norm_probes=16 would do nothing"],
    "norm_probes=0, scaling=tensor": ["scaling=tensor", "norm_probes=0 would do nothing"],
    "gradient_bits=8, scaling=channel": ["scaling=channel", "gradient_bits=8"],
    "scaling=channel, residual=fira": ["scaling=channel", "residual=fira would do nothing"],
    "scaling=channel, refresh=svd, proj_type=full": ["scaling=channel", "refresh=svd, proj_type=full would do nothing"],
}


@pytest.mark.parametrize(("text", "words"), REFUSED.items(), ids=list(REFUSED))
def test_refused_with_the_key_the_value_and_what_is_allowed(text: str, words: list[str]) -> None:
    """Without hf_galore: bare unpacking and `int()` errors, silent defaults, silent acceptance, late crashes."""
    with pytest.raises(ValueError) as error:  # noqa: PT011  (every part of the message is checked below)
        GaLoreConfig.from_optim_args(text)
    assert [word for word in words if word not in str(error.value)] == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rank", 0),
        ("rank", True),
        ("rank", 8.0),
        ("rank", "8"),
        ("rank", None),
        ("update_proj_gap", 0),
        ("update_proj_gap", False),
        ("scale", 0),
        ("scale", True),
        ("scale", float("nan")),
        ("scale", float("inf")),
        ("scale", "0.25"),
        pytest.param("scale", 10**400, id="scale-no-float-is-as-large"),
        ("proj_type", "foo"),
        ("proj_type", None),
        ("proj_type", 1),
        ("refresh", "qr"),
        ("refresh", None),
        ("stagger", 1),
        ("stagger", "true"),
        ("stagger", None),
        ("lazy_refresh", 0),
        ("lazy_refresh", None),
        ("moments", "drop"),
        ("moments", None),
        ("gradient_bits", 4),
        ("gradient_bits", 8.0),
        ("gradient_bits", "8"),
        ("gradient_bits", None),
        ("norm_probes", True),
        ("norm_probes", 8.0),
        ("proj_bits", 5),
        ("proj_bits", 8.0),
        ("proj_bits", "8"),
        ("proj_bits", True),
        ("proj_bits", None),
        ("stochastic_rounding", 1),
        ("stochastic_rounding", "false"),
        ("stochastic_rounding", None),
        ("projected_backward", 1),
        ("projected_backward", "true"),
    ],
)
def test_keywords_are_checked_as_strings_are(key: str, value: Any) -> None:
    options: dict[str, Any] = {key: value}
    with pytest.raises(ValueError, match=f"GaLore's {key} has to be .*, but was given"):
        GaLoreConfig(**options)


def test_a_mapping_is_what_yaml_makes_of_it() -> None:
    """YAML 1.1 reads 1e-1 as text."""
    given_ = {"rank": 8, "scale": "1e-1", "stagger": False, "proj_bits": "8", "rule": None, "lazy_refresh": "true"}
    assert GaLoreConfig.from_optim_args(given_) == GaLoreConfig(
        rank=8, scale=0.1, stagger=False, proj_bits=8, lazy_refresh=True
    )
    mistakes: tuple[tuple[dict[Any, Any], str], ...] = (
        ({"rnak": 8}, "no argument 'rnak'; .* Did you mean 'rank'"),
        ({8: "rank"}, "no argument '8'"),
        ({"rank": 8.0}, "rank has to be an integer of at least 1, but was given 8.0"),
        ({"rank": None}, "rank has to be an integer of at least 1, but was given None"),
        ({"rank": [8]}, r"rank has to be .*, but was given \[8\]"),
        (
            {"scale": "big"},
            "scale has to be a finite number above 0, or auto, or .*, but was given 'big'",
        ),
    )
    for wrong, words in mistakes:
        with pytest.raises(ValueError, match=words):
            GaLoreConfig.from_optim_args(wrong)


@pytest.mark.parametrize("given_", [["rank=8"], 8, b"rank=8"], ids=repr)
def test_something_other_than_a_string_is_named(given_: Any) -> None:
    """Without hf_galore: `optim_args` as dict gave `'dict' object has no attribute 'replace'`."""
    with pytest.raises(TypeError) as error:
        GaLoreConfig.from_optim_args(given_)
    message = str(error.value)
    assert "optim_args" in message
    assert repr(given_) in message
    assert type(given_).__name__ in message
    assert "rank=128" in message  # an example of what it should be


@given(configs, st.randoms(use_true_random=False), st.sampled_from([",", ", ", " , "]))
def test_every_config_reads_back_from_its_string(config: GaLoreConfig, random: Random, comma: str) -> None:
    # None is what a key that is left out stands for.
    items = [f"{key}={value}" for key, value in dataclasses.asdict(config).items() if value is not None]
    random.shuffle(items)
    assert GaLoreConfig.from_optim_args(comma.join(items)) == config
    assert GaLoreConfig.from_optim_args(comma.join(items) + comma) == config


@pytest.mark.parametrize("key", ["stagger", "lazy_refresh", "stochastic_rounding", "projected_backward"])
@pytest.mark.parametrize(
    ("text", "value"), [("true", True), ("True", True), ("false", False), ("False", False), ("FALSE", False)]
)
def test_a_bool_is_read_as_one(text: str, value: bool, key: str) -> None:
    """`bool("False")` is true."""
    assert getattr(GaLoreConfig.from_optim_args(f"{key}={text}"), key) is value


CHOICES = (*PROJ_TYPES, *REFRESH_METHODS, *MOMENTS, *PROJ_BITS)
items = st.one_of(
    st.text(),
    st.builds(
        "{}={}".format,
        st.sampled_from([*dataclasses.asdict(GaLoreConfig()), "rnak", ""]),
        st.one_of(st.text(), st.integers(), st.floats(), st.sampled_from([*CHOICES, True, False, None])),
    ),
)


@given(st.one_of(st.text(), st.lists(items).map(",".join)))
@example("rank=" + "9" * 5000)  # more digits than int() takes
@example("scale=" + "9" * 5000)
@example("rank=٣")
def test_any_string_gives_a_config_or_a_value_error(text: str) -> None:
    try:
        config = GaLoreConfig.from_optim_args(text)
    except ValueError:
        return
    # Whatever was accepted has passed the same checks as keywords do.
    assert config == GaLoreConfig(**dataclasses.asdict(config))
    assert config.rank >= 1
    assert config.update_proj_gap >= 1
    assert isinstance(config.scale, str) or 0 < config.scale < float("inf")
    assert config.proj_type in PROJ_TYPES
    assert config.refresh in REFRESH_METHODS
    assert config.moments in MOMENTS
    assert config.proj_bits in PROJ_BITS
    assert config.gradient_bits in GRADIENT_BITS
    assert {config.stagger, config.lazy_refresh, config.stochastic_rounding} <= {True, False}


def test_frozen_and_hashable() -> None:
    config = GaLoreConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.rank = 8  # type: ignore[misc]
    assert len({config, GaLoreConfig(), GaLoreConfig(rank=8)}) == 2


def test_positional_arguments_are_refused() -> None:
    """`GaLoreConfig(200, 128)` would not say which is which."""
    with pytest.raises(TypeError):
        GaLoreConfig(8)  # type: ignore[call-arg]


@given(configs)
def test_a_group_with_the_options_has_the_config(config: GaLoreConfig) -> None:
    # All but what concerns the optimizer as a whole.
    config = dataclasses.replace(config, stochastic_rounding=False, projected_backward=None)
    assert GaLoreConfig.from_group({"params": [], "lr": 1e-3, **config.group_options()}) == config


def test_a_group_gets_defaults_for_what_it_leaves_out() -> None:
    assert GaLoreConfig.from_group({"params": [], "rank": 8}) == GaLoreConfig(rank=8)


def test_a_group_without_a_rank_is_full_rank() -> None:
    assert GaLoreConfig.from_group({"params": [], "lr": 1e-3}) is None


@pytest.mark.parametrize("key", [key for key in GaLoreConfig().group_options() if key != "rank"])
def test_a_group_with_options_but_no_rank_is_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"sets {key} but no rank"):
        GaLoreConfig.from_group({"params": [], key: GaLoreConfig().group_options()[key]})


def test_a_group_is_checked() -> None:
    with pytest.raises(ValueError, match="rank has to be an integer of at least 1, but was given 0"):
        GaLoreConfig.from_group({"params": [], "rank": 0})
    with pytest.raises(ValueError, match="proj_bits has to be one of 16, 8, 4, but was given 2"):
        GaLoreConfig.from_group({"params": [], "rank": 8, "proj_bits": 2})


def test_a_groups_options_are_those_of_its_matrices() -> None:
    """Rounding and the backward pass concern the optimizer as a whole."""
    expected = {field.name for field in dataclasses.fields(GaLoreConfig)} - {
        "stochastic_rounding",
        "projected_backward",
        "exchange",
        "embedding_bits",
    }
    assert set(GaLoreConfig().group_options()) == expected


@pytest.mark.parametrize(
    ("config", "text"),
    [
        (GaLoreConfig(), ""),
        (GaLoreConfig(rank=1024, scale=2, embedding_bits=8), "rank=1024, scale=2, embedding_bits=8"),
        (GaLoreConfig(stagger=False, proj_type="full", scale=1e-7), "scale=1e-07, proj_type=full, stagger=false"),
        (GaLoreConfig(projected_backward=True), "projected_backward=true"),
    ],
)
def test_as_optim_args(config: GaLoreConfig, text: str) -> None:
    assert config.optim_args() == text
    assert GaLoreConfig.from_optim_args(text) == config
