"""Every entry of every document, replaced by what a stranger may put there: the right result, or one line."""

import dataclasses
import json
import os
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import open_cache
from pipeline.cache.commits import COMMITS, commit_path, list_commits
from pipeline.cache.folder import CacheFolder
from pipeline.cache.index import INDEX
from pipeline.cache.manifest import COPY, MANIFEST, TOKENIZER, CacheManifest
from pipeline.cache.repair import repair_cache, repair_manifest
from pipeline.cache.verify import verify_cache
from pipeline.corpus import Corpus
from pipeline.documents import is_file_name
from pipeline.errors import PipelineError
from pipeline.inspection.run import inspect_cache
from pipeline.inspection.settings import InspectConfig
from pipeline.lifecycle.convert import convert_cache
from pipeline.lifecycle.export import RECORD, export_cache
from pipeline.lifecycle.merge import merge_caches
from pipeline.lifecycle.reuse import KnownTargets
from pipeline.lifecycle.settings import ConvertConfig, ExportConfig, MergeConfig
from pipeline.progress import Reporter
from pipeline.runs.events import EVENTS
from pipeline.runs.failures import Failure, read_failure, record_failure
from pipeline.runs.heartbeat import WORKERS
from pipeline.runs.leases import LEASES
from pipeline.runs.status import StatusReader, describe
from pipeline.selection.run import select
from pipeline.selection.settings import SelectConfig
from pipeline.stores.places import store_of
from pipeline.stores.sealed import read_json, write_json
from stages.prepare.run import prepare
from stages.prepare.settings import PrepareConfig
from stages.train_student.checkpoints import MARK, newest_whole_checkpoint, read_mark
from stages.train_student.checks import RUN, require_targets
from stages.train_student.checks import open_folder as open_training
from stages.train_student.run import METRICS, read_metrics
from stages.train_student.sampler import StepShape
from stages.train_student.settings import TrainConfig
from tests.support.evil import attempt, forgeries, put, tree
from tests.support.helpers import run, tiny_tokenizer
from tests.support.small import fake_manifest, make_corpus, random_sequences
from tests.support.workers import run_worker

SHAPE = StepShape(batch_size=1, accumulation=1, rank=0, world_size=1)
MEMORY_MB = 300
"""What all cases of a test may add to the process."""


def slow(value: str) -> Any:
    """A value for which a test takes seconds."""
    return pytest.param(value, marks=pytest.mark.slow)


@dataclasses.dataclass
class Scene:
    """A finished run of each container and all that can be read of it, in a folder with something worth stealing."""

    root: Path
    caches: dict[str, Path]
    corpus: Path
    contents: list[bytes]

    def __post_init__(self) -> None:
        self.before = tree(self.root, self.root / "work")

    def untouched(self) -> None:
        """Nothing but what is in work/ has changed."""
        assert tree(self.root, self.root / "work") == self.before


@pytest.fixture(scope="module")
def scene(tmp_path_factory) -> Scene:
    root = tmp_path_factory.mktemp("scene")
    (root / "outside").mkdir()
    (root / "outside" / "mine").write_text("mine\n")
    (root / "student").mkdir()
    (root / "student" / "config.json").write_text('{"model_type": "llama", "vocab_size": 300}')
    corpus = make_corpus(root / "corpus", random_sequences(12, vocab_size=300))
    caches = {}
    for container in ("arrow", "zarr"):
        folder = caches[container] = root / "made" / container
        manifest = fake_manifest(Corpus(corpus), container=container, tail_samples=2)
        manifest = dataclasses.replace(manifest, settings={"lease_s": 60.0, "max_failures": 3, "batch_tokens": 512})
        CacheFolder.begin(folder, manifest, corpus / TOKENIZER)
        run_worker(folder, corpus)
        record_failure(store_of(folder), Failure(partition=0, reason="a reason", owner="host.1.2", alone=True), 1)
        (folder / LEASES / "00000.1").write_text("host.1.2")
    contents = [sequence.key for sequence in open_cache(caches["arrow"])]
    return Scene(root, caches, corpus, contents)


@pytest.fixture
def work(scene) -> Any:
    """A copy of each cache to forge in; what lies beside it must stay as it is."""
    folder = scene.root / "work"
    shutil.rmtree(folder, ignore_errors=True)
    for container, cache in scene.caches.items():
        shutil.copytree(cache, folder / container)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield folder
    scene.untouched()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < MEMORY_MB * 1024


def read_all(cache: Path, scene: Scene) -> None:
    """Every sequence; what comes is what was written."""
    assert [sequence.key for sequence in open_cache(cache)] == scene.contents


