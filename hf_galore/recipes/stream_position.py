"""Where in a stream a checkpoint was made, so that a resumed run goes on there without reading all that came before.

A Trainer skips what it has seen by reading it again: hours, after some billions of tokens. Here the place is kept in a
file of the checkpoint. It is exact, although batches are prefetched: places are noted by the row.
"""

from __future__ import annotations

import collections
import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..log import logger
from .whole_files import write_whole

POSITION_FILE = "stream_position.json"


class Positioned(torch.utils.data.IterableDataset[Any]):
    """The rows of a stream, repeated without end, with notes of the places of the last of them in the stream."""

    def __init__(self, stream: datasets.IterableDataset, rows_per_step: int) -> None:
        self._stream = stream.repeat(None)
        self._rows_per_step = rows_per_step
        # Of whole steps, the last ones: no loader reads more than a step and a batch ahead.
        self._notes: collections.deque[tuple[int, Any]] = collections.deque([(0, None)], maxlen=4)

    def __iter__(self) -> Iterator[Any]:
        rows, place = self._notes[-1]
        if place is not None:
            self._stream.load_state_dict(copy.deepcopy(place))
        for row in self._stream:
            rows += 1
            if rows % self._rows_per_step == 0:
                self._notes.append((rows, copy.deepcopy(self._stream.state_dict())))
            yield row

    def place_after(self, steps: int) -> Any:
        """The place after the rows of so many optimizer steps; `None` where it was not noted."""
        return dict(self._notes).get(steps * self._rows_per_step)

    def go_to(self, steps: int, place: Any) -> None:
        """Begin, when iterated over, where so many optimizer steps had ended."""
        self._notes.append((steps * self._rows_per_step, place))


class StreamPosition(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Write the place in the stream into each checkpoint."""

    def __init__(self, stream: Positioned) -> None:
        self._stream = stream

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        state.epoch = state.global_step / state.max_steps  # which a Trainer that skips nothing counts from the resume

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        place = self._stream.place_after(state.global_step)
        folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        if place is not None and state.is_world_process_zero and folder.is_dir():
            write_whole(folder / POSITION_FILE, json.dumps({"steps": state.global_step, "place": place}))


def keep_position(trainer: Trainer, resume_from: str | None) -> None:
    """Let a Trainer with a stream keep its place, and go to that of the checkpoint that it resumes from.

    Does nothing for a dataset that is no stream, which a Trainer skips over in no time, nor where worker processes read
    the stream: then the Trainer skips by reading.
    """
    stream, args = trainer.train_dataset, trainer.args
    if not isinstance(stream, datasets.IterableDataset) or args.dataloader_num_workers > 0:
        return
    positioned = Positioned(stream, args.train_batch_size * args.gradient_accumulation_steps * args.world_size)
    trainer.train_dataset = positioned
    trainer.add_callback(StreamPosition(positioned))
    if resume_from is not None:
        path = Path(resume_from) / POSITION_FILE
        if path.is_file():
            try:
                saved = json.loads(path.read_text(encoding="utf-8"))
                positioned.go_to(saved["steps"], saved["place"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                logger.warning("%s cannot be used (%r): what the run has seen is read again, to skip it.", path, error)
            else:
                args.ignore_data_skip = True
