"""`hf-galore chat`, piped and in a terminal."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path

import pexpect
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_galore.cli.main import main
from hf_galore.recipes.embedded_model import Embedded
from hf_galore.recipes.talk import Sampling, Talk
from tests.support.commands import command_line, said_of_mistake
from tests.support.signals import of_a_terminal


@pytest.fixture
def run(small: Embedded, tmp_path: Path) -> Path:
    """The folder of a run that has not ended."""
    shutil.copytree(small.model, tmp_path / "out" / "checkpoint-8")
    return tmp_path / "out"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the answers compared with are a CPU's")
def test_piped_lines_are_said_in_turn_and_answers_alone_are_on_stdout(
    run: Path, small: Embedded, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(small.model), AutoTokenizer.from_pretrained(small.model)
    talk = Talk(model.eval(), tokenizer, sampling=Sampling(6))
    expected = [talk.say(text, lambda part: None).text for text in ("Hello", "Who are you?")]
    talk.reset()
    expected.append(talk.say("Who are you?", lambda part: None).text)
    assert expected[1] != expected[2]

    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello\n\nWho are you?\n/reset\nWho are you?\n/quit\nnever said\n"))
    assert main(["chat", str(run), "--max_new_tokens", "6"]) == 0
    said = capsys.readouterr()
    assert [line.strip() for line in said.out.split("\n")] == [*expected, ""]
    assert f"Loading {run / 'checkpoint-8'} (the run has not ended) ..." in said.err
    assert "The model: float32, on the CPU. Answers: the likeliest words." in said.err


def test_without_a_chat_template_it_says_so(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "checkpoint-8" / "chat_template.jinja").unlink()
    monkeypatch.setattr(sys, "stdin", io.StringIO("Once\n"))
    assert main(["chat", str(run), "--max_new_tokens", "2"]) == 0
    assert "It has no chat template, so it completes each text instead of answering it." in capsys.readouterr().err


def test_a_model_without_its_tokenizer_is_named(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for file in (run / "checkpoint-8").glob("tokenizer*"):
        file.unlink()
    said = said_of_mistake("chat", [str(run)], capsys)
    assert f"{run / 'checkpoint-8'} holds a model without its tokenizer: copy tokenizer.json" in said


def test_what_is_no_text_is_read_as_far_as_it_is(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    piped = io.TextIOWrapper(io.BytesIO(b"\xff\xfe hello\n"), encoding="utf-8", errors="surrogateescape")
    monkeypatch.setattr(sys, "stdin", piped)
    assert main(["chat", str(run), "--max_new_tokens", "2"]) == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "the following arguments are required: FOLDER. See hf-galore chat --help."),
        (["nowhere"], "there is no folder nowhere; give one in which a run has saved its model (output_dir)."),
        (["out", "--temp", "1"], "there is no option --temp, only --help, --system"),
        (["out", "--temperature", "-1"], "--temperature: it takes a number from 0 up, as 0.7, but was given '-1'."),
        (["out", "--max_new_tokens", "0"], "--max_new_tokens: it takes a whole number above 0, but was given '0'."),
    ],
)
def test_mistakes(
    arguments: list[str], said: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(run.parent)
    assert said in said_of_mistake("chat", arguments, capsys)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="has no terminals of that kind")
def test_in_a_terminal(run: Path) -> None:
    """An answer, Ctrl-C in another one, Ctrl-C at the prompt, Ctrl-D."""
    program, *arguments = command_line("chat", str(run), "--temperature", "0")
    with of_a_terminal():
        terminal = pexpect.spawn(program, arguments, timeout=120, dimensions=(24, 80), encoding="utf-8")
    terminal.expect_exact("/reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer.")
    terminal.expect_exact("\r\n> ")
    terminal.sendline("/foo")
    terminal.expect_exact("There is no /foo.")
    terminal.expect_exact("> ")
    terminal.sendline("Hello")
    terminal.expect_exact("Hello\r\n")
    terminal.expect(r"\w")  # random weights never end an answer: 128 tokens and more are to come
    terminal.sendintr()
    terminal.expect_exact("(stopped)")
    terminal.expect_exact("> ")
    terminal.sendintr()
    terminal.expect_exact("/quit, Ctrl-D or Ctrl-C once more ends.")
    terminal.expect_exact("> ")
    terminal.sendeof()
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
