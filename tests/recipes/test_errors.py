"""What is said of a mistake in one line and what is a bug; what a run that fails leaves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from jinja2 import TemplateError

from hf_galore import GaLoreConfig
from hf_galore.errors import UserError
from hf_galore.recipes import errors


def test_a_bug_keeps_its_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a bug"), errors.reporting_errors(str(tmp_path / "out")):
        raise ValueError("a bug")  # this module is none that checks arguments
    with pytest.raises(ValueError, match="unpack"), errors.reporting_errors(str(tmp_path / "out")):
        _, _ = (1,)  # type: ignore[misc]
    with pytest.raises(FileNotFoundError), errors.reporting_errors(str(tmp_path / "out")):
        (tmp_path / "missing").read_text()  # the operating system's own
    with pytest.raises(UserError, match="rank"), errors.reporting_errors(str(tmp_path / "out")):
        GaLoreConfig(rank=0)


def test_numbers_that_an_optimizer_refuses_are_one_line(tmp_path: Path) -> None:
    """As with `adam_beta1: 0`, which YAML reads as an integer."""
    with pytest.raises(UserError, match="betas must be either both floats"):  # noqa: SIM117
        with errors.reporting_errors(str(tmp_path / "out")):
            torch.optim.AdamW([torch.zeros(1)], betas=(0, 0.9))


def test_only_empty_folders_of_a_failed_run_are_removed(tmp_path: Path) -> None:
    for leaves_a_file in (False, True):
        out = tmp_path / "new" / "out"

        def fails(out: Path = out, leaves_a_file: bool = leaves_a_file) -> None:
            with errors.reporting_errors(str(out)):
                out.mkdir(parents=True)
                if leaves_a_file:
                    (out / "weights").touch()
                GaLoreConfig(rank=0)

        with pytest.raises(UserError):
            fails()
        assert (tmp_path / "new").exists() == leaves_a_file


def test_a_card_whose_memory_has_run_out_is_one_line(tmp_path: Path) -> None:
    said = (
        "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 23.52 GiB of which 2 MiB is "
        "free. If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=..."
    )
    with pytest.raises(UserError) as error, errors.reporting_errors(str(tmp_path / "out")):
        raise torch.OutOfMemoryError(said)
    assert "of which 2 MiB is free. Give a lower per_device_train_batch_size, max_length or rank; " in str(error.value)
    assert "PYTORCH_CUDA_ALLOC_CONF" not in str(error.value)


def test_a_template_that_refuses_a_conversation_in_the_middle_of_the_data(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be put into the chat template: roles must alternate"):  # noqa: SIM117
        with errors.reporting_errors(str(tmp_path / "out")):
            raise TemplateError("roles must alternate")


GLOOS = (
    "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] Read error [127.0.0.1]:8861: Connection reset by peer. "
    "This is typically caused by a remote worker hanging or bugs in the application."
)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RuntimeError(GLOOS), "(Read error [127.0.0.1]:8861: Connection reset by peer)"),
        (
            torch.distributed.DistBackendError("NCCL error: remote process exited"),
            "(NCCL error: remote process exited)",
        ),
        (RuntimeError("mat1 and mat2 shapes cannot be multiplied"), None),
    ],
)
def test_another_process_that_is_gone_is_one_line(
    error: Exception, words: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        with errors.reporting_errors(str(tmp_path / "out")):
            raise error

    with pytest.raises(type(error)):  # in one process there is no other
        fail()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    with pytest.raises((UserError, RuntimeError)) as caught:
        fail()
    if words is None:
        assert caught.value is error
        return
    assert isinstance(caught.value, UserError)
    assert f"another of the 4 processes is gone, or does not answer {words}. What it has" in str(caught.value)
    assert "with --resume_from_checkpoint" in str(caught.value)
