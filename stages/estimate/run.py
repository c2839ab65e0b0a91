"""What a capture and a training are going to take, before a GPU is asked for.

Needs the settings of both stages and the models' config.json; no weights, and no corpus where the number of
tokens is given. Floating-point operations are counted (two a weight and token; two more a head dimension and
pair of tokens for each of the two products of attention, as in appendix B of arXiv 2001.08361, over the causal
half of a whole sequence: an upper bound where documents are shorter). Time is what they take at a stated share
of the device's peak, which is an assumption and is printed as one.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pipeline.corpus import Corpus
from pipeline.errors import CorpusError
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import ShardCounts, ShardLayout
from pipeline.hub import located
from pipeline.models import read_model, text_body
from pipeline.progress import Reporter, duration
from pipeline.settings import load_config
from pipeline.stores.store import Store
from stages.cache_logits.settings import CacheConfig
from stages.estimate.devices import DEVICES
from stages.estimate.settings import EstimateConfig
from stages.train_student.settings import TrainConfig

ARCHIVE = {"grid": (1.2, 12.4), "lossless": (4.16, 22.4)}
"""Bytes of a stored entry and of the rest of a target in Zarr, as docs/storage.md measured them at k from 8 to 64."""
ARCHIVED_DRAW = 2.3
ARCHIVED_COEFFICIENT = 0.5
"""As measured at rank 16 on the fidelity study's teacher, with the default --max-sketch-error."""
STATE_BYTES = 16
"""Bytes of a trained parameter: itself, its gradient and AdamW's two moments, all float32."""
FROZEN_BYTES = 4


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """What of a model decides its cost."""

    num_parameters: int
    body_flops: float
    """Operations of a token's forward pass, without attention's products and the head; of the experts that it takes."""
    head_flops: float
    """Operations of a position whose logits are wanted."""
    attention_flops: float
    """Operations of a token for each token that it attends to."""
    kv_bytes: int
    """Bytes of a token's keys and values in half precision."""
    vocab_size: int

    @classmethod
    def read(cls, path: Path, trust_remote_code: bool = False) -> "ModelSize":
        """The size of the model whose config.json is `path` or lies in it, counted without making its weights.

        Of a vision-language model that of its language model.
        """
        import torch

        folder = read_model(path, trust_remote_code=trust_remote_code)
        model, text = folder.without_weights(), folder.text
        parts = {"body": text_body(model), "head": model.get_output_embeddings()}
        head, embedding = model.get_output_embeddings().weight, model.get_input_embeddings().weight
        active = 0.0
        parameters = dict(torch.nn.ModuleDict(parts).named_parameters())  # a tied head counts once
        for name, parameter in parameters.items():
            if parameter.ndim > 1 and parameter is not head and parameter is not embedding:
                active += parameter.numel() * (_share_of_experts(text) if ".experts." in name else 1.0)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        return cls(
            num_parameters=sum(parameter.numel() for parameter in parameters.values()),
            body_flops=2 * active,
            head_flops=2.0 * head.numel(),
            attention_flops=4.0 * text.num_hidden_layers * text.num_attention_heads * head_dim,
            kv_bytes=2 * 2 * text.num_hidden_layers * kv_heads * head_dim,
            vocab_size=len(head),
        )

    def forward_flops(self, amount: "Amount") -> float:
        """Operations of the forward pass over all tokens, with logits at the targets alone."""
        a_token = self.body_flops + self.attention_flops * amount.sequence_length / 2
        return a_token * amount.num_tokens + self.head_flops * amount.num_targets


