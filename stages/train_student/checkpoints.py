"""Checkpoints that are whole: a mark is written when everything else of one is on the disk."""

import shutil
from pathlib import Path

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.errors import PipelineError
from pipeline.files import read_json, sync_file, write_json

MARK = "whole.json"


class MarkWhole(TrainerCallback):
    """Marks every checkpoint after the Trainer has written it."""

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Flush the files of the newest checkpoint and mark it."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            for path in folder.rglob("*"):
                if path.is_file():
                    sync_file(path)
            write_json(folder / MARK, {"step": state.global_step})


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps that carries its mark; None if there is none."""
    whole = [path for path in _checkpoints(folder) if (path / MARK).is_file()]
    if not whole:
        return None
    newest = max(whole, key=_step)
    read_json(newest / MARK, PipelineError)
    return newest


def remove_torn_checkpoints(folder: Path) -> None:
    """Delete the checkpoints that a killed run did not finish."""
    for path in _checkpoints(folder):
        if not (path / MARK).is_file():
            shutil.rmtree(path)


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
