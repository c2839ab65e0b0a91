"""The error of a library that no longer has, or no longer calls, what stage two relies on."""

from importlib.metadata import version

from pipeline.errors import PipelineError


def changed(library: str, tried: str, hook: str, problem: str) -> PipelineError:
    """An error that names the library, its version, the hook and what would go wrong without it."""
    return PipelineError(
        f"{library} {version(library)}: {hook}: {problem}. This version of the pipeline was tried with "
        f"{library} {tried}; install that one."
    )