@dataclass(frozen=True, kw_only=True)
class Amount:
    """How much text there is."""

    num_tokens: int
    num_targets: int
    sequence_length: int

    @classmethod
    def of(cls, config: EstimateConfig, corpus: Store) -> "Amount":
        """The prepared corpus', if no number was given."""
        if config.tokens is not None:
            return cls(num_tokens=config.tokens, num_targets=config.tokens, sequence_length=config.sequence_length)
        try:
            manifest = Corpus(corpus).manifest
        except CorpusError as exc:
            raise CorpusError(f"{exc} Or give --tokens.") from exc
        return cls(
            num_tokens=manifest.num_tokens,
            num_targets=manifest.num_targets,
            sequence_length=manifest.sequence_length,
        )

    def times(self, factor: float) -> "Amount":
        """The amount of the same text `factor` times."""
        return replace(self, num_tokens=round(self.num_tokens * factor), num_targets=round(self.num_targets * factor))


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What one stage takes on its devices."""

    model: str
    parameters: int
    devices: int
    tokens: int
    flops_per_token: float
    seconds: float
    device_hours: float
    price: float | None
    memory_gb: float
    """What each device must hold: of the teacher weights, the keys and values of an engine's step and the logits of a
    chunk; of the student weights, gradients and optimizer, without activations."""
    memory_limit_gb: float

    @property
    def fits(self) -> bool:
        return self.memory_gb <= self.memory_limit_gb


@dataclass(frozen=True, kw_only=True)
class Storage:
    """What the cache takes: known, but for a compressed container, which is estimated from measured caches in Zarr.

    With `top_p` as if every target had all its top k.
    """

    container: str
    bytes: int
    bytes_per_target: float
    partitions: int
    partition_seconds: float
    """For which one worker has a partition in hand: what a crash loses at most, and what a drain waits for."""
    sketch_bytes: int
    """Of the tail sketch's file, in `bytes` too; 0 without one."""
    sketch_flops: float
    """Operations of its fit, which each worker that begins before it is there makes on its CPU; 0 without one."""
    top_p: float | None
    """As few entries are kept as reach this mass: how many depends on the teacher, and `bytes` is a bound."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What stage one, its cache, and stage two take, the last where its settings were given."""

    device: str
    utilization: float
    capture: Cost
    storage: Storage
    training: Cost | None

    def to_json(self) -> str:
        """All figures."""
        return json.dumps(asdict(self), indent=1)


def estimate(config: EstimateConfig) -> Estimate:
    """What the two stages take. Raises ConfigError for settings or models that cannot be read."""
    cache = located(load_config(CacheConfig, config.cache_logits), "teacher", Reporter(), with_weights=False)
    amount = Amount.of(config, cache.corpus)
    capture = _capture(config, cache, amount)
    training = None
    if config.train_student is not None:
        student = load_config(TrainConfig, config.train_student)
        training = _training(config, located(student, "student", Reporter(), with_weights=False), amount)
    return Estimate(
        device=config.device,
        utilization=config.utilization,
        capture=capture,
        storage=_storage(config, cache, amount, capture.seconds),
        training=training,
    )


def describe(found: Estimate) -> list[str]:
    """Lines for a person."""
    storage = found.storage
    about = "about " if CONTAINERS[storage.container].is_compressed else ""
    bound = "" if storage.top_p is None else f", if no target reached {storage.top_p:g} before its top k: less"
    lines = [
        *_describe(found, "capture", found.capture),
        f"  storage  {storage.container}, {about}{storage.bytes / 1e9:,.1f} GB, "
        f"{storage.bytes_per_target:.0f} bytes a target{bound}",
        f"  shards   {storage.partitions:,}; one takes a worker {duration(storage.partition_seconds)}, "
        "which is what a crash can lose and a drain waits for",
    ]
    if storage.sketch_bytes:
        lines.append(
            f"  sketch   {storage.sketch_bytes / 1e6:,.1f} MB of the storage; its fit takes about "
            f"{storage.sketch_flops / 1e12:,.1f} TFLOP on a worker's CPU before the capture"
        )
    if found.training is not None:
        lines += _describe(found, "training", found.training)
    return [
        *lines,
        f"Times assume {found.utilization:.0%} of the peak of {found.device}; measure yours on a few shards.",
    ]


def _describe(found: Estimate, name: str, cost: Cost) -> list[str]:
    price = f", {cost.price:,.0f} at that price" if cost.price is not None else ""
    memory = f"{cost.memory_gb:,.1f} of {cost.memory_limit_gb:,.1f} GB a device"
    memory += ", activations not counted" if name == "training" else ""
    return [
        f"{name}: {cost.model}, {cost.parameters / 1e9:,.2f}B parameters, on {cost.devices} x {found.device}",
        f"  memory   {memory}{'' if cost.fits else ': DOES NOT FIT'}",
        f"  time     {duration(cost.seconds)} for {cost.tokens:,} tokens of {cost.flops_per_token / 1e9:,.1f} GFLOP, "
        f"{cost.tokens / cost.seconds:,.0f} a second; {cost.device_hours:,.1f} device hours{price}",
    ]


def _capture(config: EstimateConfig, cache: CacheConfig, amount: Amount) -> Cost:
    size, device = ModelSize.read(cache.teacher, config.trust_remote_code), DEVICES[config.device]
    fp8, full = "fp8" in (cache.quantization or ""), cache.dtype == "float32"
    shards = cache.tensor_parallel * cache.pipeline_parallel
    weights = size.num_parameters * (1 if fp8 else 4 if full else 2)
    rows = min(cache.batch_tokens, cache.rows_at_once(size.vocab_size))
    logits = 3 * 4 * rows * size.vocab_size  # in float32, and two temporaries of their size
    return _cost(
        config,
        model=cache.teacher,
        size=size,
        devices=config.workers * shards,
        num_tokens=amount.num_tokens,
        flops=size.forward_flops(amount),
        rate=device.fp8 if fp8 else device.float32 if full else device.half,
        memory_gb=((weights + size.kv_bytes * cache.batch_tokens) / shards + logits / cache.tensor_parallel) / 1e9,
        memory_limit_gb=device.memory_gb * cache.gpu_memory_utilization,
    )