def look(cache: Path, scene: Scene) -> None:
    assert describe(StatusReader(cache).read(num_events=20))
    if (cache / "failures" / "00000.1.json").exists():
        assert read_failure(store_of(cache), 0, 1).partition in range(2**53)


def verify(cache: Path, scene: Scene) -> None:
    """The problems are lines that name their file."""
    for problem in verify_cache(cache, workers=1).problems:
        assert str(cache) in problem
        assert "\n" not in problem


def repair(cache: Path, scene: Scene) -> None:
    repair_manifest(cache)
    repair_cache(cache, verify_cache(cache, workers=1))


def export(cache: Path, scene: Scene) -> None:
    out = cache.parent / "exported"
    shutil.rmtree(out, ignore_errors=True)
    export_cache(ExportConfig(cache=cache, to="parquet", out=out, temperature=1.0, workers=1))


def convert(cache: Path, scene: Scene) -> None:
    out = cache.parent / "converted"
    shutil.rmtree(out, ignore_errors=True)
    other = {"arrow": "zarr", "zarr": "arrow"}[cache.name]
    convert_cache(ConvertConfig(cache=cache, format=other, out=out, workers=1))
    read_all(out, scene)


def merge(cache: Path, scene: Scene) -> None:
    out = cache.parent / "merged"
    shutil.rmtree(out, ignore_errors=True)
    merge_caches(MergeConfig(caches=(cache, scene.caches["arrow"]), out=out, workers=1))
    assert sorted(sequence.key for sequence in open_cache(out)) == sorted(scene.contents)


def reuse(cache: Path, scene: Scene) -> None:
    known = KnownTargets([cache], CacheManifest.read(scene.caches["arrow"]))
    for sequence in Corpus(scene.corpus).rows():
        if (place := known.find_one(sequence.key)) is not None:
            assert len(known.load(place, sequence.key).targets) == len(sequence.target_positions)


def train(cache: Path, scene: Scene) -> None:
    out = cache.parent / "trained"
    shutil.rmtree(out, ignore_errors=True)
    config = TrainConfig(
        student=scene.root / "student" / "config.json", cache=cache, out=out, temperature=2.0, tail="hybrid"
    )
    manifest = CacheManifest.read(cache)
    require_targets(config, config.cache[0], manifest)
    open_training(config, [manifest], [], SHAPE)
    open_training(config, [manifest], [], SHAPE)


def plan(cache: Path, scene: Scene) -> None:
    """What a worker does with the folder before it works."""
    CacheFolder.begin(cache, CacheManifest.read(scene.caches[cache.name]), scene.corpus / TOKENIZER)
    list_commits(store_of(cache))


QUICK = (read_all, look, verify, train, plan)
SLOW = (export, convert, merge, reuse, repair)
SEALED = {MANIFEST: True, COPY: True, f"{COMMITS}/00001.json": True, "failures/00000.1.json": True}


def documents_of(cache: Path) -> dict[str, bool]:
    """Names of the documents of a cache, and whether each has a seal."""
    (record,) = (cache / WORKERS).iterdir()
    return SEALED | {f"{WORKERS}/{record.name}": False}


def forge_all(cache: Path, scene: Scene, uses: tuple[Callable, ...], take: Callable[[list], list]) -> int:
    """Try every use with the forgeries that `take` leaves; returns how many uses that were."""
    count = 0
    for name, sealed in documents_of(cache).items():
        path = cache / name
        contents = path.read_bytes()
        document = read_json(path, PipelineError) if sealed else json.loads(contents)
        for what, forged in take(list(forgeries(document, scene.root / "outside"))):
            for use in uses:
                put(path, forged, sealed=sealed)
                attempt(lambda use=use: use(cache, scene), cache.parent, f"{use.__name__}: {name}: {what}")
                count += 1
                if use is repair or (cache / INDEX).exists():
                    shutil.rmtree(cache)
                    shutil.copytree(scene.caches[cache.name], cache)
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(contents)
    return count


@pytest.mark.parametrize(
    ("value", "fits"),
    [("a", True), ("...", True), ("tokenizer.json", True), ("名前.txt", True), ("x" * 255, True)]
    + [(name, False) for name in ("", ".", "..", "a/b", "/a", "a\\b", "a\nb", "a\0", "\x9b2J", "x" * 256, "a\u2028")],
)
def test_plain_names(value, fits):
    assert is_file_name(value) == fits


def test_forged_documents_of_a_cache(scene, work):
    """A sample of all forgeries; the slow test below takes many."""
    some = random.Random(0)
    assert forge_all(work / "arrow", scene, QUICK, lambda cases: some.sample(cases, 8)) == 200
    assert forge_all(work / "zarr", scene, SLOW, lambda cases: some.sample(cases, 2)) == 50


