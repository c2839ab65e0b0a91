"""A rank of train-student that something happens to; run by test_train_ranks.py under torchrun.

    python -m torch.distributed.run ... -m tests.ranks SETTINGS.yaml [RANK STEP WHERE]

WHERE is what rank RANK does at step STEP: `step` or `save` (before a checkpoint gets its mark) kill it, `term` and
`usr1` send it a signal, `nan` makes its loss nan. Writes to OUT/parameters.txt what kind of parameters it trains.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from pipeline.config import TrainConfig
from pipeline.errors import Drained
from pipeline.settings import load_config
from stages.train_student import checkpoints, train_student
from stages.train_student.trainer import DistillationTrainer


def main() -> int:
    """0 done, 75 drained."""
    config = load_config(TrainConfig, Path(sys.argv[1]))
    rank, step, where = (int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]) if len(sys.argv) > 2 else (-1, -1, "")
    judge, write_json = DistillationTrainer.judge_step, checkpoints.write_json

    def judge_step(self: Any) -> None:
        kinds = {type(parameter).__name__ for parameter in self.model_wrapped.parameters()}
        if self.args.process_index == 0:
            (config.out / "parameters.txt").write_text(f"{type(self.model_wrapped).__name__} {sorted(kinds)}")
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

    DistillationTrainer.judge_step, checkpoints.write_json = judge_step, mark
    try:
        train_student(config)
    except Drained as drained:
        return drained.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
