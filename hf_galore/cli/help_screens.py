"""What the first screens of help say: for each command the options that matter, with defaults, and examples.

The defaults are those of the libraries; tests compare them with the parser's.
"""

from __future__ import annotations

from typing import NamedTuple


class Option(NamedTuple):
    """An option on a first screen."""

    name: str
    text: str
    default: str = ""
    """What it is where nobody says anything, if that is to be shown; of a command's own option what it takes."""


class Screen(NamedTuple):
    """The first screen of a command's help, without GaLore's keys, which all have."""

    usage: str
    about: str
    keys: tuple[Option, ...]
    """Of recipes, and of the command line."""
    examples: tuple[str, ...]
    own: tuple[Option, ...] = ()
    """Of the command line only."""

    @property
    def options(self) -> tuple[Option, ...]:
        """All that the screen shows, in its order."""
        return self.own + self.keys


_RECIPE = "FILE, a recipe, has 'key: value' lines with these keys; --key value overrides it."

_MODEL = Option("model_name_or_path", "name on the Hub, or a folder")
_OUTPUT = Option("output_dir", "for checkpoints, the log and the model")
_OPTIM = (
    Option("optim", "galore_adamw_8bit_layerwise for least memory"),
    Option("optim_target_modules", "what is projected: attn mlp, or all-linear"),
    Option("optim_args", "GaLore's keys, below, in quotes"),
)
LONGER = {
    "optim": (
        "GaLore's are galore_adamw, galore_adamw_8bit (moments in 8 bits) and galore_adafactor, and each with "
        "_layerwise behind it, which updates weights during the backward pass: galore_adamw_8bit_layerwise needs the "
        "least memory. Any other optimizer of the Trainer's may stand here too: adamw_torch, adamw_bnb_8bit, ..."
    ),
    "optim_target_modules": (
        "The weights that are projected, by parts of their names: --optim_target_modules attn mlp. Or one regular "
        "expression for whole names, in quotes; or all-linear, for linear layers, experts, convolutions and the like, "
        "but the output head. The rest trains full-rank. In a recipe: optim_target_modules: [attn, mlp]."
    ),
    "optim_args": (
        "GaLore's keys, as one text in quotes: --optim_args 'rank=256, scale=1'. In a recipe: optim_args: {rank: 256, "
        "scale: 1}. The keys are below; --help rank explains one."
    ),
}
"""What `--help NAME` says of an option, where the library that has it means other things by it, too."""

_RATE = "its schedule: lr_scheduler_type, warmup_steps"
_BATCH = (
    Option("per_device_train_batch_size", "rows of a micro-batch", "8"),
    Option("gradient_accumulation_steps", "micro-batches of a step", "1"),
)
_EPOCHS = Option("num_train_epochs", "or --max_steps, in place of it", "3")
_LENGTH = Option("max_length", "tokens of a row; what is longer is cut off", "1024")
_CLIPPING = Option("max_grad_norm", "clipping; 0 saves memory where layerwise", "1")
_EVALUATION = Option("eval_strategy", "epoch or steps: when the held-out loss is due", "no")
_SAVING = Option("save_steps", "from one checkpoint to the next", "500")
_FOLDER = (
    Option("resume_from_checkpoint", "go on from the last whole checkpoint"),
    Option("overwrite_output_dir", "remove the run that output_dir holds"),
    Option("dry_run", "all checks and the plan of memory, then stop"),
)

