"""The settings of every command: one frozen dataclass a command, checked before any work starts."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.devices import DEVICES
from pipeline.errors import ConfigError
from pipeline.settings import Settings, required, setting
from pipeline.shards.grid import WARMEST
from pipeline.storage import Location

ENGINES = ("vllm", "transformers")
CONTAINERS = ("arrow", "zarr")
EXPORTS = ("parquet",)
EXPORT_LAYOUTS = ("plain", "axolotl")
PACKINGS = ("isolated", "crossing", "none")
OVERLONG = ("drop", "truncate", "cut")
TAILS = ("ghost", "hybrid", "sampled", "zero", "renormalise", "uniform")
DIVERGENCES = ("forward", "reverse", "js")
DTYPES = ("auto", "float32", "bfloat16", "float16")
SCHEDULES = ("cosine", "linear", "wsd", "constant", "constant_with_warmup")
ALPHA_SCHEDULES = ("constant", "linear", "wsd")
SHARDINGS = ("none", "fsdp2")
BAD_LOSS_ACTIONS = ("stop", "skip")
LAUNCHERS = ("local", "slurm", "ray", "kubernetes")


@dataclass(frozen=True, kw_only=True)
class TextConfig(Settings):
    """How text becomes sequences."""

    inputs: tuple[Path, ...] = required(
        "Files or folders: .txt, .md, .json, .jsonl, .jsonl.gz, .jsonl.zst, .parquet.", argument=True
    )
    tokenizer: Path = required("Folder of the teacher's tokenizer.")
    sequence_length: int = setting(2048, "Longest sequence, in tokens.")
    text_field: str = setting("text", "Field or column that holds a document's text.")
    packing: str = setting(
        "isolated",
        "How short documents share a sequence: 'isolated' keeps attention inside each document, "
        "'crossing' lets it cross, 'none' writes one piece of a document a sequence.",
        choices=PACKINGS,
    )
    overlong: str = setting(
        "drop",
        "What becomes of a conversation, or a prompt with its completion, that is longer than a sequence: 'drop', "
        "'truncate' (its oldest messages, or the beginning of the prompt, go; system messages and answers stay whole), "
        "'cut' into pieces as plain text always is.",
        choices=OVERLONG,
    )
    last_turn_only: bool = setting(False, "Only the last turn of the assistant carries loss.")
    trust_remote_code: bool = setting(
        False, "Run the code that the tokenizer's folder brings along; for those whose maker you trust."
    )

    def check(self) -> None:
        if not self.inputs:
            raise ConfigError("no input was given; name at least one file or folder.")
        self.at_least("sequence_length", 2)


@dataclass(frozen=True, kw_only=True)
class PrepareConfig(TextConfig):
    """Settings of `pipeline prepare`."""

    out: Path = required("Folder to write the tokenised corpus to.")
    partition_tokens: int = setting(16_777_216, "Tokens in one file of the corpus.")
    skip_bad_lines: bool = setting(False, "Count and skip records that cannot be read, instead of stopping.")

    def check(self) -> None:
        super().check()
        self.at_least("partition_tokens", 1)


@dataclass(frozen=True, kw_only=True)
class PreviewConfig(TextConfig):
    """Settings of `pipeline preview`."""

    tokenizer: Path | None = setting(None, "Folder of the teacher's tokenizer; a corpus has its own.")
    rows: int = setting(3, "Rows to show.")
    longest: int = setting(2000, "Tokens of a row to show.")
    borders: bool = setting(True, "Show where tokens begin: by shades, or by dots where there is no colour.")
    color: bool | None = setting(None, "Colour the labels instead of putting them in «»; none does so on a terminal.")

    def check(self) -> None:
        super().check()
        self.at_least("rows", 1)
        self.at_least("longest", 1)


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """Settings of `pipeline cache-logits`."""

    teacher: Path = required("Folder of the teacher: config.json, weights, tokenizer.")
    corpus: Path = required("Folder that `pipeline prepare` wrote.")
    out: Location = required("Folder or URL to write the cache to.")
    top_k: int = setting(64, "Largest probabilities kept for each position.")
    temperatures: tuple[float, ...] = setting(
        (1.0, 2.0), "A temperature T at which targets are exact; repeatable.", flag="--temperature"
    )
    tail_samples: int = setting(0, "Draws from the teacher's tail, outside the top k, kept for each position.")
    draw_temperature: float | None = setting(
        None, "Captured temperature T of the draws; none takes the largest.  Train with --tail hybrid at this T."
    )
    engine: str = setting("vllm", "What runs the teacher.", choices=ENGINES)
    format: str = setting("arrow", "Container of the shards.", choices=CONTAINERS)
    max_kl_error: float = setting(
        1e-4,
        "Largest mean KL(teacher || stored) that rounding may cost in a shard, in nats, at every temperature; "
        "'lossless' keeps every float32. No probability is off by more than 0.001 either way.",
        words={"lossless": 0.0},
    )
    shard_tokens: int = setting(1_048_576, "Tokens in one shard: the work that a crash can lose.")
    reuse: tuple[Location, ...] = setting(
        (),
        "A cache by the same teacher and settings, finished or not: sequences that it holds are copied instead of "
        "scored; repeatable.",
    )
    dtype: str = setting("auto", "Type of the teacher's body; its head always runs in float32.", choices=DTYPES)
    tensor_parallel: int = setting(1, "Devices that share each layer of the teacher (vLLM).")
    pipeline_parallel: int = setting(1, "Devices that share the stack of layers (vLLM).")
    batch_tokens: int = setting(8192, "Tokens in one step of the engine.")
    row_chunk: int = setting(1024, "Positions whose full logits exist at the same time.")
    gpu_memory_utilization: float = setting(0.9, "Share of a GPU's memory that vLLM takes, 0 to 1.")
    quantization: str | None = setting(None, "vLLM's name of the teacher's quantisation, such as fp8.")
    enforce_eager: bool | None = setting(
        None, "Skip vLLM's compilation, which pays on a GPU; none skips it on a CPU, where it takes minutes."
    )
    trust_remote_code: bool = setting(
        False, "Run the code that the teacher's folder brings along; for those whose maker you trust."
    )
    worker: int = setting(0, "Number of this worker, from 0; any number of workers may share one --out.")
    workers: int = setting(1, "Workers that share the cache: each begins with its share and then takes what is left.")
    worker_from_env: bool = setting(
        False, "Take both from PIPELINE_WORKER, a Slurm array, a Kubernetes Indexed Job or srun, in this order."
    )
    lease_s: float = setting(
        180.0, "Seconds without a heartbeat after which others take a worker's partitions.", flag="--lease-seconds"
    )
    stall_s: float = setting(
        1800.0,
        "Seconds in which the engine finishes nothing although it has requests, or four times as many in which it does "
        "not get loaded, after which this worker gives up with exit code 70.",
        flag="--stall-seconds",
    )
    max_failures: int = setting(3, "Failures of a partition after which it is set aside and the rest goes on.")
    retry_failed: bool = setting(False, "Try again what was set aside.")

    def check(self) -> None:
        self.at_least("top_k", 0)
        self.at_least("tail_samples", 0)
        if self.top_k + self.tail_samples == 0:
            raise ConfigError("top_k is 0 and tail_samples is 0; keep at least one entry of a position.")
        for name in ("shard_tokens", "tensor_parallel", "pipeline_parallel", "batch_tokens", "row_chunk"):
            self.at_least(name, 1)
        self.at_least("max_failures", 1)
        self.positive("lease_s", (self.lease_s,))
        self.positive("stall_s", (self.stall_s,))
        if not 0 <= self.worker < self.workers:
            raise ConfigError(f"worker is {self.worker} of {self.workers} workers; count from 0.")
        if not self.temperatures:
            raise ConfigError("temperatures is empty; give at least one, such as --temperature 2.0.")
        self.positive("temperatures", self.temperatures)
        if min(self.temperatures) > WARMEST:
            raise ConfigError(f"temperatures is {list(self.temperatures)}; the smallest must be {WARMEST:g} or less.")
        if len(set(self.temperatures)) != len(self.temperatures):
            raise ConfigError(f"temperatures is {list(self.temperatures)}; each may be given once.")
        if self.draw_temperature is not None and self.draw_temperature not in self.temperatures:
            raise ConfigError(f"draw_temperature is {self.draw_temperature}; choose one of: {list(self.temperatures)}.")
        if not (self.max_kl_error == 0 or 1e-5 <= self.max_kl_error <= 1):
            raise ConfigError(f"max_kl_error is {self.max_kl_error:g}; it must lie in [1e-05, 1] nats or be lossless.")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(f"gpu_memory_utilization is {self.gpu_memory_utilization}; it must lie in (0, 1].")

    @property
    def resolved_draw_temperature(self) -> float:
        """The temperature of the draws."""
        return max(self.temperatures) if self.draw_temperature is None else self.draw_temperature


@dataclass(frozen=True, kw_only=True)
class VerifyConfig(Settings):
    """Settings of `pipeline verify`."""

    cache: Location = required("Folder or URL that `pipeline cache-logits` wrote to.", argument=True)
    repair: bool = setting(
        False, "Drop what is damaged: the next run of the same `pipeline cache-logits` computes that alone."
    )
    workers: int | None = setting(None, "Shards that are read at the same time; none takes one a core.")

    def check(self) -> None:
        self.at_least("workers", 1)


@dataclass(frozen=True, kw_only=True)
class SubmitConfig(Settings):
    """Settings of `pipeline submit`."""

    launcher: str = required("What starts the workers: this machine, or a cluster.", choices=LAUNCHERS, flag="--on")
    cache_logits: Path = required("YAML file with the settings of `pipeline cache-logits`.")
    train_student: Path | None = setting(None, "YAML file with the settings of `pipeline train-student`, to follow.")
    workers: int = setting(1, "Workers that share the cache.")
    gpus_per_worker: int | None = setting(
        None, "GPUs of a worker; none takes tensor_parallel x pipeline_parallel, 0 is for a CPU."
    )
    student_nodes: int = setting(1, "Nodes of the student's training.")
    student_gpus: int = setting(0, "GPUs of the student's training on each node; 0 is for a CPU.")
    attempts: int = setting(5, "Times in a row that something is started again without getting further.")
    drain_s: int = setting(
        600, "Seconds of warning before a worker is stopped: more than a shard takes.", flag="--drain-seconds"
    )
    directives: tuple[str, ...] = setting(
        (), "Slurm: a further #SBATCH option of all jobs, such as --partition=gpu; repeatable.", flag="--sbatch"
    )
    setup: tuple[str, ...] = setting((), "Slurm: a line of shell before the command, such as module load cuda.")
    address: str | None = setting(None, "Ray: address of the cluster; none starts one on this machine.")
    image: str | None = setting(None, "Kubernetes: container image in which this package is installed.")
    volume: str | None = setting(None, "Kubernetes: persistent volume claim with teacher, corpus and cache.")
    secret: str | None = setting(
        None, "Kubernetes: secret whose entries become environment variables, such as an object store's credentials."
    )
    mount: Path = setting(Path("/data"), "Kubernetes: where the volume appears in the containers.")
    write_only: bool = setting(False, "Write the scripts and submit nothing.")

    def check(self) -> None:
        for name in ("workers", "student_nodes", "attempts", "drain_s"):
            self.at_least(name, 1)
        for name in ("gpus_per_worker", "student_gpus"):
            self.at_least(name, 0)
        if self.launcher == "kubernetes" and (self.image is None or self.volume is None):
            raise ConfigError("launcher is 'kubernetes'; give --image and --volume too.")
        if self.student_nodes > 1 and self.launcher != "slurm":
            raise ConfigError(f"student_nodes is {self.student_nodes}; only Slurm trains on several nodes.")
        if self.write_only and self.launcher in ("local", "ray"):
            raise ConfigError(f"write_only: nothing is written for {self.launcher!r}; it is for slurm and kubernetes.")


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


@dataclass(frozen=True, kw_only=True)
class StatusConfig(Settings):
    """Settings of `pipeline status`."""

    cache: Location = required("Folder or URL that `pipeline cache-logits` writes to.", argument=True)
    watch: bool = setting(False, "Show it again and again until nothing is left to do.")
    json: bool = setting(False, "One JSON document instead of text.")
    events: int = setting(0, "The last so many events of all workers too.")
    interval_s: float = setting(10.0, "Seconds between two looks with --watch.", flag="--interval")

    def check(self) -> None:
        self.at_least("events", 0)
        self.positive("interval_s", (self.interval_s,))


@dataclass(frozen=True, kw_only=True)
class ConvertConfig(Settings):
    """Settings of `pipeline convert`."""

    cache: Location = required("Folder or URL of a finished cache.", argument=True)
    format: str = required("Container of the new shards.", choices=CONTAINERS)
    out: Location = required("Folder or URL to write the new cache to.")
    workers: int | None = setting(None, "Shards that are converted at the same time; none takes one a core.")

    def check(self) -> None:
        self.at_least("workers", 1)


@dataclass(frozen=True, kw_only=True)
class MergeConfig(Settings):
    """Settings of `pipeline merge`."""

    caches: tuple[Location, ...] = required(
        "Folders or URLs of two or more finished caches of one teacher.", argument=True
    )
    out: Location = required("Folder or URL to write the new cache to.")
    format: str | None = setting(None, "Container of the new shards; none takes the first cache's.", choices=CONTAINERS)
    workers: int | None = setting(None, "Shards that are copied at the same time; none takes one a core.")

    def check(self) -> None:
        self.at_least("workers", 1)
        if len(self.caches) < 2:
            raise ConfigError(f"caches names {len(self.caches)} folder; a merge needs two or more.")


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """Settings of `pipeline export`."""

    cache: Location = required("Folder or URL of a finished cache.", argument=True)
    out: Path = required("Folder to write the files to.")
    to: str = setting("parquet", "Kind of file.", choices=EXPORTS)
    layout: str = setting(
        "plain",
        "Columns: 'plain' has one entry a target, 'axolotl' one a token, as axolotl's KD plugin takes them.",
        choices=EXPORT_LAYOUTS,
    )
    temperature: float = setting(1.0, "Temperature T of the log-probabilities; the cache must hold it.")
    workers: int | None = setting(None, "Files that are written at the same time; none takes one a core.")

    def check(self) -> None:
        self.positive("temperature", (self.temperature,))
        self.at_least("workers", 1)


@dataclass(frozen=True, kw_only=True)
class AuditConfig(Settings):
    """Settings of `pipeline audit`. What is not given is as it was in the capture."""

    cache: Location = required("Folder or URL of a finished cache.", argument=True)
    teacher: Path = required("Folder of the teacher that made it.")
    fraction: float = setting(0.001, "Share of the sequences that are scored again, 0 to 1.")
    sequences: int = setting(8, "Sequences that are scored again at least.")
    seed: int = setting(0, "Seed of the sample.")
    noise: float | None = setting(
        None,
        "How far arithmetic alone may put a probability, beyond what rounding does; none takes 0.0001 for a "
        "teacher in float32, 0.02 in float16, 0.1 in bfloat16 or quantised.",
    )
    engine: str | None = setting(None, "What runs the teacher; none takes the capture's.", choices=ENGINES)
    tensor_parallel: int | None = setting(None, "Devices that share each layer; none takes the capture's.")
    pipeline_parallel: int | None = setting(None, "Devices that share the stack of layers; none takes the capture's.")
    batch_tokens: int | None = setting(None, "Tokens in one step of the engine; none takes the capture's.")
    gpu_memory_utilization: float | None = setting(None, "Share of a GPU's memory; none takes the capture's.")
    enforce_eager: bool | None = setting(None, "Skip vLLM's compilation; none takes the capture's.")
    trust_remote_code: bool = setting(
        False, "Run the code that the teacher's folder brings along; for those whose maker you trust."
    )

    def check(self) -> None:
        self.seed_fits()
        for name in ("sequences", "tensor_parallel", "pipeline_parallel", "batch_tokens"):
            self.at_least(name, 1)
        self.at_least("noise", 0)
        if not 0 <= self.fraction <= 1:
            raise ConfigError(f"fraction is {self.fraction}; it must lie in [0, 1].")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Settings):
    """Settings of `pipeline train-student`."""

    student: Path = required("Folder of the student, or a config.json for one that starts from random weights.")
    cache: Location = required("Folder or URL that `pipeline cache-logits` wrote to.")
    out: Path = required("Folder for checkpoints, logs and the finished student.")
    alpha: float = setting(0.5, "Weight of the distillation term; 0 trains from the labels alone.")
    temperature: float = setting(2.0, "Temperature T of the distillation term; the cache must hold it.")
    alpha_schedule: str = setting(
        "constant",
        "Course of alpha: 'linear' goes to --alpha-end; 'wsd' rises from 0 as the learning rate does, stays, and goes to "
        "--alpha-end in the last --decay-ratio of the steps.",
        choices=ALPHA_SCHEDULES,
    )
    alpha_end: float = setting(0.0, "Where a scheduled alpha ends, 0 to 1.")
    tail: str = setting(
        "ghost",
        "What stands for the teacher's probability outside the top k; 'sampled' is for caches of draws alone.",
        choices=TAILS,
    )
    divergence: str = setting(
        "forward", "Forward KL, reverse KL or Jensen-Shannon; the last two with the ghost tail.", choices=DIVERGENCES
    )
    eval_cache: Location | None = setting(None, "A held-out cache to evaluate on.")
    epochs: float = setting(1.0, "Passes over the cache; --max-steps takes precedence.")
    max_steps: int | None = setting(None, "Optimizer steps to train for.")
    batch_size: int = setting(8, "Sequences in a micro-batch, for each device.")
    gradient_accumulation: int = setting(1, "Micro-batches in an optimizer step.")
    learning_rate: float = setting(3e-4, "Peak learning rate of AdamW.")
    schedule: str = setting("cosine", "Shape of the learning rate over the steps.", choices=SCHEDULES)
    warmup_ratio: float = setting(0.03, "Share of the steps in which the learning rate rises, 0 to 1.")
    decay_ratio: float = setting(0.1, "Share of the steps in which a 'wsd' schedule falls, 0 to 1.")
    weight_decay: float = setting(0.1, "AdamW's weight decay.")
    max_grad_norm: float = setting(1.0, "Norm at which gradients are clipped; 0 clips nothing.")
    dtype: str = setting("auto", "Type of the computation; weights are kept in float32.", choices=DTYPES)
    lora_rank: int | None = setting(None, "Train low-rank adapters of this rank on the body; none trains every weight.")
    lora_alpha: float = setting(32.0, "An adapter's update is scaled by this over its rank.")
    lora_head: bool = setting(False, "Adapters on the LM head too; without, it is frozen as the rest.")
    router_aux_loss: float | None = setting(
        None,
        "Weight of the loss that balances the experts of a mixture, where transformers has one for its kind; none takes "
        "the weight in the model's own config, 0 leaves it out.",
    )
    gradient_checkpointing: bool = setting(False, "Recompute activations: less memory, more time.")
    sharding: str = setting(
        "none",
        "Under torchrun: 'none' keeps the whole model on every rank, 'fsdp2' shards parameters, gradients and optimizer.",
        choices=SHARDINGS,
    )
    on_bad_loss: str = setting(
        "stop",
        "What happens at a loss or gradient that is not finite, or a spike: 'skip' drops the step; always written down "
        "with its sequences.",
        choices=BAD_LOSS_ACTIONS,
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
    tensorboard: bool = setting(False, "Log to TensorBoard too, under OUT/checkpoints/runs.")
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
        if self.eval_steps is not None and self.eval_cache is None:
            raise ConfigError(
                f"eval_steps is {self.eval_steps} without eval_cache: there is nothing to evaluate on; give --eval-cache, "
                "or leave --eval-steps out."
            )
        if self.lora_head and self.lora_rank is None:
            raise ConfigError("lora_head is set without lora_rank; give --lora-rank, such as 16.")
        if self.divergence != "forward" and self.tail != "ghost":
            raise ConfigError(f"divergence is {self.divergence!r} with tail {self.tail!r}; it needs --tail ghost.")
        if self.warmup_ratio + self.decay_ratio > 1 and "wsd" in (self.schedule, self.alpha_schedule):
            raise ConfigError(
                f"warmup_ratio and decay_ratio are {self.warmup_ratio} and {self.decay_ratio}; they overlap."
            )
        for name in ("alpha", "alpha_end", "warmup_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must lie in [0, 1].")


@dataclass(frozen=True, kw_only=True)
class DemoConfig(Settings):
    """Settings of `pipeline demo`."""

    work: Path = setting(Path("data/demo"), "Folder for everything that the demo makes; finished steps are reused.")
    engine: str = setting("vllm", "What runs the teacher.", choices=ENGINES)
    format: str = setting("arrow", "Container of the shards.", choices=CONTAINERS)
