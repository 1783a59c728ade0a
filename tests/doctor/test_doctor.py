"""What the doctor finds on machines that are described to it, and on this one."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import logging
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, RepositoryNotFoundError
from packaging.requirements import Requirement

from hf_galore.doctor import Finding, Report, cards, hub, machine, need_model, packages, report
from hf_galore.doctor.kernels import kernels
from hf_galore.doctor.of_torch import look
from hf_galore.errors import UserError
from hf_galore.expandable_segments import VARIABLE
from hf_galore.integrations import bitsandbytes_checks

GIB = 2**30
T4 = cards.CardFacts("Tesla T4", (7, 5), 15 * GIB, 14 * GIB)
A_4090 = cards.CardFacts("NVIDIA GeForce RTX 4090", (8, 9), 24 * GIB, 23 * GIB)
FACTS = cards.TorchFacts(
    release="2.13.0+cu130",
    cuda="13.0",
    hip=None,
    driver="580.65",
    driver_cuda="13.0",
    cards=(A_4090,),
    error=None,
    architectures=("sm_75", "sm_80", "sm_86", "sm_90", "sm_120", "compute_120"),
    platform="linux",
)


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def other(**changes: Any) -> cards.TorchFacts:
    return dataclasses.replace(FACTS, **changes)


# ---- torch's build, and cards


def test_a_card_that_torch_serves() -> None:
    assert [finding.status for finding in (*cards.build(FACTS, hosted=None), *cards.cards(FACTS))] == ["ok"] * 3


@pytest.mark.parametrize(
    ("driver_cuda", "index"), [("13.1", "cu130"), ("12.4", "cu126"), ("12.8", "cu126"), (None, "cu126")]
)
def test_a_build_for_cpus_on_a_machine_with_a_card(driver_cuda: str | None, index: str) -> None:
    found = only(
        cards.build(
            other(release="2.13.0+cpu", cuda=None, cards=(), architectures=(), driver_cuda=driver_cuda), hosted=None
        )
    )
    assert found.status == "problem"
    assert "2.13.0+cpu is built for CPUs alone, on a machine with an NVIDIA card (driver 580.65)" in found.text
    assert found.command is not None
    assert shlex.split(found.command) == [
        *("pip", "install", f"torch==2.13.0+{index}"),
        *("--index-url", f"https://download.pytorch.org/whl/{index}"),
    ]


def test_a_machine_without_a_card() -> None:
    facts = other(release="2.13.0+cpu", cuda=None, driver=None, driver_cuda=None, cards=(), architectures=())
    assert only(cards.build(facts, hosted=None)).advice is None
    colab = only(cards.build(facts, hosted="Colab"))
    assert (colab.status, colab.advice) == ("note", "In Colab: Runtime > Change runtime type > T4 GPU.")
    assert list(cards.cards(facts)) == []


def test_a_driver_that_is_too_old() -> None:
    found = only(cards.build(other(cards=(), driver_cuda="12.4", error="The driver is too old."), hosted=None))
    assert found.status == "problem"
    assert "sees none, though driver 580.65 is there (for CUDA up to 12.4): The driver is too old." in found.text
    assert "cu126" in str(found.command)


@pytest.mark.parametrize("value", ["", "-1"])
def test_cards_that_are_hidden(value: str) -> None:
    found = only(cards.build(other(cards=(), visible=value), hosted=None))
    assert found.status == "note"
    assert f"CUDA_VISIBLE_DEVICES={value!r}" in found.text


def test_a_t4_has_no_bfloat16() -> None:
    memory, bf16 = cards.cards(other(cards=(T4,)))
    assert (memory.status, memory.text) == ("ok", "Tesla T4: 14.0 GiB free of 15.0")
    assert bf16.status == "note"
    assert "capability 7.5" in bf16.text
    assert "float32" in str(bf16.advice)


def test_a_card_that_is_in_use() -> None:
    memory, _ = cards.cards(other(cards=(dataclasses.replace(A_4090, free=5 * GIB),)))
    assert memory.status == "note"
    assert "hold 19.0 GiB" in memory.text


def test_a_card_that_torch_has_no_kernels_for() -> None:
    p100 = cards.CardFacts("Tesla P100", (6, 0), 16 * GIB, 16 * GIB)
    found = only(cards.cards(other(cards=(p100,))))
    assert found.status == "problem"
    assert "compute capability 6.0, and torch 2.13.0+cu130 has kernels for sm_75" in found.text


@pytest.mark.parametrize(
    ("capability", "served"),
    [
        ((7, 5), True),
        ((8, 9), True),
        ((9, 0), True),
        ((12, 1), True),
        ((13, 0), True),
        ((7, 0), False),
        ((10, 0), False),
    ],
)
def test_which_cards_kernels_run_on(capability: tuple[int, int], served: bool) -> None:
    assert cards.serves(FACTS.architectures, capability) is served


def test_nvidia_smi_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = "| NVIDIA-SMI 535.104.05   Driver Version: 535.104.05   CUDA Version: 12.2     |"
    monkeypatch.setattr(cards, "_nvidia_smi", lambda: line)
    assert cards.nvidia_driver() == ("535.104.05", "12.2")
    monkeypatch.setattr(cards, "_nvidia_smi", lambda: None)
    file = tmp_path / "version"
    monkeypatch.setattr(cards, "_DRIVER_FILE", file)
    assert cards.nvidia_driver() == (None, None)
    file.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.14  Thu Feb 22\nGCC version: 12.2.0")
    assert cards.nvidia_driver() == ("550.54.14", None)


# ---- releases

WANTED = {
    name: (Requirement(line), always)
    for name, line, always in [("torch", "torch>=2.11", True), ("trl", "trl>=1.9", False), ("numpy", "numpy", True)]
}


def statuses(found: dict[str, str]) -> dict[str, str]:
    return {finding.topic: finding.status for finding in packages.releases(found, WANTED, "3.12.1")}


def test_releases_in_and_outside_of_what_is_asked_for() -> None:
    fine = {"torch": "2.13.0+cpu", "trl": "1.16.0", "numpy": "2.0"}
    assert statuses(fine) == {"python": "ok", "torch": "ok", "trl": "ok"}
    found = {f.topic: f for f in packages.releases({"torch": "2.10.0", "trl": "1.5.0"}, WANTED, "3.12.1")}
    assert {topic: finding.status for topic, finding in found.items()} == {
        "python": "ok",
        "torch": "problem",
        "trl": "problem",
        "numpy": "problem",
    }
    assert found["trl"].command == 'pip install "trl>=1.9"'
    assert found["numpy"].command == 'pip install "numpy"'


def test_what_only_commands_need_may_be_missing() -> None:
    found = {f.topic: f for f in packages.releases({"torch": "2.13.0", "numpy": "2.0"}, WANTED, "3.12.1")}
    assert (found["trl"].status, found["trl"].command) == ("note", 'pip install "hf-galore[cli]"')


def test_what_pyproject_asks_for_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["torch>=2.11.0", "trl>=1.9.0; extra == 'cli'", "pytest>=8; extra == 'dev'"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert {name: always for name, (_, always) in packages.asked_for().items()} == {"torch": True, "trl": False}


def test_a_package_that_was_upgraded_under_a_notebook() -> None:
    modules = {
        "torch": SimpleNamespace(__version__="2.9.0+cu126"),
        "trl": SimpleNamespace(__version__="1.16.0"),
        "peft": SimpleNamespace(__version__="1.0"),
    }
    # The metadata of a wheel may leave out the local part.
    found = packages.loaded_others({"torch": "2.13.0", "trl": "1.16.0", "peft": "1.0+local", "datasets": "5"}, modules)
    finding = only(found)
    assert (finding.topic, finding.status) == ("torch", "problem")
    assert "2.9.0+cu126 is loaded, but 2.13.0 is installed" in finding.text
    assert "Restart session" in str(finding.advice)


@pytest.mark.parametrize(
    ("torch_release", "vision", "wants", "status"),
    [
        ("2.13.0+cu130", "0.28.0+cu130", "torch==2.13.0", "ok"),
        ("2.13.0", "0.28.0", "torch==2.13.0", "ok"),
        ("2.13.0", "0.28.0+cu130", "torch==2.13.0", "ok"),
        ("2.13.0+cu130", "0.24.0+cu126", "torch==2.9.0", "problem"),
        ("2.13.0+cu130", "0.28.0+cpu", "torch==2.13.0", "problem"),
    ],
)
def test_torchvision_is_built_for_one_torch(torch_release: str, vision: str, wants: str, status: str) -> None:
    releases = {"torch": torch_release, "torchvision": vision}
    found = only(packages.built_for_another_torch(releases, {"torchvision": ["numpy", wants]}))
    assert found.status == status
    if status == "problem":
        assert found.command == "pip uninstall -y torchvision"
        assert "torchvision::nms" in found.text


# ---- kernels


def test_kernels_that_are_right(caplog: pytest.LogCaptureFixture) -> None:
    found = only(kernels("cpu"))
    assert found.status == "ok"
    assert f"all {len(bitsandbytes_checks.CHECKS)} checked on the CPU" in found.text


def test_a_kernel_that_is_wrong_is_a_note_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(device: torch.device, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        yield torch.tensor([dtype != torch.bfloat16])

    monkeypatch.setattr(bitsandbytes_checks, "_verdicts", {})
    monkeypatch.setattr(bitsandbytes_checks, "_warned", set())
    monkeypatch.setitem(bitsandbytes_checks.CHECKS, "dequantize_4bit", wrong)
    with caplog.at_level(logging.WARNING):
        found = only(kernels("cpu"))
    assert found.status == "note"
    assert "not right, or failing: from 4 bits (bfloat16)." in found.text
    assert "gives wrong results in bfloat16" in found.text
    assert caplog.records == []


# ---- the Hub


def response(status: int) -> Any:
    """What is used of an answer; which library it is of depends on the release of huggingface_hub."""
    return SimpleNamespace(status_code=status, headers={}, request=None)


def test_nothing_is_asked_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(hub, "answer", lambda question: pytest.fail("it was asked"))
    found = only(hub.hub("some/model"))
    assert (found.status, found.text) == ("note", "HF_HUB_OFFLINE is set, so nothing was asked; nobody has logged in.")


def test_nobody_has_logged_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    monkeypatch.setattr(hub, "answer", lambda question: GatedRepoError("gated", response=response(403)))
    login, model = hub.hub("meta-llama/Llama-2-7b-hf")
    assert (login.status, login.command) == ("note", "hf auth login")
    assert model.status == "problem"
    assert "meta-llama/Llama-2-7b-hf has a licence that this account has not accepted" in model.text
    assert "https://huggingface.co/meta-llama/Llama-2-7b-hf" in str(model.advice)


def test_answers_of_the_hub() -> None:
    assert hub.login({"name": "somebody"}).text == "logged in as somebody"
    assert hub.login(HfHubHTTPError("no", response=response(401))).status == "problem"
    assert hub.login(HfHubHTTPError("down", response=response(503))).status == "note"
    assert hub.login(TimeoutError()).status == "note"
    assert hub.access("a/b", None).status == "ok"
    assert hub.access("a/b", RepositoryNotFoundError("no", response=response(404))).status == "problem"
    assert hub.access("a/b", ConnectionError()).status == "note"


def test_a_model_that_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "answer", lambda question: None)
    need_model("a/b")
    monkeypatch.setattr(hub, "answer", lambda question: TimeoutError())
    need_model("a/b")  # whether it is in the cache is for who loads it
    monkeypatch.setattr(hub, "answer", lambda question: GatedRepoError("gated", response=response(403)))
    with pytest.raises(
        UserError, match=r"^a/b has a licence .* Accept it at https://huggingface\.co/a/b, and log in: hf"
    ):
        need_model("a/b")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    need_model("a/b")


def test_an_answer_is_not_waited_for() -> None:
    start = time.monotonic()
    assert isinstance(hub.answer(lambda: time.sleep(20), timeout=0.05), TimeoutError)
    assert time.monotonic() - start < 10
    assert hub.answer(lambda: 7) == 7


# ---- the machine


@pytest.mark.parametrize(("free", "status"), [(100, "ok"), (20, "note"), (0.5, "problem")])
def test_room_on_the_disk(free: float, status: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=int(free * GIB)))
    assert machine.disk("disk", tmp_path / "not" / "yet").status == status


def test_whose_notebook_it_is() -> None:
    assert machine.hosted({"COLAB_RELEASE_TAG": "x"}) == "Colab"
    assert machine.hosted({"KAGGLE_KERNEL_RUN_TYPE": "Interactive"}) == "Kaggle"
    assert machine.hosted({}) is None
    assert machine.system("Colab", "Tesla T4").text.startswith("Colab (Tesla T4); ")


def test_the_allocators_setting_is_the_one_that_commands_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "supported", lambda: True)
    monkeypatch.setattr("hf_galore.expandable_segments.supported", lambda: True)
    assert machine.segments({}).status == "ok"
    off = machine.segments({VARIABLE: "max_split_size_mb:128"})
    assert off.status == "note"
    assert "expandable_segments:True" in str(off.advice)


# ---- the report


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = report()
    text = str(found)
    topics = [finding.topic for finding in found.findings]
    assert topics[0] == "system"
    assert {"python", "torch", "transformers", "bitsandbytes", "kernels", "memory", "disk", "Hub's cache", "Hub"} <= {
        *topics
    }
    assert torch.__version__ in text
    assert [finding for finding in found.problems if finding.topic in ("kernels", "torch")] == []
    assert max(len(line) for line in text.splitlines() if "http" not in line) <= 80
    assert text.splitlines()[-1].endswith("file's content.")
    assert json.loads(found.json())["findings"][0]["topic"] == "system"


@pytest.mark.parametrize(
    ("torch_is", "said"),
    [
        (
            "raise OSError('libcudart.so.13: cannot open it')",
            "cannot be used: OSError: libcudart.so.13: cannot open it",
        ),
        ("import os; os.abort()", "cannot be used: status -6"),
    ],
)
def test_a_broken_library_is_reported_and_the_rest_too(
    torch_is: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "torch.py").write_text(torch_is)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    found = report()
    assert [(finding.topic, finding.text) for finding in found.problems] == [("torch", said)]
    assert {"memory", "disk", "Hub"} <= {finding.topic for finding in found.findings}


def test_what_takes_too_long_is_reported() -> None:
    _, (found,) = look(None, timeout=0.01)
    assert (found.topic, found.status) == ("torch", "problem")


def test_the_process_that_asks_starts_no_cuda_and_imports_no_torch() -> None:
    code = "import sys; from hf_galore.doctor import report; print(report().short()); print('torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False"
    assert run.stderr == ""


def test_a_notebook_sees_the_card_and_what_stops_a_training() -> None:
    findings = (
        Finding("python", "ok", "3.12"),
        Finding("card", "ok", "Tesla T4"),
        Finding("bfloat16", "note", "not by this card"),
        Finding("disk", "note", "20 GiB free for /tmp"),
        Finding("trl", "problem", "1.5", None, "pip install trl"),
    )
    assert Report("here", findings).short().splitlines() == [
        "ok       card             Tesla T4",
        "note     bfloat16         not by this card",
        "problem  trl              1.5",
        "         pip install trl",
        "",
        "1 problem: trl.",
    ]


def test_a_report_is_read_and_its_commands_are_copied() -> None:
    command = 'pip install "torch==2.13.0+cu126" --index-url https://download.pytorch.org/whl/cu126'
    made = Report(
        "hf_galore 1", (Finding("torch", "problem", "word " * 30, "do this", command), Finding("a", "note", "b"))
    )
    lines = str(made).splitlines()
    assert lines[2].startswith("problem  torch            word word")
    assert f"         {command}" in lines
    assert "1 problem: torch." in lines[-2]
    assert not made.fine
    assert made.as_dict()["findings"][0]["command"] == command
