"""A rank of train-student that something happens to; run by test_train_ranks.py under torchrun.

    python -m torch.distributed.run ... -m tests.support.ranks SETTINGS.yaml [RANK STEP WHERE]

WHERE is what rank RANK does at step STEP: `step` or `save` (before a checkpoint gets its mark) kill it, `term` and
`usr1` send it a signal, `nan` makes its loss nan; `gradient` has all ranks' kernel make a wrong one from the moment at
which the model is sharded. Writes to OUT/parameters.json what kinds of parameters are in which
units of FSDP2, and the types of what its loss was computed from.
"""

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule

from pipeline.errors import Drained
from pipeline.settings import load_config
from stages.train_student import checkpoints, fused_head, head
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from stages.train_student.trainer import DistillationTrainer
from tests.test_train_steps import kernel_with, larger_by_a_tenth


def parameters_of(model: torch.nn.Module) -> dict[str, list[str]]:
    """Kinds of frozen and trained parameters, and the modules that are gathered one by one."""
    kinds = {True: set(), False: set()}
    for parameter in model.parameters():
        kinds[parameter.requires_grad].add(type(parameter).__name__)
    units = [type(module).__name__ for module in model.modules() if isinstance(module, FSDPModule)]
    return {"trained": sorted(kinds[True]), "frozen": sorted(kinds[False]), "units": units}


def main() -> int:
    """0 done, 75 drained."""
    config = load_config(TrainConfig, Path(sys.argv[1]))
    rank, step, where = (int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]) if len(sys.argv) > 2 else (-1, -1, "")
    judge, write_json, loss = DistillationTrainer.judge_step, checkpoints.write_json, head.distillation_loss
    loss_of: dict[str, str] = {}

    def watched_loss(hidden_MH: torch.Tensor, weight_VH: torch.Tensor, targets: Any, *rest: Any, **extras: Any) -> Any:
        tensors = {"hidden": hidden_MH, "weight": weight_VH, "probs": targets.teacher.probs_MK}
        loss_of.update({name: str(tensor.dtype) for name, tensor in tensors.items()})
        return loss(hidden_MH, weight_VH, targets, *rest, **extras)

    def judge_step(self: Any) -> None:
        if self.args.process_index == 0:
            found = parameters_of(self.model_wrapped) | {"loss_of": loss_of}
            (config.out / "parameters.json").write_text(json.dumps(found))
        if self.args.process_index == rank and self.state.global_step + 1 == step:
            if where == "step":
                os.kill(os.getpid(), signal.SIGKILL)
            if where in ("term", "usr1"):
                os.kill(os.getpid(), {"term": signal.SIGTERM, "usr1": signal.SIGUSR1}[where])
            if where == "nan":
                self._step_terms = self._step_terms * float("nan")
        judge(self)

    def mark(path: Path, document: dict[str, Any]) -> bool:
        if where == "save" and document["step"] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return write_json(path, document)

    def begin(self: Any) -> None:
        if where == "gradient":
            fused_head._row_kernel = lambda logits: kernel_with(larger_by_a_tenth)
        start(self)

    start, DistillationTrainer.begin = DistillationTrainer.begin, begin
    DistillationTrainer.judge_step, checkpoints.write_json = judge_step, mark
    head.distillation_loss = watched_loss
    try:
        train_student(config)
    except Drained as drained:
        return drained.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
