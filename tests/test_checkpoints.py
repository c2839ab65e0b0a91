"""Checkpoints as somebody else may have written them: nothing of them is run."""

import io
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from pipeline.errors import PipelineError
from pipeline.stores.sealed import write_json
from stages.train_student.checkpoints import MARK, newest_whole_checkpoint
from stages.train_student.compat.torch_hooks import weights_only

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # one process is all there is


class Evil:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return os.mkdir, (str(self.path),)


@pytest.fixture
def checkpoint(tmp_path):
    """A checkpoint whose optimizer is sharded, as FSDP2 leaves it."""
    folder = Path(tmp_path) / "checkpoint-3"  # a checkpoint names the class of its path
    state = {
        "weight": torch.arange(6.0),
        "lr": 0.5,
        "betas": (0.9, 0.99),
        "dtype": torch.zeros(2, dtype=torch.bfloat16),
    }
    save(state, storage_writer=FileSystemWriter(folder / "optimizer_0"), no_dist=True)
    write_json(folder / MARK, {"step": 3, "sums": [0.0] * 3, "good_steps": 0, "history": []})
    return folder


def test_sharded_checkpoint_is_read_by_plain_classes_alone(checkpoint):
    assert newest_whole_checkpoint(checkpoint.parent) == checkpoint
    state = {"weight": torch.zeros(6), "lr": 0.0, "betas": (0.0, 0.0)}
    with weights_only():
        load(state, storage_reader=FileSystemReader(checkpoint / "optimizer_0"), no_dist=True)
    assert state["weight"].tolist() == list(range(6))
    assert (state["lr"], state["betas"]) == (0.5, (0.9, 0.99))


@pytest.mark.parametrize("kind", ["function", "nested", "damaged", "empty"])
def test_directory_that_names_a_function_is_refused(checkpoint, tmp_path, kind):
    path = checkpoint / "optimizer_0" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    metadata.planner_data = Evil(tmp_path / "pwned")
    contents = {"function": pickle.dumps(Evil(tmp_path / "pwned")), "nested": pickle.dumps(metadata)}
    path.write_bytes(contents.get(kind, {"damaged": path.read_bytes()[:-30], "empty": b""}.get(kind)))
    with pytest.raises(PipelineError, match=r"\.metadata: not the directory of a checkpoint"):
        newest_whole_checkpoint(checkpoint.parent)
    assert not (tmp_path / "pwned").exists()


def test_values_of_a_sharded_checkpoint_are_not_run(tmp_path):
    """torch.distributed.checkpoint asks torch.load for any pickle; the context does not let it."""
    folder = tmp_path / "optimizer_0"
    save({"lr": Evil(tmp_path / "pwned")}, storage_writer=FileSystemWriter(folder), no_dist=True)
    with weights_only(), pytest.raises(CheckpointException, match="Weights only load failed"):
        load({"lr": 0.0}, storage_reader=FileSystemReader(folder), no_dist=True)
    assert not (tmp_path / "pwned").exists()


def test_context_is_left_as_it_was_found(monkeypatch, tmp_path):
    evil = io.BytesIO()
    torch.save(Evil(tmp_path / "pwned"), evil)
    for value in (None, "0"):
        monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
        if value is not None:
            monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", value)
        with weights_only(), pytest.raises(pickle.UnpicklingError):
            torch.load(io.BytesIO(evil.getvalue()), weights_only=False)
        assert os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD") == value
    assert not (tmp_path / "pwned").exists()


def test_renamed_checkpoint_is_refused(checkpoint):
    checkpoint.rename(checkpoint.with_name("checkpoint-9"))
    with pytest.raises(PipelineError, match=r"is the mark of step 3; the checkpoint was renamed"):
        newest_whole_checkpoint(checkpoint.parent)
