"""What a run leaves for `hf-galore compare`: what was asked for, in a file; time and memory, in the Trainer's log."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME

from ..integrations.int8_layers import layers_in_int8
from ..integrations.trainer import optim_name, register
from ..integrations.trainer_parts import TrainerParts
from ..plan.planner import GIB, MemoryPlan
from .model_card import add_galore
from .settings import RECIPE_FILE
from .whole_files import write_whole

RUN_FILE = "hf_galore_run.json"
"""In a run's `output_dir`; beside it the Trainer's `trainer_state.json`, which has the log."""

_PACKAGES = ("hf-galore", "torch", "transformers", "trl", "bitsandbytes")


@dataclasses.dataclass(frozen=True)
class RunFacts:
    """The facts of a run: its settings, and what is known at its end; `None` for what is not known, or not yet."""

    command: str
    """`hf-galore sft`, ..."""
    recipe: str | None
    model: str
    data: str | None
    optim: str
    optim_args: str | None
    optim_target_modules: str | list[str] | None
    learning_rate: float
    lora_rank: int | None
    """Of a run that trains adapters."""
    parameters: int
    trainable_parameters: int
    device: str
    """The GPU's name, or `cpu`."""
    versions: dict[str, str]
    started: str
    """ISO 8601, local time with its offset; of a resumed run, when it was resumed."""
    finished: bool = False
    optimizer_bytes: int | None = None
    """Bytes of the optimizer's state: moments, bases, steps."""
    settings: dict[str, Any] | None = None
    """All that the run was told, defaults too; see `settings.settings_of`."""

    @classmethod
    def read(cls, folder: Path) -> RunFacts | None:
        """The facts of the run in `folder`; `None` where another program made it.

        Raises:
            ValueError: the file is not one of ours.
        """
        try:
            text = (folder / RUN_FILE).read_text(encoding="utf-8")
        except FileNotFoundError:
            return None
        try:
            return cls(**json.loads(text))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / RUN_FILE} cannot be read: {error}") from error

    def write(self, folder: Path) -> None:
        """Write the facts into a folder, which has to be there."""
        write_whole(folder / RUN_FILE, json.dumps(dataclasses.asdict(self), indent=2) + "\n")


class RecordedTrainer(TrainerParts, Trainer):  # type: ignore[misc, unused-ignore]
    """Mixed into a Trainer: its log also has `step_seconds`, `tokens_per_second` and `peak_memory_gib`.

    - `step_seconds`: of a step since the last log, with loading the data, without evaluations and checkpoints.
    - `tokens_per_second`: in that time, where the Trainer counts `num_tokens`, which go on in a resumed run.
    - `peak_memory_gib`: the most so far; on a GPU of what torch's allocator gave out, else of the process.

    From `record()` on: until then, and in a plan, it is the Trainer that it is mixed into. Its model card says how
    GaLore was used, if it was. Every Trainer of a recipe is one: making it registers the optimizers.
    """

    memory_plan: MemoryPlan | None = None
    """For the model card."""
    before_record: Callable[[], None] | None = None
    """Called before the record is written, by one process."""
    _facts: RunFacts | None = None
    _recipe_text: str | None = None
    _clock: StepClock | None = None

    def __init__(self, *, args: TrainingArguments, **others: Any) -> None:
        register()  # the galore_* names, whatever was imported to get here
        if args.device.type == "cpu":
            args.dataloader_pin_memory = False  # there is no device to copy to
        super().__init__(args=args, **others)

    def record(
        self,
        command: str,
        recipe: Path | None,
        model: str,
        data: str | None,
        settings: dict[str, Any] | None = None,
        recipe_text: str | None = None,
    ) -> None:
        """Note what the training to come is, and log its time and memory. Nothing is written before it begins.

        Args:
            command: `hf-galore sft`, ...
            recipe: its file, if there is one.
            model: what is trained.
            data: what it is trained on.
            settings: all that the run is told.
            recipe_text: a recipe that runs again, to be written beside the record.
        """
        args, model_of = self.args, self.model
        adapters = getattr(model_of, "peft_config", {})
        self._facts = RunFacts(
            command=command,
            recipe=None if recipe is None else recipe.name,
            model=model,
            data=data,
            optim=optim_name(args),
            optim_args=args.optim_args,
            optim_target_modules=args.optim_target_modules,
            learning_rate=args.learning_rate if settings is None else settings["learning_rate"],
            lora_rank=next((config.r for config in adapters.values() if hasattr(config, "r")), None),
            parameters=sum(param.numel() for param in model_of.parameters()),
            trainable_parameters=sum(param.numel() for param in model_of.parameters() if param.requires_grad),
            device=torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else args.device.type,
            versions={name: _version(name) for name in _PACKAGES},
            settings=settings,
            started=datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        )
        self._recipe_text = recipe_text
        self._clock = StepClock(self)
        self.add_callback(self._clock)

    def begin_record(self) -> None:
        """Write the record. Called when training begins: a mistake that ends the run before leaves nothing."""
        if self._facts is not None and self.is_world_process_zero():
            if self.before_record is not None:
                self.before_record()
            self._facts.write(Path(self.args.output_dir))
            if self._recipe_text is not None:
                write_whole(Path(self.args.output_dir) / RECIPE_FILE, self._recipe_text)

    def save_record(self) -> None:
        """Write the Trainer's log, and into the record that the run is finished. Called after the training."""
        self.save_state()
        if self._facts is not None and self.is_world_process_zero():
            finished = dataclasses.replace(self._facts, finished=True, optimizer_bytes=optimizer_bytes(self.optimizer))
            finished.write(Path(self.args.output_dir))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log with time and memory."""
        if self._clock is not None and "loss" in logs:
            logs.update(self._clock.figures(self.state.global_step))
        super().log(logs, start_time)

    def before_checkpoint(self, folder: Path) -> None:
        """Remove from a checkpoint of the same step, of an older run, the file that is written last.

        Killed in between, the run would otherwise leave files of both checkpoints, each of them whole.
        """
        (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write the model card, with a section on how GaLore was used."""
        super().create_model_card(*args, **kwargs)
        if self.is_world_process_zero():
            add_galore(
                Path(self.args.output_dir) / "README.md",
                self.args,
                self.memory_plan,
                int8=bool(layers_in_int8(self.model)),
            )