SCREENS: dict[str, Screen] = {
    "sft": Screen(
        "hf-galore sft --config FILE [--key value ...]",
        f"Fine-tune a model. {_RECIPE}",
        (
            _MODEL,
            Option("dataset_name", "name on the Hub, or a folder of .jsonl files"),
            _OUTPUT,
            *_OPTIM,
            Option("learning_rate", _RATE, "2e-05"),
            *_BATCH,
            _EPOCHS,
            _LENGTH,
            _CLIPPING,
            _EVALUATION,
            _SAVING,
            *_FOLDER,
        ),
        (
            "  hf-galore sft --config qwen3_8b_oasst2.yaml --learning_rate 2e-5",
            "  hf-galore sft --model_name_or_path Qwen/Qwen3-0.6B --dataset_name folder \\",
            "    --optim galore_adamw_8bit_layerwise --optim_target_modules attn mlp \\",
            "    --optim_args 'rank=256, scale=1' --output_dir out",
        ),
    ),
    "dpo": Screen(
        "hf-galore dpo --config FILE [--key value ...]",
        f"Teach a model which of two answers is preferred. {_RECIPE}",
        (
            _MODEL,
            Option("dataset_name", "with chosen, rejected and, best, prompt"),
            _OUTPUT,
            *_OPTIM,
            Option("learning_rate", _RATE, "1e-06"),
            Option("beta", "how dear it is to leave the reference", "0.1"),
            Option("precompute_ref_log_probs", "true: no copy of the model in memory"),
            *_BATCH,
            _EPOCHS,
            Option("max_length", "tokens of a prompt and answer; cut", "1024"),
            _CLIPPING,
            _EVALUATION,
            _SAVING,
            *_FOLDER,
        ),
        (
            "  hf-galore dpo --config dpo/qwen3_0.6b_ultrafeedback.yaml",
            "  hf-galore dpo --model_name_or_path out --dataset_name data --output_dir new \\",
            "    --optim galore_adamw_layerwise --optim_target_modules attn mlp",
        ),
    ),
    "pretrain": Screen(
        "hf-galore pretrain --config FILE [--key value ...]",
        f"Train a language model from scratch. {_RECIPE}",
        (
            Option("config_name", "its shape: llama_60m, a name or a folder"),
            Option("tokenizer_name", "name on the Hub, or a folder"),
            Option("dtype", "of the weights: bfloat16 for large models", "float32"),
            Option("dataset_name", "name on the Hub, or a folder of text files"),
            _OUTPUT,
            *_OPTIM,
            Option("learning_rate", _RATE, "2e-05"),
            *_BATCH,
            _EPOCHS,
            _LENGTH,
            _CLIPPING,
            _EVALUATION,
            _SAVING,
            *_FOLDER,
        ),
        (
            "  hf-galore pretrain --config pretrain/llama_60m_c4.yaml",
            "  hf-galore pretrain --config pretrain/llama_60m_c4.yaml \\",
            "    --dataset_name folder_of_text --max_steps 2000 --output_dir out",
        ),
    ),
    "glue": Screen(
        "hf-galore glue --config FILE [FILE ...] [--key value ...]",
        f"Fine-tune a classifier, and show its scores. {_RECIPE}",
        (
            _MODEL,
            Option("task_name", "cola, stsb, mrpc, rte, sst2, mnli, qnli, qqp"),
            Option("train_file", "or your own: CSV or JSON with text and label"),
            Option("validation_file", "your own to score on"),
            Option("seeds", "1 2 3: a run for each, and their mean"),
            _OUTPUT,
            *_OPTIM,
            Option("learning_rate", _RATE, "5e-05"),
            *_BATCH,
            _EPOCHS,
            Option("max_length", "tokens of a text; longer ones are cut", "128"),
            _CLIPPING,
            Option("eval_strategy", "has to be epoch, or steps with eval_steps", "no"),
            *_FOLDER,
        ),
        (
            "  hf-galore glue --config glue/roberta_base_mrpc.yaml --seeds 1 2 3",
            "  hf-galore glue --config glue/roberta_base_sst2.yaml \\",
            "    --train_file train.csv --validation_file test.csv --output_dir out",
        ),
    ),
    "quickstart": Screen(
        "hf-galore quickstart [--key value ...]",
        "Train a small chat model on this machine, without downloads, and talk to it. It does what "
        "recipes/quickstart.yaml says, with a model and data that it makes; every key below can override that.",
        (
            Option("output_dir", "for the log and the model", "hf-galore-quickstart"),
            Option("optim", "or galore_adamw, ...", "galore_adamw_8bit_layerwise"),
            Option("optim_target_modules", "or all-linear", "attn mlp"),
            Option("optim_args", "'rank=64, update_proj_gap=100, scale=1'"),
            Option("learning_rate", "for random weights", "2e-3"),
            Option("per_device_train_batch_size", "rows of a step", "8"),
            Option("num_train_epochs", "or --max_steps", "7"),
            Option("max_length", "tokens of a row", "96"),
            Option("max_grad_norm", "clipping", "0"),
            Option("overwrite_output_dir", "remove what output_dir holds"),
        ),
        (
            "  hf-galore quickstart",
            "  hf-galore quickstart --max_steps 100 --optim_args 'rank=16, scale=1'",
        ),
    ),
    "plan": Screen(
        "hf-galore plan --config FILE [--vram CARD] [--key value ...]",
        "Find out whether a recipe of hf-galore sft, dpo, pretrain or glue fits a card, without a GPU, weights or "
        "data: its own training steps are gone through with tensors that have no numbers. The exit status is 0 if it "
        "fits or no card is known, 1 if it does not fit, 2 if something that was given is wrong.",
        (
            _MODEL,
            *_OPTIM,
            *_BATCH,
            _LENGTH,
            _CLIPPING,
            Option("activation_checkpointing", "false: faster, and more memory"),
        ),
        (
            "  hf-galore plan --config llama2_7b_oasst2.yaml --vram 4090",
            "  hf-galore plan --config llama2_7b_oasst2.yaml --vram 16GB --suggest",
            "  hf-galore plan --config llama3_70b_oasst2.yaml --num_processes 8 --sharded",
        ),
        (
            Option("vram", "name, label (24GB) or memory (23.5GiB)", "CARD"),
            Option("suggest", "ranks and batches that fit"),
            Option("json", "one JSON object on stdout"),
            Option("plot", "a picture of the memory (.png, .svg, .pdf)", "FILE"),
            Option("num_processes", "of each of N processes, under DDP", "N"),
            Option("sharded", "with that: under FSDP2"),
        ),
    ),
    "bench": Screen(
        "hf-galore bench [--config FILE] [--key value ...]",
        "Measure what this machine's GPU makes of a recipe of hf-galore sft, with random weights and tokens: seconds a "
        "step, tokens a second, memory beside its plan; and beside it, by turns, bitsandbytes' AdamW8bit and the "
        "Trainer's own GaLore. Nothing is downloaded or saved but a model's config that is not there.",
        (_MODEL, *_OPTIM, *_BATCH, _LENGTH),
        (
            "  hf-galore bench --layers 8 --markdown",
            "  hf-galore bench --small                 # to try it without a card",
        ),
        (
            Option("layers", "everything with so many layers", "N"),
            Option("rank", "another rank", "N"),
            Option("steps", "timed steps of a run", "N"),
            Option("rounds", "turns of each", "N"),
            Option("vram", "a smaller card than there is: 24GiB", "SIZE"),
            Option("svd", "the Trainer's own GaLore with its SVDs, too"),
            Option("json", "all figures", "FILE"),
            Option("markdown", "rows for docs/cards.md in place of tables"),
            Option("small", "a tiny model, on the CPU"),
        ),
    ),
}
"""Of each command that takes the keys of recipes."""
