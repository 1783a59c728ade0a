"""Models by name with random weights, made on the device: for measuring, which needs a model's shapes and no more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel


@contextlib.contextmanager
def random_weights(device: torch.device) -> Iterator[None]:
    """Within, `from_pretrained` of a language model reads its config only, and makes the weights on the device.

    Acts on the whole process, other threads too.
    """

    def from_config(
        cls: Any,
        /,
        name: Any,
        *args: Any,
        config: Any = None,
        dtype: Any = None,
        attn_implementation: str | None = None,
        **kwargs: Any,
    ) -> Any:
        config = config or AutoConfig.from_pretrained(name)
        config.use_cache = False
        if dtype is None or dtype == "auto":
            dtype = config.dtype or torch.float32
        with torch.device(device):
            return AutoModelForCausalLM.from_config(
                config,
                dtype=getattr(torch, dtype) if isinstance(dtype, str) else dtype,
                **({} if attn_implementation is None else {"attn_implementation": attn_implementation}),
            )

    with mock.patch.object(PreTrainedModel, "from_pretrained", classmethod(from_config)):
        yield
