"""Options by the names that other trainers and papers have for them: what is advised exists, and is what was meant."""

from __future__ import annotations

import pytest

from hf_galore.config import OPTIONS, GaLoreConfig
from hf_galore.errors import UserError
from hf_galore.recipes import sft
from hf_galore.synonyms import GALORE, GALORE_PHRASES, PHRASES, TRAINING

IN_OPTIM_ARGS = "is one of GaLore's arguments, which stand together in optim_args: "


def said(*arguments: str) -> str:
    with pytest.raises(UserError) as error:
        sft.parse(arguments, "hf-galore sft", "")
    return str(error.value)


@pytest.mark.parametrize(
    ("flag", "advice"),
    [
        ("--rank", f" rank {IN_OPTIM_ARGS}--optim_args 'rank=..., ...'"),
        ("--galore-rank", f" rank {IN_OPTIM_ARGS}--optim_args 'rank=..., ...'"),
        ("--update_proj_gpa", f" update_proj_gap {IN_OPTIM_ARGS}--optim_args 'update_proj_gap=..., ...'"),
        ("--lr", " Did you mean '--learning_rate'?"),
        ("--torch_dtype", " Did you mean '--dtype'?"),
        ("--batch_size", " Did you mean '--per_device_train_batch_size'?"),
        ("--batch-size", " Did you mean '--per_device_train_batch_size'?"),
        ("--model", " Did you mean '--model_name_or_path'?"),
        ("--max_seq_length", " Did you mean '--max_length'?"),
        ("--response_template", " Did you mean '--assistant_only_loss'?"),
        ("--setup-chat-format", " Did you mean '--chat_template_path'?"),
        ("--no_cuda", " Did you mean '--use_cpu'?"),
        ("--group_by_length", " It is train_sampling_strategy: group_by_length today."),
        ("--logging_dir", " It is an environment variable today: env: {TENSORBOARD_LOGGING_DIR: folder}."),
        ("--save_safetensors", " Weights are saved as safetensors always."),
        ("--device_map", " A model is trained on one GPU, which CUDA_VISIBLE_DEVICES chooses."),
        ("--vram", " It is one of hf-galore plan."),
        ("--learning_rat", " Did you mean '--learning_rate'?"),
        ("--apollo-scale", f" scale {IN_OPTIM_ARGS}--optim_args 'scale=..., ...'"),
        (
            "--density",
            " It is a share of a matrix's smaller side, where rank is a number: density=0.25 of 1024 is rank=256.",
        ),
        ("--layerwise", " Layerwise is a part of the optimizer's name: optim: galore_adamw_8bit_layerwise."),
        ("--xyzzy", ""),
    ],
)
def test_on_a_command_line(flag: str, advice: str) -> None:
    for arguments in ([flag, "8"], [f"{flag}=8"]):
        assert said(*arguments) == f"there is no option {flag}.{advice}"


def test_in_a_file(tmp_path: pytest.TempPathFactory) -> None:
    recipe = f"{tmp_path}/recipe.yaml"
    for line, advice in (
        ("lr: 1e-5", " Did you mean 'learning_rate'?"),
        ("galore_rank: 8", f" rank {IN_OPTIM_ARGS}optim_args: rank=..., ..."),
    ):
        with open(recipe, "w", encoding="utf-8") as file:
            file.write(line)
        assert said("--config", recipe) == f"{recipe}: there is no option {line.partition(':')[0]!r}.{advice}"


def test_in_optim_args() -> None:
    with pytest.raises(ValueError, match=r"GaLore has no argument 'r'; .* Did you mean 'rank'\?$"):
        GaLoreConfig.from_optim_args("r=8")
    with pytest.raises(ValueError, match=r"GaLore has no argument 'rnak'; .* Did you mean 'rank'\?$"):
        GaLoreConfig.from_optim_args("rnak=8")


@pytest.mark.parametrize(
    ("given", "advice"),
    [
        ("scale_type=tensor", "Did you mean 'scaling'?"),
        ("inactive_lr_scale=.1", "Did you mean 'residual_scale'?"),
        ("scale_front=true", "limited always, before scale: leave it out."),
        ("proj=random", "With scaling projections are random always"),
        ("momentum=0.9", "a key of parameter groups: {'rank': 128, 'rule': 'muon', 'momentum': 0.9}."),
    ],
)
def test_what_others_call_it_in_optim_args(given: str, advice: str) -> None:
    with pytest.raises(ValueError, match="GaLore has no argument") as error:
        GaLoreConfig.from_optim_args(given)
    assert advice in str(error.value)


def test_what_is_advised_exists_and_no_name_is_its_own_synonym() -> None:
    known = {name for part in sft.DATACLASSES for name in part.__dataclass_fields__}
    assert set(TRAINING.values()) <= known
    assert set(GALORE.values()) <= set(OPTIONS)
    others = [*TRAINING, *GALORE, *GALORE_PHRASES, *PHRASES]
    assert len(set(others)) == len(others)
    assert not {*others} & {*known, *OPTIONS}