@pytest.mark.slow
@pytest.mark.parametrize("container", ["arrow", "zarr"])
def test_many_forged_documents_of_a_cache(scene, work, container):
    """Every third forgery; with `WHOLE_FUZZ` in the environment every one: over 8,000 uses and some minutes."""
    step = 1 if "WHOLE_FUZZ" in os.environ else 3
    count = forge_all(work / container, scene, QUICK + SLOW, lambda cases: cases[::step])
    print(f"{count} uses of forged documents")
    assert count > 8000 / step * 0.9


@pytest.fixture
def corpus_of_files(scene, work) -> PrepareConfig:
    """Settings of a corpus of one file; its text lies in work/."""
    (work / "text").mkdir()
    (work / "text" / "a.jsonl").write_text('{"text": "The keeper wrote down what was seen."}\n')
    tiny_tokenizer(work / "tokenizer")
    return PrepareConfig(inputs=(work / "text",), tokenizer=work / "tokenizer", out=work / "made", sequence_length=16)


def read_corpus(folder: Path) -> None:
    corpus = Corpus(folder)
    assert len(list(corpus.rows())) == len(corpus) == len(corpus.keys()) == len(corpus.lengths()[0])


def forge(path: Path, scene: Scene, uses: tuple[Callable[[], Any], ...], take: Callable[[list], list]) -> int:
    """Try every use with the forgeries of one sealed document that `take` leaves; returns how many uses that were."""
    document, count = read_json(path, PipelineError), 0
    for what, forged in take(list(forgeries(document, scene.root / "outside"))):
        for use in uses:
            put(path, forged, sealed=True)
            attempt(use, scene.root, f"{path.name}: {what}")
            count += 1
    put(path, document, sealed=True)
    return count


def forge_corpus(config: PrepareConfig, scene: Scene, take: Callable[[list], list]) -> int:
    """A finished corpus; then one whose second unit cannot be read, so that the record of the first is taken up."""
    prepare(config)
    count = forge(config.out / "corpus.json", scene, (lambda: read_corpus(config.out), lambda: prepare(config)), take)
    (config.inputs[0] / "b.txt").write_bytes(b"\xff")
    halted = dataclasses.replace(config, out=config.out.with_name("halted"), workers=1)
    attempt(lambda: prepare(halted, unit_bytes=1), scene.root, "a text that is none")
    record = halted.out / "units" / "commits" / "00000.json"
    document = read_json(record, PipelineError)

    def resume() -> None:
        attempt(lambda: prepare(halted, unit_bytes=1), scene.root, "a text that is none")
        record.touch()

    count += forge(record, scene, (resume,), take)
    put(record, document, sealed=True)
    return count + forge(halted.out / "units" / "plan.json", scene, (resume,), take)


def forge_training(work: Path, scene: Scene, take: Callable[[list], list]) -> int:
    """What a training has written about itself, and the record of an export."""
    cache, out = work / "arrow", work / "trained"
    train(cache, scene)
    checkpoint = out / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    write_json(checkpoint / MARK, {"step": 2, "sums": [0.5, 0.25, 0.25], "good_steps": 1, "history": [0.5, 0.25]})
    write_json(out / METRICS, {"steps": 2, "eval_cross_entropy": 1.5, "train_seconds": 0.5})
    config = TrainConfig(
        student=scene.root / "student" / "config.json", cache=cache, out=out, temperature=2.0, tail="hybrid"
    )
    count = forge(out / RUN, scene, (lambda: open_training(config, [CacheManifest.read(cache)], [], SHAPE),), take)
    count += forge(checkpoint / MARK, scene, (lambda: read_mark(newest_whole_checkpoint(out / "checkpoints")),), take)
    count += forge(out / METRICS, scene, (lambda: read_metrics(out),), take)
    settings = ExportConfig(cache=cache, to="parquet", out=work / "exported", temperature=1.0, workers=1)
    export_cache(settings)
    count += forge(settings.out / RECORD, scene, (lambda: export_cache(settings),), take)
    view = work / "view.json"
    select(SelectConfig(cache=cache, out=view, by="document", keep=0.5))
    return count + forge(view, scene, (lambda: list(open_cache(view)), lambda: list(inspected(view))), take)


def inspected(view: Path) -> Iterator[str]:
    return inspect_cache(InspectConfig(cache=view, worst=1, sample=0), Reporter())


def test_forged_documents_of_corpora_trainings_and_exports(scene, work, corpus_of_files):
    some = random.Random(0)

    def take(cases: list) -> list:
        return some.sample(cases, min(12, len(cases)))

    assert forge_corpus(corpus_of_files, scene, take) >= 48
    assert forge_training(work, scene, take) == 72


