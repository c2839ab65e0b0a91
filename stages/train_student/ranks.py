"""The ranks of a run under torchrun."""

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from stages.train_student.compat import accelerate_hooks

Value = TypeVar("Value")


def world_size() -> int:
    """How many ranks torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """The number of this one."""
    return int(os.environ.get("RANK", "0"))


@contextmanager
def own_process_group() -> Iterator[None]:
    """Destroys the ranks' process group at the end, unless it was there before.

    Its native threads would outlive the interpreter and now and then abort the process (exit code -6).
    They end with the last reference to the group; the model has one, and an error's traceback has the model.
    """
    found = torch.distributed.is_initialized()
    try:
        yield
    except BaseException as error:
        if torch.distributed.is_initialized() and not found:
            traceback.clear_frames(error.__traceback__)
        raise
    finally:
        if torch.distributed.is_initialized() and not found:
            gc.collect()
            torch.distributed.destroy_process_group()
            accelerate_hooks.forget()


def from_all_ranks(value: Value) -> list[Value]:
    """What every rank gives, in their order; a collective."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def on_any_rank(flag: bool) -> bool:
    """Whether the flag is set on any rank; a collective."""
    return any(from_all_ranks(flag))
