"""Checkpoints that are whole: a mark is written when everything else of one is on the disk, on every rank.

Only marked ones are resumed from, and an older one goes only when a newer one has its mark.
"""

import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pipeline.documents import Count, printable
from pipeline.errors import PipelineError, fault_of_machine
from pipeline.files import sync_file
from pipeline.stores.sealed import read_document, write_json

MARK = "whole.json"
TORCH_WRITES = re.compile("PytorchStreamWriter|inline_container|iostream error")
"""In what torch says of a file that it cannot write."""
DIRECTORY_CLASSES = {
    "pathlib": ("PosixPath",),
    "torch": ("Size",),
    "torch.serialization": ("_get_layout",),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "_MEM_FORMAT_ENCODING"),
        *("BytesStorageMetadata", "ChunkStorageMetadata", "TensorStorageMetadata"),
    ),
}
"""What the directory of a sharded checkpoint is made of, beside dtypes (torch 2.11 to 2.13)."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """What a checkpoint holds beside the Trainer's own state, for a log that continues to the bit."""

    step: Count
    sums: list[float]
    """Of the loss terms since the last line of the log."""
    good_steps: Count
    history: list[float]
    """The latest losses, by which a bad one is told."""


class MarkWhole(TrainerCallback):
    """Marks every checkpoint after all ranks have written it; the mark holds what `extra` gives, too."""

    def __init__(self, keep: int, extra: Callable[[], dict[str, Any]]) -> None:
        self._keep, self._extra = keep, extra

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        """Flush the files of the newest checkpoint, mark it, and remove those that are too many."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        _wait_for_all_ranks()
        for path in folder.rglob("*"):
            if path.is_file():
                sync_file(path)
        _wait_for_all_ranks()
        if state.is_world_process_zero:
            write_json(folder / MARK, {"step": state.global_step, **self._extra()})
            for old in sorted(_whole_checkpoints(Path(args.output_dir)), key=_step)[: -self._keep]:
                (old / MARK).unlink()
                shutil.rmtree(old)
        _wait_for_all_ranks()  # torchrun ends the others when one leaves: not before the mark is there


@contextmanager
def whole_or_gone(folder: Path) -> Iterator[None]:
    """What was written of a checkpoint goes if the disk does not take all of it; raises PipelineError that says so.

    Torch writes in C++ and tells of a full disk as a position in a file that is not the expected one.
    """
    try:
        yield
    except Exception as error:
        reason = fault_of_machine(error) or (f"{error}." if TORCH_WRITES.search(str(error)) else None)
        if reason is None:
            raise
        shutil.rmtree(folder, ignore_errors=True)
        raise PipelineError(
            f"{folder}: cannot be written: {' '.join(reason.split())} The checkpoint before is whole: make room, and "
            "run the same command again."
        ) from error


def _wait_for_all_ranks() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def newest_whole_checkpoint(folder: Path) -> Path | None:
    """The checkpoint with the most steps that carries its mark; None if there is none."""
    newest = max(_whole_checkpoints(folder), key=_step, default=None)
    if newest is not None:
        read_mark(newest)
        require_plain_pickles(newest)
    return newest


def unpickling_problem(error: BaseException) -> str | None:
    """What a pickle was refused for; None if the error, which may have gone through ranks, is of another kind."""
    found = re.findall(r"UnpicklingError: *(.*)|(GLOBAL \S+)", f"{type(error).__name__}: {error}")
    return printable((found[-1][1] or found[-1][0])[:100]) if found else None


def require_plain_pickles(checkpoint: Path) -> None:
    """Raise PipelineError if the directory of a sharded checkpoint, which torch unpickles, names anything but its own
    classes: a pickle may name any function, and calls it."""
    for path in sorted(checkpoint.glob("*/.metadata")):
        with path.open("rb") as file:
            try:
                _PlainUnpickler(file).load()
            except Exception as exc:  # whatever damaged bytes make pickle raise
                raise PipelineError(f"{path}: not the directory of a checkpoint ({printable(str(exc))}).") from exc


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name) if module.partition(".")[0] in ("torch", "pathlib") else None
        is_known = name in DIRECTORY_CLASSES.get(module, ()) or isinstance(found, torch.dtype)
        if not is_known:
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return found


def read_mark(checkpoint: Path) -> Mark:
    """What the mark of a whole checkpoint holds."""
    mark = read_document(checkpoint / MARK, Mark, PipelineError)
    if mark.step != _step(checkpoint):
        raise PipelineError(f"{checkpoint / MARK}: is the mark of step {mark.step}; the checkpoint was renamed.")
    return mark


def remove_torn_checkpoints(folder: Path) -> None:
    """Delete the checkpoints that a killed run did not finish."""
    for path in _checkpoints(folder):
        if not (path / MARK).is_file():
            shutil.rmtree(path)


def _whole_checkpoints(folder: Path) -> list[Path]:
    return [path for path in _checkpoints(folder) if (path / MARK).is_file()]


def _checkpoints(folder: Path) -> list[Path]:
    return [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()]


def _step(path: Path) -> int:
    return int(path.name.removeprefix("checkpoint-"))
