"""What stage two relies on inside torch, and what would go wrong in silence without it.

| hook                                    | without it                                             |
|-----------------------------------------|--------------------------------------------------------|
| TORCH_FORCE_WEIGHTS_ONLY_LOAD           | a checkpoint may run code when it is read              |
| classes in the directory of a checkpoint | none: an unknown one is an error (checkpoints.py)     |
"""

import functools
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from stages.train_student.compat.changed import changed

_changed = functools.partial(changed, "torch", "2.11 to 2.13")
WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
"""Environment variable of torch."""


@contextmanager
def weights_only() -> Iterator[None]:
    """In this context torch.load makes tensors and plain values alone, whatever its caller asks for.

    The Trainer asks for that itself, but torch.distributed.checkpoint, which reads what FSDP2 has written, does not.
    Raises PipelineError if torch does not heed it.
    """
    before = os.environ.get(WEIGHTS_ONLY)
    os.environ[WEIGHTS_ONLY] = "1"
    try:
        _require_refusal()
        yield
    finally:
        if before is None:
            del os.environ[WEIGHTS_ONLY]
        else:
            os.environ[WEIGHTS_ONLY] = before


def _require_refusal() -> None:
    """A harmless function, which torch.load of weights alone must not name."""
    file = io.BytesIO()
    torch.save(os.getcwd, file)
    file.seek(0)
    try:
        torch.load(file, weights_only=False)
    except pickle.UnpicklingError:
        return
    raise _changed(WEIGHTS_ONLY, "is not heeded; a checkpoint could run code when it is read")
