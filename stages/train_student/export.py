"""Writing the finished student, whole, from however it was trained."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from pipeline.files import publish, sync_folder
from pipeline.progress import Reporter
from pipeline.tokenizer import misreading, save_tokenizer
from stages.train_student.compat.peft_hooks import merged
from stages.train_student.settings import TrainConfig


def write_student(
    trainer: Any,
    config: TrainConfig,
    tokenizer: Any,
    end_token_ids: Sequence[int],
    fresh_model: Callable[[], Any],
    reporter: Reporter,
) -> None:
    """The student with its adapters merged, and its tokenizer; called on every rank, written by the first.

    It stops to write at `end_token_ids`, if there are any. Sharded parameters are gathered on its CPU and put into what
    `fresh_model()` gives. The config, without which nothing loads the folder, comes last.
    """
    if trainer.is_fsdp_enabled:
        state = _gathered(trainer.model)
        if not trainer.is_world_process_zero():
            return
        model = fresh_model()
        model.load_state_dict(state)
    elif not trainer.is_world_process_zero():
        return
    else:
        model = trainer.accelerator.unwrap_model(trainer.model)
    folder = config.out
    with tempfile.TemporaryDirectory(dir=folder, prefix=".student-") as scratch:
        model = merged(model)
        _stop_at(model, end_token_ids)
        model.save_pretrained(scratch)
        save_tokenizer(tokenizer, Path(scratch), trust_remote_code=config.trust_remote_code)
        if problem := misreading(Path(scratch), trust_remote_code=config.trust_remote_code):
            reporter.note(
                f"{folder}: load this tokenizer with PreTrainedTokenizerFast: the class that AutoTokenizer takes for "
                f"the student's kind of model reads otherwise: {problem}"
            )
        for path in sorted(Path(scratch).iterdir(), key=lambda path: path.name == "config.json"):
            publish(path, folder / path.name)
    sync_folder(folder)


def _stop_at(model: Any, end_token_ids: Sequence[int]) -> None:
    generation = getattr(model, "generation_config", None)
    if generation is not None and end_token_ids:
        generation.eos_token_id = list(end_token_ids) if len(end_token_ids) > 1 else end_token_ids[0]


def _gathered(model: Any) -> dict[str, Any]:
    """The whole parameters on the CPU, one at a time; a collective call on every rank.

    torch's get_model_state_dict leaves the parameters of a CPU mesh sharded.
    """
    state = {}
    for name, value in model.state_dict().items():
        whole = value.full_tensor() if hasattr(value, "full_tensor") else value
        state[name] = whole.cpu() if torch.distributed.get_rank() == 0 else None
    return state
