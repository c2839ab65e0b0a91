"""The command line: the only code that prints results or chooses an exit code.

`exit_codes` says what each code means; what has none keeps its traceback. A command imports its stage inside its
function, so that `--help` loads neither torch nor vllm.
"""

import os
import sys
import time
from typing import Any

import click

from pipeline.cache.settings import VerifyConfig
from pipeline.cpu import prepare_threads
from pipeline.documents import printable
from pipeline.errors import CacheCorruptError, Drained, PipelineError, StorageSilentError, fault_of_machine
from pipeline.exit_codes import DISAGREES, MENDABLE
from pipeline.hub import stay_offline
from pipeline.inspection.settings import InspectConfig
from pipeline.launch.settings import SubmitConfig
from pipeline.lifecycle.settings import ConvertConfig, ExportConfig, MergeConfig
from pipeline.options import config_command
from pipeline.processes import follow_parent
from pipeline.progress import TerminalReporter
from pipeline.runs.settings import StatusConfig
from pipeline.selection.settings import SelectConfig
from pipeline.stopping import Stopped, Unwinding
from pipeline.streams import close_streams, open_streams, remark, require_utf8, say
from stages.cache_logits.settings import AuditConfig, CacheConfig
from stages.demo.settings import DemoConfig
from stages.estimate.settings import EstimateConfig
from stages.prepare.settings import PrepareConfig, PreviewConfig
from stages.train_student.settings import TrainConfig

SHOWN_PROBLEMS = 20
"""Disagreements that an audit lists; the rest is counted."""

QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "TRANSFORMERS_VERBOSITY": "error"}
"""What keeps the libraries from talking over our own progress."""


class _Main(click.Group):
    def invoke(self, context: click.Context) -> Any:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        stay_offline(os.environ)
        prepare_threads()
        follow_parent()
        try:
            return super().invoke(context)
        except (Drained, Stopped) as ended:
            remark(printable(str(ended)))
            sys.exit(ended.exit_code)
        except PipelineError as error:
            remark(f"error: {printable(str(error))}")
            sys.exit(error.exit_code)
        except Exception as error:
            if (fault := fault_of_machine(error)) is None:
                raise
            remark(f"error: {printable(fault)}")
        sys.exit(MENDABLE)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="logit-cache-pipeline")
def main() -> None:
    """Cache a teacher's exact softened targets once; train any number of students from the shards."""


@main.command("prepare")
@config_command(PrepareConfig)
def prepare_command(config: PrepareConfig) -> None:
    """Turn text into a tokenised corpus. INPUTS are files or folders."""
    from stages.prepare.run import prepare

    prepare(config, TerminalReporter())


@main.command("preview")
@config_command(PreviewConfig)
def preview_command(config: PreviewConfig) -> None:
    """Show the first rows of a corpus, or of what INPUTS would become: tokens, labels, documents, what was dropped."""
    from stages.prepare.preview import preview

    color = config.color if config.color is not None else sys.stdout.isatty() and "NO_COLOR" not in os.environ
    for line in preview(config, color):
        click.echo(line, color=color)


@main.command("cache-logits")
@config_command(CacheConfig)
def cache_logits_command(config: CacheConfig) -> None:
    """Score a corpus with the teacher and write its top-k targets to shards.

    Run the same command again after a crash: it continues with what is missing.
    """
    from stages.cache_logits.run import cache_logits

    cache_logits(config, TerminalReporter())


@main.command("estimate")
@config_command(EstimateConfig)
def estimate_command(config: EstimateConfig) -> None:
    """Say what a capture and a training will take: GPU hours, memory, storage. Needs no GPU and no weights."""
    from stages.estimate.run import describe, estimate

    found = estimate(config)
    say(found.to_json() if config.json else "\n".join(describe(found)))


@main.command("submit")
@config_command(SubmitConfig)
def submit_command(config: SubmitConfig) -> None:
    """Start many workers of `cache-logits`, and `train-student` once the cache is whole; or many of `prepare`.

    'local' and 'ray' stay until all is done; 'slurm' and 'kubernetes' write scripts next to the cache (or, for one
    in an object store, next to its settings) and hand them to the cluster.
    """
    from pipeline.submit import submit

    submit(config, TerminalReporter())


@main.command("status")
@config_command(StatusConfig)
def status_command(config: StatusConfig) -> None:
    """Say how a run stands, from the folder or URL CACHE of its cache or corpus alone: while workers work and after
    they have died.

    Exit code 0: complete. 3: not yet. 4: all that is left was set aside after failures.
    """
    from pipeline.runs.status import StatusReader, describe

    reader = StatusReader(config.cache)
    while True:
        try:
            status = reader.read(config.events)
        except StorageSilentError as error:
            if not config.watch:
                raise
            remark(printable(str(error)))
            time.sleep(config.interval_s)
            continue
        if config.watch and sys.stdout.isatty():
            click.clear()
        is_read = say(status.to_json() if config.json else "\n".join(describe(status)))
        if not is_read or not config.watch or status.state != "incomplete":
            sys.exit(status.exit_code)
        time.sleep(config.interval_s)


