"""The command `pipeline audit`: a sample of a cache scored again by its teacher, and compared."""

from contextlib import closing
from dataclasses import asdict, dataclass, field

import numpy as np

from pipeline.cache.manifest import CacheManifest
from pipeline.cache.reader import Cache, whole_cache
from pipeline.corpus import TokenSequence
from pipeline.errors import CacheMismatchError, ConfigError
from pipeline.formats.layout import CachedSequence, ShardCounts, encode, targets_of
from pipeline.hub import located
from pipeline.ownership import entries_that_differ, told
from pipeline.progress import Reporter
from pipeline.settings import load_config
from pipeline.targets import kept
from stages.cache_logits.comparison import Difference, difference_of_cuts, differences
from stages.cache_logits.engines import ENGINES
from stages.cache_logits.scoring import ScoredRow, score_rows
from stages.cache_logits.settings import AuditConfig, TeacherConfig
from stages.cache_logits.teacher import read_teacher
from stages.cache_logits.vllm_engine import notes, require_vllm

NOISE = {"float32": 1e-4, "float16": 0.02, "bfloat16": 0.1}
"""By the type of the teacher's body: how far two runs of it may put one probability apart. A batch of another
size or another engine sums in another order."""
NOISE_QUANTISED = 0.1
MEAN_NOISE = 0.2
"""The mean over a sequence's positions may be this share of what a single one may be."""
LEVELS_OF_NOISE = 4
"""How far two runs may put an integer of the tail sketch apart where the body is not float32."""
ROUNDING_MARGIN = 2.0
"""What rounding costs is measured on the sample; an unlucky entry elsewhere may lose this much more."""


@dataclass
class AuditReport:
    """What an audit found; the cache holds what the teacher says if `problems` is empty."""

    num_sequences: int = 0
    num_targets: int = 0
    rounding_error: float = 0.0
    """Largest difference of a probability that rounding alone makes, on the sampled targets."""
    noise: float = 0.0
    largest: float = 0.0
    """Largest difference found."""
    problems: list[str] = field(default_factory=list)

    @property
    def allowed(self) -> float:
        """Largest difference of a probability that is no disagreement."""
        return ROUNDING_MARGIN * self.rounding_error + self.noise

    @property
    def allowed_mean(self) -> float:
        """Largest mean over a sequence of the positions' largest differences."""
        return ROUNDING_MARGIN * self.rounding_error + MEAN_NOISE * self.noise


def audit_cache(config: AuditConfig, reporter: Reporter | None = None) -> AuditReport:
    """Score a random sample of the finished cache again and compare; raises PipelineError before that.

    The teacher must be the one of the manifest, file for file. Nothing of the corpus is needed.
    """
    reporter = reporter or Reporter()
    config = located(config, "teacher", reporter)
    cache = whole_cache(config.cache)
    indexes = sample(len(cache), config.fraction, config.sequences, config.seed)
    capture = _capture_settings(config, cache.manifest)
    teacher = read_teacher(capture, cache.manifest, cache.folder, cache.largest_token_id)
    _require_same(teacher.identity(), cache.manifest, config)
    if capture.engine == "vllm":
        require_vllm(teacher)
    noise = NOISE_QUANTISED if teacher.quantization != "none" else NOISE[teacher.dtype]
    report = AuditReport(noise=noise if config.noise is None else config.noise)
    reporter.log(f"{config.cache}: scoring {len(indexes)} of {len(cache):,} sequences again with {capture.engine}")
    for note in notes(teacher) if capture.engine == "vllm" else ():
        reporter.note(note)
    with reporter.waiting(f"loading {teacher.folder} with {capture.engine}"):
        engine = ENGINES[capture.engine](teacher, capture, cache.manifest.sequence_length, cache.fitted_sketch())
    found: list[tuple[str, Difference]] = []
    with closing(engine), reporter.progress("audit", len(indexes), "sequences") as progress:
        waiting = iter(indexes)

        def compare(row: ScoredRow) -> None:
            found.extend(_compare(cache, int(next(waiting)), row, report))
            progress.advance(1)

        score_rows(engine, (ScoredRow(token_sequence(cache[int(index)])) for index in indexes), compare)
    report.problems += [
        f"{where}: {worst}, {report.allowed:.5f} apart is allowed; on average the sequence is {worst.mean:.5f} apart"
        for where, worst in found
        if not (worst.value <= report.allowed and worst.mean <= report.allowed_mean)
    ]
    return report