def _training(config: EstimateConfig, train: TrainConfig, amount: Amount) -> Cost:
    size, device = ModelSize.read(train.student, config.trust_remote_code), DEVICES[config.device]
    full, devices = train.dtype == "float32", config.student_devices
    seen = amount.times(train.epochs)
    if train.max_steps is not None:
        a_step = train.batch_size * train.gradient_accumulation * devices * amount.sequence_length
        seen = amount.times(train.max_steps * a_step / amount.num_tokens)
    # The backward pass takes twice the forward pass; without gradients of frozen weights, as much.
    passes = (2 if train.lora_rank else 3) + (1 if train.gradient_checkpointing else 0)
    state = size.num_parameters * (FROZEN_BYTES if train.lora_rank else STATE_BYTES)
    return _cost(
        config,
        model=train.student,
        size=size,
        devices=devices,
        num_tokens=seen.num_tokens,
        flops=passes * size.forward_flops(seen),
        rate=device.float32 if full else device.half,
        memory_gb=state / (devices if train.sharding == "fsdp2" else 1) / 1e9,
        memory_limit_gb=device.memory_gb,
    )


def _cost(
    config: EstimateConfig,
    *,
    model: Path,
    size: ModelSize,
    devices: int,
    num_tokens: int,
    flops: float,
    rate: float,
    memory_gb: float,
    memory_limit_gb: float,
) -> Cost:
    seconds = flops / (devices * rate * 1e12 * config.utilization)
    hours = seconds * devices / 3600
    return Cost(
        model=str(model),
        parameters=size.num_parameters,
        devices=devices,
        tokens=num_tokens,
        flops_per_token=flops / num_tokens,
        seconds=seconds,
        device_hours=hours,
        price=None if config.price is None else hours * config.price,
        memory_gb=memory_gb,
        memory_limit_gb=memory_limit_gb,
    )


def _storage(config: EstimateConfig, cache: CacheConfig, amount: Amount, seconds: float) -> Storage:
    num_sequences = max(1, amount.num_tokens // amount.sequence_length)
    counts = ShardCounts(
        num_sequences=num_sequences,
        num_tokens=amount.num_tokens,
        num_documents=num_sequences,
        num_targets=amount.num_targets,
    )
    layout = ShardLayout(counts=counts, spec=cache.spec)
    size = layout.num_bytes
    if CONTAINERS[cache.format].is_compressed:
        entry, rest = ARCHIVE["grid" if layout.on_grid else "lossless"]
        a_target = entry * cache.top_k + rest + ARCHIVED_DRAW * cache.tail_samples
        size = round(amount.num_targets * (a_target + ARCHIVED_COEFFICIENT * cache.tail_rank))
    sketch_bytes, sketch_flops = _sketch(config, cache)
    size += sketch_bytes
    partitions = max(1, round(amount.num_tokens / cache.shard_tokens))
    return Storage(
        container=cache.format,
        bytes=size,
        bytes_per_target=size / max(amount.num_targets, 1),
        partitions=partitions,
        partition_seconds=seconds * config.workers / partitions,
        sketch_bytes=sketch_bytes,
        sketch_flops=sketch_flops,
        top_p=cache.top_p,
    )


def _sketch(config: EstimateConfig, cache: CacheConfig) -> tuple[int, float]:
    """Bytes of the tail sketch's file, and operations of its fit: products of the head and, with gradients, its own."""
    if not cache.tail_rank:
        return 0, 0.0
    from stages.cache_logits.sketch_fitting import BATCH_ROWS, STEPS

    size = ModelSize.read(cache.teacher, config.trust_remote_code)
    hidden_size = round(size.head_flops / (2 * size.vocab_size))
    of_ids = size.vocab_size * (4 + 2 * cache.tail_rank)
    flops = STEPS * BATCH_ROWS * (size.head_flops + 3 * 2 * size.vocab_size * cache.tail_rank)
    return of_ids + 4 * hidden_size * (1 + cache.tail_rank), flops


def _share_of_experts(text: Any) -> float:
    """The part of a mixture's experts that a token meets."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((count for name in names if (count := getattr(text, name, None))), None)
    return text.num_experts_per_tok / total if total else 1.0