class StepClock(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Time steps on the host. A log waits for the device: between two logs the host takes as long as the device."""

    def __init__(self, trainer: RecordedTrainer) -> None:
        self._trainer = trainer
        self._device = trainer.args.device
        self._start = time.perf_counter()
        self._paused_at: float | None = None
        self._steps = self._tokens = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)
        self._trainer.trained_tokens = state.num_input_tokens_seen  # of a resumed run, those before
        self._steps, self._tokens = state.global_step, self._trainer.trained_tokens
        self._start = self._paused_at = time.perf_counter()  # an evaluation may come first
        self._trainer.begin_record()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._paused_at is not None:
            self._start += time.perf_counter() - self._paused_at
            self._paused_at = None

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if args.include_num_input_tokens_seen == "no":  # or else the Trainer counts them itself
            state.num_input_tokens_seen = self._trainer.trained_tokens
        if control.should_evaluate or control.should_save:
            self._paused_at = time.perf_counter()

    def figures(self, step: int) -> dict[str, float]:
        """Return time and tokens of the steps since the last call, and the peak of memory so far."""
        figures: dict[str, float] = {}
        now, tokens = time.perf_counter(), self._trainer.trained_tokens
        if step > self._steps:
            figures["step_seconds"] = (now - self._start) / (step - self._steps)
        if tokens > self._tokens:
            figures["tokens_per_second"] = (tokens - self._tokens) / (now - self._start)
        peak = peak_memory_bytes(self._device)
        if peak is not None:
            figures["peak_memory_gib"] = peak / GIB
        self._start, self._steps, self._tokens = now, step, tokens
        if self._paused_at is not None:
            self._paused_at = now
        return figures


def optimizer_bytes(optimizer: Any) -> int | None:
    """The bytes of all tensors in an optimizer's state; `None` where there is no optimizer."""
    if optimizer is None:
        return None
    return sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )


def peak_memory_bytes(device: torch.device) -> int | None:
    """The most memory so far: on a GPU of tensors, elsewhere of the process; `None` where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    system = platform.system()
    if system == "Linux":
        # Not getrusage's: that of a process begins with its parent's.
        status = Path("/proc/self/status").read_text(encoding="ascii")
        found = next((line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:")), None)
        return None if found is None else 1024 * int(found)
    if system == "Darwin":
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
