"""The settings of `pipeline estimate`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.settings import Settings, required, setting
from stages.estimate.devices import DEVICES


@dataclass(frozen=True, kw_only=True)
class EstimateConfig(Settings):
    """Settings of `pipeline estimate`."""

    cache_logits: Path = required("YAML file with the settings of `pipeline cache-logits`.")
    train_student: Path | None = setting(None, "YAML file with the settings of `pipeline train-student`.")
    device: str = setting("h100", "GPU that both stages run on.", choices=tuple(DEVICES))
    utilization: float = setting(0.4, "Share of the GPU's peak that is reached, 0 to 1.")
    workers: int = setting(1, "Workers that share the cache, each with tensor_parallel x pipeline_parallel GPUs.")
    student_devices: int = setting(1, "GPUs of the student's training, all nodes together.")
    tokens: int | None = setting(None, "Tokens of the corpus; none takes the prepared corpus.")
    sequence_length: int = setting(2048, "Longest sequence, in tokens; counts with --tokens.")
    price: float | None = setting(None, "Price of a GPU and hour.")
    trust_remote_code: bool = setting(
        False, "Run the code that the models' folders bring along; for those whose maker you trust."
    )
    json: bool = setting(False, "One JSON document instead of text.")

    def check(self) -> None:
        for name in ("workers", "student_devices", "tokens"):
            self.at_least(name, 1)
        self.at_least("sequence_length", 2)
        self.at_least("price", 0)
        if not 0 < self.utilization <= 1:
            raise ConfigError(f"utilization is {self.utilization}; it must lie in (0, 1].")
