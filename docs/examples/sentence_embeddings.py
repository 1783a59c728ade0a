"""Train all weights of an embedding model with sentence-transformers.

python docs/examples/sentence_embeddings.py                                          # a tiny BERT, random weights
python docs/examples/sentence_embeddings.py sentence-transformers/all-MiniLM-L6-v2
"""

from __future__ import annotations

import argparse
import random
import tempfile
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

import hf_galore  # noqa: F401  (registers the optimizers)


def make_trainer(model: SentenceTransformer, data: Any, loss: Any, folder: str, **others: Any) -> Any:
    """A trainer of all weights of an embedding model, and of those of its losses."""
    settings = {
        "optim": "galore_adamw_8bit_layerwise",
        "optim_target_modules": "all-linear",
        "optim_args": "rank=8, update_proj_gap=4, scale=1",
        "learning_rate": 1e-3,
        "learning_rate_mapping": {r"embeddings\.": 1e-4},  # names of parameters, by regular expressions
        "per_device_train_batch_size": 8,
        "max_steps": 8,
        **others,
    }
    args = SentenceTransformerTrainingArguments(folder, **settings)
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=data, loss=loss)


WORDS = 95


def tiny_model() -> SentenceTransformer:
    """A BERT of two layers that knows the words w0 to w94."""
    torch.manual_seed(0)
    folder = tempfile.mkdtemp()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = special + [f"w{number}" for number in range(WORDS)]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = [f"{word[1:-1].lower()}_token" for word in special]
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, special, strict=True)))
    fast.save_pretrained(folder)
    BertModel(
        BertConfig(
            vocab_size=len(words),
            hidden_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=64,
            max_position_embeddings=32,
        )
    ).save_pretrained(folder)
    return SentenceTransformer(modules=[Transformer(folder, max_seq_length=16), Pooling(32)], device="cpu")


def tiny_pairs(rows: int = 64) -> Dataset:
    """Sentences, and the same in another order."""
    generator = random.Random(0)
    anchors = [[f"w{generator.randrange(WORDS)}" for _ in range(6)] for _ in range(rows)]
    positives = [generator.sample(words, len(words)) for words in anchors]
    return Dataset.from_dict({"anchor": [" ".join(w) for w in anchors], "positive": [" ".join(w) for w in positives]})


def main() -> None:
    """Run by hand."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="a name on the Hub or a folder; without it a tiny model")
    name = parser.parse_args().model
    model = tiny_model() if name is None else SentenceTransformer(name)
    loss = MultipleNegativesRankingLoss(model)
    make_trainer(model, tiny_pairs(), loss, tempfile.mkdtemp(), logging_steps=1, report_to="none").train()


if __name__ == "__main__":
    main()
