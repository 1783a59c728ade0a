"""Which command a recipe is for: its keys say so."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from .config_file import keys_given, read, take_config
from .folders import find_recipe, recipes_folder

QUICKSTART = "quickstart.yaml"
"""The recipe of `hf-galore quickstart`, in `recipes_folder()`."""

MARKS = {
    "pretrain": {"config_name"},
    "glue": {"task_name", "train_file"},
    "dpo": {
        *("beta", "ld_alpha", "label_smoothing", "loss_weights", "f_divergence_type", "f_alpha_divergence_coef"),
        *("discopop_tau", "use_weighting", "truncation_mode", "disable_dropout"),
        *("precompute_ref_log_probs", "precompute_ref_batch_size"),
        *("sync_ref_model", "ref_model_mixup_alpha", "ref_model_sync_steps"),
    },
    "sft": {"chat_template_path", "assistant_only_loss", "completion_only_loss", "packing", "dataset_kwargs"},
}
"""Keys that tell a recipe of this command from one of the next. A recipe without any of them is for `sft`."""


def command_of(path: Path) -> str:
    """The command that the recipe in a file is for: `pretrain`, `glue`, `dpo`, `quickstart` or `sft`.

    Raises:
        UserError: it cannot be read, or is no recipe.
    """
    keys = set(read(path))
    if path.name == QUICKSTART and "model_name_or_path" not in keys:
        return "quickstart"
    return _marked(keys)


def is_quickstart_recipe(path: Path | None) -> bool:
    """Whether a recipe's file is that of `hf-galore quickstart`, which comes with hf_galore."""
    return path is not None and path.resolve() == (recipes_folder() / QUICKSTART).resolve()


def command_for(arguments: Sequence[str]) -> str:
    """The command that `--config FILE --key value ...` are for: `pretrain`, `glue`, `dpo` or `sft`.

    Raises:
        UserError: the file cannot be read, or is no recipe.
    """
    name, rest = take_config(arguments)
    keys = set() if name is None else set(read(find_recipe(name)))
    return _marked({*keys, *keys_given(rest)})


def _marked(keys: Iterable[str]) -> str:
    return next((command for command, marks in MARKS.items() if not marks.isdisjoint(keys)), "sft")
