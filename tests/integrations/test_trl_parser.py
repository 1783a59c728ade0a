"""TRL's parser with lists: how its arguments come to be, and what is made of those that may be one or many."""

from __future__ import annotations

import dataclasses
import inspect
import warnings
from typing import Any

import pytest
from transformers import TrainingArguments
from trl import SFTConfig, TrlParser

from hf_galore.integrations.trl_parser import ListParser


@dataclasses.dataclass
class Arguments:
    names: None | str | list[str] = None  # noqa: RUF036  (as TrainingArguments has it: TRL reads them in this order)
    only: str | None = None
    resume_from_checkpoint: str | None = None
    number: int = 1


def parsed(*arguments: str) -> Arguments:
    (found,) = ListParser([Arguments]).parse_args_into_dataclasses(list(arguments))
    assert isinstance(found, Arguments)
    return found


def test_trl_is_as_we_need_it() -> None:
    parser = ListParser([SFTConfig])
    fields = {field.name for field in dataclasses.fields(SFTConfig) if field.init}
    missing = fields - set(parser.actions)
    assert not missing, f"TrlParser no longer adds these fields by add_argument: {sorted(missing)}"
    parameters = inspect.signature(TrlParser.parse_args_into_dataclasses).parameters
    assert "look_for_args_file" in parameters, "TrlParser.parse_args_into_dataclasses has no look_for_args_file"
    assert parser.hints["optim_target_modules"] is not None


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (("--names", "a"), "a"),
        (("--names", "a", "b"), ["a", "b"]),
        (("--names", '["a", "b"]'), ["a", "b"]),
        (("--names", "[ab]+"), "[ab]+"),
        (("--names", "[a,b]+"), "[a,b]+"),
        (("--names", "a.{1,2}b"), "a.{1,2}b"),
        (("--names", "a.{1,2}", "b"), ["a.{1,2}", "b"]),
        (("--names", "a,b"), ["a", "b"]),
        (("--names", "a, b"), ["a", "b"]),
        (("--names", "a,", "b_1.c,d-e"), ["a", "b_1.c", "d-e"]),
        (("--names", "[a,b]"), ["a", "b"]),
        (("--names", "[a,", "b]"), ["a", "b"]),
        (("--names", "['a', 'b']"), ["a", "b"]),
        (("--names", "[ab]"), "[ab]"),
        (("--names", ""), ""),
        ((), None),
    ],
)
def test_one_or_many(arguments: tuple[str, ...], names: Any) -> None:
    assert parsed(*arguments).names == names


def test_other_arguments_are_trls(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    (tmp_path / "program.args").write_text("--number 5")
    monkeypatch.setattr("sys.argv", [str(tmp_path / "program.py")])
    found = parsed("--only", "[a]", "--resume_from_checkpoint")
    assert (found.only, found.resume_from_checkpoint, found.number) == ("[a]", "true", 1)


def test_a_list_of_other_things_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--names", "[1, 2]")
    assert "[1, 2] is not a list of strings" in capsys.readouterr().err


@pytest.mark.skipif(
    "activation_checkpointing" not in TrainingArguments.__dataclass_fields__,
    reason="transformers here has the old name",
)
@pytest.mark.parametrize(
    ("given", "expected", "warned"),
    [
        ((), True, False),
        (("--activation_checkpointing", "false"), False, False),
        (("--gradient_checkpointing", "false"), False, True),
        (("--no_gradient_checkpointing",), False, True),
    ],
)
def test_transformers_warns_of_an_old_name_where_a_user_gives_it_and_not_of_trls_default(
    given: tuple[str, ...], expected: bool, warned: bool, tmp_path: Any
) -> None:
    parser = ListParser([SFTConfig])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (arguments,) = parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--bf16", "false", *given])
    assert arguments.activation_checkpointing is arguments.gradient_checkpointing is expected
    assert any("gradient_checkpointing" in str(each.message) for each in caught) == warned
    assert SFTConfig(output_dir=str(tmp_path), bf16=False).activation_checkpointing, "TRL's default is another one"


@pytest.mark.skipif(
    "activation_checkpointing" not in TrainingArguments.__dataclass_fields__,
    reason="transformers here has the old name",
)
def test_a_file_may_have_the_old_name(tmp_path: Any) -> None:
    parser = ListParser([SFTConfig])
    parser.set_defaults_with_config(output_dir=str(tmp_path), bf16=False, gradient_checkpointing=False)
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        (arguments,) = parser.parse_args_into_dataclasses([])
    assert arguments.activation_checkpointing is False
