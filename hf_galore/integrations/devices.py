"""Which device a Trainer without a launcher trains on: one, where the libraries would take all that are visible.

With two GPUs and one process transformers' Trainer wraps the model in `nn.DataParallel`, which TRL's trainers refuse;
and TRL loads a model that it gets by name with `device_map="auto"`, over all GPUs, and the CPU where they do not do.
"""

from __future__ import annotations

from transformers import TrainingArguments
from transformers.training_args import ParallelMode

from ..log import logger


def keep_to_one_gpu(args: TrainingArguments, *, say: bool = True) -> None:
    """Let a Trainer with these arguments use one GPU, also where this process sees several; under a launcher it does.

    Args:
        args: changed.
        say: whether to say so, where there are several.
    """
    seen = args.n_gpu
    if seen <= 1:  # 0 without a GPU
        return
    # As the Trainer does with a model that a device_map spreads: there is no option for it.
    args._n_gpu = 1  # type: ignore[assignment, unused-ignore]
    if say:
        logger.info(
            "%d GPUs are visible; training on one, %s. For another set CUDA_VISIBLE_DEVICES; for all of them start "
            "torchrun --nproc_per_node %d -m hf_galore with the same arguments.",
            seen,
            args.device,
            seen,
        )


def say_global_batch(args: TrainingArguments) -> None:
    """Say how many rows a step trains on where several processes train together: a recipe has those of one device."""
    if args.world_size == 1 or args.process_index != 0:
        return
    if args.accelerator_config.split_batches:  # accelerate divides each batch among the processes
        logger.info("%d processes train together, and divide each batch of rows among them.", args.world_size)
        return
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    logger.info(
        "%d processes train together: a step has %d rows, of per_device_train_batch_size %d x "
        "gradient_accumulation_steps %d x %d processes.",
        args.world_size,
        rows,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.world_size,
    )


def one_device_map(args: TrainingArguments) -> dict[str, str] | None:
    """The `device_map` that loads a whole model onto the device of training; `None` where the Trainer moves it there.

    Under a launcher, and on a CPU, nothing is to be mapped.
    """
    device = args.device
    if args.parallel_mode == ParallelMode.DISTRIBUTED or device.type in ("cpu", "mps"):
        return None
    return {"": str(device)}
