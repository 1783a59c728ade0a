"""What holds for every test: no network, one thread unless HF_GALORE_TEST_THREADS says more, one seed."""

from __future__ import annotations

import gc
import importlib
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Before anything imports transformers, which reads them once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import hypothesis
import pytest
import torch

if TYPE_CHECKING:
    from hf_galore.recipes.embedded_model import Embedded

# pytest-xdist fills the cores; tests/test_machines.py asks for more.
torch.set_num_threads(int(os.environ.get("HF_GALORE_TEST_THREADS", "1")))

# A busy machine is no failure, and a failure prints how to repeat it.
hypothesis.settings.register_profile("tests", deadline=None, print_blob=True)
hypothesis.settings.load_profile("tests")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run files with slow tests first: where one of them is the last test of all, other cores wait for its end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)  # whole files, whose fixtures stay made once


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _forgetful_bitsandbytes() -> Iterator[None]:
    """Let bitsandbytes forget its overrides: it keeps them by the addresses of parameters, which later ones have too.

    A Trainer with one of its optimizers has embeddings trained in 32 bits, and so was then another test's matrix.
    """
    yield
    module = sys.modules.get("bitsandbytes.optim.optimizer")
    if module is not None:
        module.GlobalOptimManager._instance = None


@pytest.fixture(scope="session", autouse=True)
def _frozen_imports() -> None:
    """Keep what the libraries have made out of garbage collections: a Trainer asks for one at each end of training."""
    # On some processors it warns where it is imported, and some test would take that for a warning of ours.
    importlib.import_module("bitsandbytes")
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Embedded:
    """Folders with the embedded model and its conversations."""
    from hf_galore.recipes.embedded_model import CACHE_VARIABLE, embedded

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        return embedded()
