"""One worker of a run whose cache lies in an object store.

A store has no files to lease, so workers do not know what the others have in hand: each takes its own
share, and then what is still missing. Where two score one partition, the first commit wins. What is
lost by that is work at the end of a run; an error stops the worker that met it.
"""

from collections.abc import Callable, Iterator
from contextlib import closing

from pipeline.corpus import Corpus, TokenSequence
from pipeline.errors import Drained
from pipeline.manifest import CacheManifest
from pipeline.progress import Reporter
from pipeline.runs.commits import ShardCommit, is_committed, list_commits
from pipeline.runs.drain import Drain
from pipeline.runs.rank import Rank
from pipeline.storage import ObjectPath
from pipeline.targets import SparseTargets
from stages.cache_logits.capture import capture
from stages.cache_logits.engine import Engine
from stages.cache_logits.worker import Tally


def work_in_store(
    folder: ObjectPath,
    corpus: Corpus,
    manifest: CacheManifest,
    make_engine: Callable[[], Engine],
    *,
    rank: Rank,
    reporter: Reporter,
) -> None:
    """Work until every partition is committed, by whichever worker. Raises Drained after a signal."""
    done = list_commits(folder)
    share = manifest.num_tokens * (manifest.num_partitions - len(done)) // manifest.num_partitions // rank.workers
    tally, num_bytes = Tally(manifest.temperatures[-1]), [0]
    with Drain() as drain, reporter.progress("cache-logits", share) as progress:

        def missing() -> Iterator[int]:
            for partition in rank.order(manifest.num_partitions):
                if drain.requested:
                    return
                if partition not in done and not is_committed(folder, partition):
                    yield partition

        def on_sequence(sequence: TokenSequence, targets: SparseTargets) -> None:
            progress.advance(len(sequence.token_ids), tally.note(targets, num_bytes[0]))

        def on_commit(partition: int, commit: ShardCommit | None) -> None:
            num_bytes[0] += commit.bytes if commit is not None else 0

        with drain.shielded():
            engine = make_engine()
        with closing(engine):
            capture(engine, corpus, manifest, folder, missing(), on_sequence, on_commit)
    if drain.requested and len(list_commits(folder)) < manifest.num_partitions:
        raise Drained(f"{folder}: drained; run the same command again to continue.")
