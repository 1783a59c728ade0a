"""The tokenizer that stands in for a model's."""

from __future__ import annotations

import copy

from transformers import LlamaConfig, PreTrainedTokenizerFast

from hf_galore.recipes.stand_in import tokenizer_for


def test_its_vocabulary_at_hand_is_its_vocabulary() -> None:
    tokenizer = tokenizer_for(LlamaConfig(vocab_size=300))
    assert len(tokenizer) == 300
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    for one in (tokenizer, copy.deepcopy(tokenizer)):
        assert one.vocab == PreTrainedTokenizerFast.get_vocab(tokenizer)
        assert len(one.vocab) == len(one) == 302
