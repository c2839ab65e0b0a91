"""The settings of `pipeline train-student`."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.settings import COMPUTED_IN, Settings, required, setting
from pipeline.stores.store import Store
from stages.train_student.divergences import DIVERGENCES
from stages.train_student.guards import BAD_LOSS_ACTIONS
from stages.train_student.positions import PositionRule
from stages.train_student.schedules import ALPHA_SCHEDULES, SCHEDULES
from stages.train_student.shardings import SHARDINGS
from stages.train_student.sources import sources_of
from stages.train_student.tails import DIVERGING_TAILS, TAILS


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of `pipeline train-student`."""

    student: Path = required(
        "Folder of the student, its name on a model hub, or a config.json for one that starts from random weights."
    )
    cache: tuple[Store, ...] = required(
        "Folder or URL that `pipeline cache-logits` wrote to, or a view of one; several are mixed: PLACE=SHARE gives "
        "one a share of the sequences, the others share the rest by size."
    )
    out: Path = required("Folder for checkpoints, logs and the finished student.")
    alpha: float = setting(0.5, "Weight of the distillation term; 0 trains from the labels alone.")
    temperature: float = setting(2.0, "Temperature T of the distillation term; the cache must hold it.")
    approximate_temperature: bool = setting(
        False,
        "Train at a temperature that the cache does not hold: its targets there are approximated, by the cache's "
        "sketch of the tail.",
    )
    alpha_schedule: str = setting(
        "constant",
        "Course of alpha: 'linear' goes to --alpha-end; 'wsd' rises from 0 as the learning rate does, stays, and goes "
        "to --alpha-end in the last --decay-ratio of the steps.",
        choices=tuple(ALPHA_SCHEDULES),
    )
    alpha_end: float = setting(0.0, "Where a scheduled alpha ends, 0 to 1.")
    tail: str = setting(
        "ghost",
        "What stands for the teacher's probability outside the top k; 'sampled' is for caches of draws alone, "
        "'sketch' for those with a sketch of the tail.",
        choices=tuple(TAILS),
    )
    divergence: str = setting(
        "forward",
        "Forward KL, reverse KL or Jensen-Shannon; the last two with the tails ghost and sketch.",
        choices=DIVERGENCES,
    )
    positions: str | None = setting(
        None,
        "Keep the loss on a share of the target positions: 'entropy:0.2' where the teacher's entropy at T is largest, "
        "'student-entropy:0.2' the student's, 'random:0.2' by chance; none keeps all.",
    )
    eval_cache: tuple[Store, ...] = setting((), "A held-out cache to evaluate on; of several, each by itself as well.")
    epochs: float = setting(1.0, "Passes over the caches together; --max-steps takes precedence.")
    max_steps: int | None = setting(None, "Optimizer steps to train for.")
    batch_size: int = setting(8, "Sequences in a micro-batch, for each device.")
    gradient_accumulation: int = setting(1, "Micro-batches in an optimizer step.")
    learning_rate: float = setting(3e-4, "Peak learning rate of AdamW.")
    schedule: str = setting("cosine", "Shape of the learning rate over the steps.", choices=tuple(SCHEDULES))
    warmup_ratio: float = setting(0.03, "Share of the steps in which the learning rate rises, 0 to 1.")
    decay_ratio: float = setting(0.1, "Share of the steps in which a 'wsd' schedule falls, 0 to 1.")
    weight_decay: float = setting(0.1, "AdamW's weight decay.")
    max_grad_norm: float = setting(1.0, "Norm at which gradients are clipped; 0 clips nothing.")
    dtype: str = setting(
        "auto", "Type of the computation; weights are kept in float32.", choices=("auto", *COMPUTED_IN)
    )
    lora_rank: int | None = setting(None, "Train low-rank adapters of this rank on the body; none trains every weight.")
    lora_alpha: float = setting(32.0, "An adapter's update is scaled by this over its rank.")
    lora_head: bool = setting(False, "Adapters on the LM head too; without, it is frozen as the rest.")
    router_aux_loss: float | None = setting(
        None,
        "Weight of the loss that balances the experts of a mixture, where transformers has one for its kind; none "
        "takes the weight in the model's own config, 0 leaves it out.",
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations: less memory, more time.")
    sharding: str = setting(
        "none",
        "Under torchrun: 'none' keeps the whole model on every rank, 'fsdp2' shards parameters, gradients and "
        "optimizer.",
        choices=tuple(SHARDINGS),
    )
    on_bad_loss: str = setting(
        "stop",
        "What happens at a loss or gradient that is not finite, or a spike: 'skip' drops the step; always written down "
        "with its sequences.",
        choices=tuple(BAD_LOSS_ACTIONS),
    )
    trust_remote_code: bool = setting(
        False, "Run the code that the student's folder brings along; for those whose maker you trust."
    )
    stall_s: float = setting(
        1800.0,
        "Seconds in which a batch cannot be read, or as long as a silent object store is waited for if that is longer, "
        "after which the training gives up with exit code 70.",
        flag="--stall-seconds",
    )
    loader_workers: int | None = setting(
        None, "Processes that decode batches; 0 is a thread. None takes 2 with a GPU, else 0."
    )
    tensorboard: bool = setting(False, "Log to TensorBoard too, under OUT/tensorboard.")
    seed: int = setting(0, "Seed of the initial weights and of the order of the data.")
    log_steps: int = setting(10, "Steps between two lines of the log.")
    save_steps: int = setting(500, "Steps between two checkpoints.")
    eval_steps: int | None = setting(None, "Steps between two evaluations; none evaluates at the end only.")
    keep_checkpoints: int = setting(2, "Checkpoints kept.")

    def check(self) -> None:
        for name in ("max_steps", "batch_size", "gradient_accumulation", "log_steps", "save_steps", "eval_steps"):
            self.at_least(name, 1)
        for name in ("weight_decay", "max_grad_norm", "router_aux_loss"):
            self.at_least(name, 0)
        self.positive("temperature", (self.temperature,))
        self.positive("learning_rate", (self.learning_rate,))
        self.positive("epochs", (self.epochs,))
        self.seed_fits()
        self.positive("stall_s", (self.stall_s,))
        self.at_least("keep_checkpoints", 1)
        self.at_least("loader_workers", 0)
        self.at_least("lora_rank", 1)
        self.positive("lora_alpha", (self.lora_alpha,))
        if self.positions is not None:
            PositionRule.parse(self.positions)
        sources_of(self.cache)
        if any(source.share is not None for source in sources_of(self.eval_cache)):
            raise ConfigError("eval_cache has a share after =; held-out caches are measured whole.")
        if self.eval_steps is not None and not self.eval_cache:
            raise ConfigError(
                f"eval_steps is {self.eval_steps} without eval_cache: there is nothing to evaluate on; give "
                "--eval-cache, or leave --eval-steps out."
            )
        if self.lora_head and self.lora_rank is None:
            raise ConfigError("lora_head is set without lora_rank; give --lora-rank, such as 16.")
        if self.divergence != "forward" and self.tail not in DIVERGING_TAILS:
            tails = " or ".join(DIVERGING_TAILS)
            raise ConfigError(f"divergence is {self.divergence!r} with tail {self.tail!r}; it needs --tail {tails}.")
        if self.warmup_ratio + self.decay_ratio > 1 and "wsd" in (self.schedule, self.alpha_schedule):
            raise ConfigError(
                f"warmup_ratio and decay_ratio are {self.warmup_ratio} and {self.decay_ratio}; they overlap."
            )
        for name in ("alpha", "alpha_end", "warmup_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1].")