@pytest.mark.slow
def test_every_forged_document_of_corpora_trainings_and_exports(scene, work, corpus_of_files):
    count = forge_corpus(corpus_of_files, scene, list) + forge_training(work, scene, list)
    print(f"{count} uses of forged documents")
    assert count > 1500


EVENT = {"time": "2026-01-01T00:00:00.000+00:00", "worker": 0, "owner": "host.1.2", "what": "committed", "partition": 1}


def test_forged_events_are_shown_harmless_or_passed_over(scene, work):
    log = next((work / "arrow" / EVENTS).iterdir())
    sound = len(log.read_bytes().splitlines())
    forged = [event for _, event in forgeries(EVENT, scene.root / "outside")]
    log.write_bytes(log.read_bytes() + b"".join(json.dumps(event).encode() + b"\n" for event in forged))
    with log.open("ab") as file:
        file.write(b"[" * 100_000 + b"\n" + b'{"time": \xff}\n\x00\n' + b'{"time": 1' + b"0" * 5000 + b"}\n")
    events = StatusReader(work / "arrow").read(num_events=10_000).events
    assert sound < len(events) < sound + len(forged)
    lines = describe(StatusReader(work / "arrow").read(num_events=10_000))
    assert all(line.isprintable() and len(line) < 10_000 for line in lines)


def test_what_a_terminal_obeys_is_not_printed(scene, work):
    """From a failure, an event, a worker's record and a shard's name."""
    cache, escape = work / "arrow", "\x1b]0;owned\x07\x9b2J\r\u202egnp"
    commit_path(cache, 0).unlink()
    (cache / "failures" / "00000.1.json").unlink()
    record_failure(store_of(cache), Failure(partition=0, reason=escape, owner=escape, alone=True), 1)
    (record,) = (cache / WORKERS).iterdir()
    record.write_text(
        json.dumps(json.loads(record.read_text()) | {"state": "failed", "reason": escape, "host": escape})
    )
    log = next((cache / EVENTS).iterdir())
    log.write_text(json.dumps(EVENT | {"reason": escape, escape: escape, "owner": escape, "time": escape}) + "\n")
    for arguments in (("status", cache, "--events", 9), ("verify", cache), ("export", cache, "--out", work / "out")):
        code, out, err = run(*arguments)
        assert code != 0
        assert all(line.isprintable() for line in (out + err).splitlines()), (out, err)
    assert "owned" in run("status", cache)[1]


@pytest.mark.parametrize(
    "name", ["0", "00000 (copy).json", "0000x.json", "00000.json.bak", "٠٠٠٠٠.json", "9" * 200 + ".json"]
)
@pytest.mark.parametrize("place", [COMMITS, "failures", LEASES, WORKERS, "shards", EVENTS])
def test_files_of_other_names_are_passed_over(scene, work, place, name):
    """What a tool that copies or synchronises leaves behind."""
    path = work / "arrow" / place / name
    path.write_bytes(b"")
    read_all(work / "arrow", scene)
    look(work / "arrow", scene)
    verify(work / "arrow", scene)
    plan(work / "arrow", scene)
    assert StatusReader(work / "arrow").read().state == "complete"


def test_record_of_a_partition_beyond_the_plan_completes_nothing(scene, work):
    commit_path(work / "arrow", 0).rename(commit_path(work / "arrow", 99))
    assert StatusReader(work / "arrow").read().state == "incomplete"


@pytest.mark.parametrize("kind", ["pipe", *(slow(kind) for kind in ("absent", "empty", "folder", "link to itself"))])
@pytest.mark.parametrize("container", ["arrow", slow("zarr")])
def test_files_that_are_none(scene, work, container, kind):
    """In the place of every file and folder of a cache; nothing waits for a pipe."""
    cache = work / container
    open_cache(cache)
    places = [
        cache / place for place in (*documents_of(cache), COMMITS, WORKERS, EVENTS, LEASES, TOKENIZER, "shards", INDEX)
    ]
    places += [
        next((cache / "shards").iterdir()),
        next((cache / EVENTS).iterdir()),
        cache / TOKENIZER / "tokenizer.json",
    ]
    for path in places:
        for use in (read_all, look, verify, repair):
            shutil.rmtree(cache)
            shutil.copytree(scene.caches[container], cache)
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
            if kind == "empty":
                path.write_bytes(b"")
            elif kind == "folder":
                path.mkdir()
            elif kind == "pipe":
                os.mkfifo(path)
            elif kind == "link to itself":
                path.symlink_to(path.name)
            attempt(lambda use=use: use(cache, scene), cache, f"{use.__name__}: {kind} {path.name}")