@main.command("verify")
@config_command(VerifyConfig)
def verify_command(config: VerifyConfig) -> None:
    """Check every file of a cache. Exit code 1 names what is damaged or missing.

    With --repair, damaged shards are dropped with their records, and the exit code is 0: what is then
    missing, the same `pipeline cache-logits` command computes.
    """
    from pipeline.cache.manifest import CacheManifest
    from pipeline.cache.repair import repair_cache, repair_manifest
    from pipeline.cache.verify import verify_cache

    try:
        if config.repair:
            repair_manifest(config.cache)
        num_tokens = CacheManifest.read(config.cache).num_tokens
    except CacheCorruptError as damage:
        say(printable(str(damage)))
        if config.repair:
            say(f"{config.cache}: the manifest and its copy are damaged; put one back from a backup.")
        sys.exit(DISAGREES)
    with TerminalReporter().progress("verify", num_tokens) as progress:
        report = verify_cache(config.cache, progress.advance, config.workers)
    for problem in report.problems:
        say(printable(problem))
    if config.repair:
        repair_cache(config.cache, report)
    if report.problems:
        _say_what_now(config, report)
    else:
        say(
            f"{config.cache}: sound: {report.num_partitions} partitions, {report.num_sequences:,} sequences, "
            f"{report.num_targets:,} targets, {report.bytes / max(report.num_targets, 1):.1f} bytes a target."
        )


def _say_what_now(config: VerifyConfig, report: Any) -> None:
    say(f"{config.cache}: {len(report.problems)} problems in {report.num_partitions} partitions.")
    if not config.repair:
        sys.exit(DISAGREES)
    todo = len(report.damaged) + len(report.missing)
    say(
        f"{config.cache}: repaired: {len(report.damaged)} damaged partitions were dropped; run the same "
        f"`pipeline cache-logits` command again: it computes the {todo} that are missing now."
    )


@main.command("inspect")
@config_command(InspectConfig)
def inspect_command(config: InspectConfig) -> None:
    """Read a cache by eye, finished or not: how much, how sure the teacher was, and what it said of every token.

    Without options a summary, for which no shard is read. --sequence shows one sequence token by token, --worst
    where the teacher was worst, and --html writes a page; these read a sample, and say what share it is.
    """
    from pipeline.inspection.run import inspect_cache

    for line in inspect_cache(config, TerminalReporter()):
        if not say(line):
            break


@main.command("select")
@config_command(SelectConfig)
def select_command(config: SelectConfig) -> None:
    """Select sequences or documents of a cache by what the teacher said of them: a view, which copies no target.

    `train-student`, `inspect`, `export` and `merge` take the view in the place of the cache; so does `select` itself.
    """
    from pipeline.selection.run import select

    if config.student is None:
        select(config, TerminalReporter())
    else:
        from stages.train_student.losses import student_losses

        select(config, TerminalReporter(), student_losses)


@main.command("audit")
@config_command(AuditConfig)
def audit_command(config: AuditConfig) -> None:
    """Score a random sample of a cache again with its teacher. Exit code 1 names what disagrees."""
    from stages.cache_logits.audit import audit_cache

    report = audit_cache(config, TerminalReporter())
    for problem in report.problems[:SHOWN_PROBLEMS]:
        say(printable(problem))
    outcome = f"{len(report.problems)} disagreements" if report.problems else "the teacher agrees"
    say(
        f"{config.cache}: {outcome}: {report.num_sequences:,} sequences, {report.num_targets:,} targets; the largest "
        f"difference of a probability is {report.largest:.2g}, {report.allowed:.2g} is allowed (rounding alone makes "
        f"{report.rounding_error:.2g}, the teacher's arithmetic may make {report.noise:.2g})."
    )
    if report.problems:
        sys.exit(DISAGREES)


@main.command("convert")
@config_command(ConvertConfig)
def convert_command(config: ConvertConfig) -> None:
    """Copy a cache into the other container. Every shard is read back and compared.

    Run the same command again after a crash: it continues with what is missing.
    """
    from pipeline.lifecycle.convert import convert_cache

    convert_cache(config, TerminalReporter())


@main.command("merge")
@config_command(MergeConfig)
def merge_command(config: MergeConfig) -> None:
    """Make one cache of several by the same teacher; a sequence that more than one holds is stored once.

    Run the same command again after a crash: it continues with what is missing.
    """
    from pipeline.lifecycle.merge import merge_caches

    merge_caches(config, TerminalReporter())


@main.command("export")
@config_command(ExportConfig)
def export_command(config: ExportConfig) -> None:
    """Write a cache as the plain lists that other trainers read, at one temperature.

    Run the same command again after a crash: it continues with what is missing. docs/export.md lists the columns.
    """
    from pipeline.lifecycle.export import export_cache

    export_cache(config, TerminalReporter())


@main.command("train-student")
@config_command(TrainConfig)
def train_student_command(config: TrainConfig) -> None:
    """Train a student on cached targets: (1 - alpha) CE + alpha T^2 KL.

    Run the same command again after a crash: it continues from the newest whole checkpoint. On a signal it saves one
    and leaves with exit code 75.
    """
    from stages.train_student.run import train_student

    train_student(config, TerminalReporter())


@main.command("demo")
@config_command(DemoConfig)
def demo_command(config: DemoConfig) -> None:
    """Run everything on this machine: text, a small teacher, its cache, two students, a report."""
    from stages.demo.run import demo

    for line in demo(config, TerminalReporter()):
        say(line)


def run() -> None:
    """The process's entry point: `main`, without the interpreter's teardown once vLLM was loaded.

    Native threads of its libraries now and then abort the process there (exit code -6), when all work
    is done and on the disk.
    """
    unwinding = Unwinding()
    unwinding.begin()
    require_utf8()
    open_streams()
    try:
        main()
    except SystemExit as leaving:
        close_streams()
        if "vllm" in sys.modules and isinstance(leaving.code, int):
            os._exit(leaving.code)
        raise
    finally:
        unwinding.end()


if __name__ == "__main__":
    run()