def sample(count: int, fraction: float, at_least: int, seed: int) -> np.ndarray:
    """Rising indexes of the sequences that are audited; the same seed gives the same."""
    size = min(count, max(at_least, round(count * fraction)))
    return np.sort(np.random.default_rng(seed).choice(count, size, replace=False, shuffle=False))


def token_sequence(cached: CachedSequence) -> TokenSequence:
    """The row of the corpus that a cached sequence was made from."""
    return TokenSequence(
        token_ids=cached.token_ids, loss_mask=cached.loss_mask, document_lengths=cached.document_lengths
    )


def _compare(cache: Cache, index: int, row: ScoredRow, report: AuditReport) -> list[tuple[str, Difference]]:
    """What tells a cached sequence from the same scored again, with its name."""
    manifest, cached, sequence = cache.manifest, cache[index], row.sequence
    wanted = kept(row.scored(), manifest.spec)
    where = f"{cache.folder}: sequence {index} ({cached.key.hex()})"
    if sequence.key != cached.key:
        report.problems.append(f"{where}: its key is not that of its tokens, mask and documents.")
    report.problems += _sketch_problems(where, cached.targets.coefficients, wanted.coefficients, manifest)
    layout = manifest.layout(ShardCounts.of([sequence]))
    rounded = targets_of(encode(layout, sequence, wanted), layout)
    found = []
    for temperature in manifest.temperatures:
        lost = [difference.value for difference in differences(rounded, wanted, temperature)]
        report.rounding_error = max(report.rounding_error, *lost)
        ours = differences(cached.targets, wanted, temperature)
        if manifest.top_p is not None and temperature == manifest.top_p_temperature:
            ours.append(difference_of_cuts(cached.targets, wanted, manifest.top_p, temperature))
        report.largest = max(report.largest, *(difference.value for difference in ours))
        found += [(where, difference) for difference in ours]
    report.num_sequences += 1
    report.num_targets += len(wanted)
    return found


def _sketch_problems(where: str, cached_NR: np.ndarray, wanted_NR: np.ndarray, manifest: CacheManifest) -> list[str]:
    """Integers of the tail sketch that arithmetic alone does not explain, if there are any."""
    apart_NR = np.abs(cached_NR.astype(np.int32) - wanted_NR)
    allowed = 1 if manifest.teacher.get("dtype") == "float32" else LEVELS_OF_NOISE
    if not apart_NR.size or (apart_NR.max() <= allowed and apart_NR.mean() <= MEAN_NOISE * allowed):
        return []
    return [f"{where}: coefficients of the tail sketch are up to {apart_NR.max()} apart; {allowed} is allowed."]


def _capture_settings(config: AuditConfig, manifest: CacheManifest) -> TeacherConfig:
    """The settings of the capture, with what the audit's own say on top."""
    values = {name: value for name, value in manifest.settings.items() if name in _TAKEN_OVER}
    own = {name: getattr(config, name) for name in _OWN}
    values |= {name: value for name, value in own.items() if value is not None}
    decided = {
        "teacher": config.teacher,
        **asdict(manifest.spec),
        "dtype": manifest.teacher.get("dtype"),
        "engine": config.engine or manifest.teacher.get("engine"),
    }
    try:
        return load_config(TeacherConfig, None, values | decided)
    except ConfigError as exc:
        raise CacheMismatchError(f"{config.cache}: its manifest has settings that no capture has: {exc}") from exc


_ARITHMETIC = ("tensor_parallel", "pipeline_parallel", "batch_tokens", "gpu_memory_utilization", "enforce_eager")
_OWN = (*_ARITHMETIC, "trust_remote_code")
_TAKEN_OVER = (*_ARITHMETIC, "logits_bytes", "row_chunk", "quantization")
"""Settings of the capture that decide its arithmetic. A manifest may come from a stranger: nothing else is taken."""


def _require_same(teacher: dict[str, str], manifest: CacheManifest, config: AuditConfig) -> None:
    recorded = {name: value for name, value in manifest.teacher.items() if name != "engine"}
    different = entries_that_differ(recorded, teacher, sorted(recorded | teacher))
    if different:
        found = told(different, "is", quoted=False)
        raise CacheMismatchError(
            f"{config.teacher}: is not the teacher that made {config.cache}: {found}; an audit needs that teacher."
        )
