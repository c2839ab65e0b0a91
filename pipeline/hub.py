"""Models and tokenizers by the names that a model hub has for them: `owner/name`, or `owner/name@revision`.

huggingface_hub finds and keeps them: its cache, HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE mean what they mean
to it. A name becomes the folder of one commit, so that nothing behind this module asks a hub.
"""

import contextlib
import os
import re
from collections.abc import Iterator, MutableMapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

from pipeline.errors import ConfigError
from pipeline.progress import Reporter
from pipeline.settings import Settings

Config = TypeVar("Config", bound=Settings)

NAME = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[^@\s]+))?")
SNAPSHOT = re.compile(r"models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{40})")
"""The end of a path in huggingface_hub's cache."""
SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "*.py")
WEIGHTS = "*.safetensors"
PICKLED_WEIGHTS = "*.bin"
"""Fetched where a model has no others."""
LEFT_OUT = ("original/*", "consolidated*", "*/*.safetensors", "*/*.bin")
"""The same weights in other libraries' formats."""
OFFLINE, USERS_OFFLINE = "HF_HUB_OFFLINE", "PIPELINE_HUB_OFFLINE"
"""Environment variables: what keeps libraries from asking a hub on their own, and what the user had said about it."""


def stay_offline(environment: MutableMapping[str, str]) -> None:
    """Keep all libraries from asking a hub; what this module is asked for is fetched unless the user had said no."""
    environment.setdefault(USERS_OFFLINE, environment.get(OFFLINE) or environment.get("TRANSFORMERS_OFFLINE", "0"))
    environment[OFFLINE] = "1"


def located(config: Config, setting: str, reporter: Reporter, *, with_weights: bool = True) -> Config:
    """The config with a folder where `setting` is a name of the hub's; as it is where a path or nothing is given.

    Raises ConfigError, which says what was looked for, where, and what to do.
    """
    path = getattr(config, setting)
    if path is None or path.exists() or not (named := NAME.fullmatch(str(path))):
        return config
    folder = _folder_of(named["repo"], named["revision"], with_weights, reporter)
    return replace(config, **{setting: folder})


def name_of(folder: Path) -> str:
    """`owner/name@commit` of a folder in huggingface_hub's cache; the path of any other."""
    found = SNAPSHOT.search(folder.as_posix())
    return f"{found['owner']}/{found['name']}@{found['commit']}" if found else str(folder)


def _folder_of(repo: str, revision: str | None, with_weights: bool, reporter: Reporter) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    def fetch(*patterns: str) -> Path:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(LEFT_OUT))
        )

    what = repo if revision is None else f"{repo}@{revision}"
    with _as_the_user_has_it():
        where = "offline" if constants.HF_HUB_OFFLINE else f"at {constants.ENDPOINT}"
        try:
            with reporter.waiting(f"{what}: from the hub or its cache"):
                folder = fetch(*SETTINGS, *((WEIGHTS,) if with_weights else ()))
                if with_weights and not any(folder.glob(WEIGHTS)):
                    folder = fetch(*SETTINGS, PICKLED_WEIGHTS)
        except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as exc:
            reason = str(exc).strip().splitlines()[0] if str(exc).strip() else type(exc).__name__
            download = f"hf download {repo}" + (f" --revision {revision}" if revision else "")
            raise ConfigError(
                f"{what}: no folder of that path here, and no such model {where} or in {constants.HF_HUB_CACHE} "
                f"({reason[:300]}); run `{download}` where the hub can be reached, or give a folder."
            ) from exc
    reporter.log(f"{what}: {name_of(folder)}")
    return folder


@contextlib.contextmanager
def _as_the_user_has_it() -> Iterator[None]:
    """For the time of the block, the hub is asked unless the user has said no."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if (said := os.environ.get(USERS_OFFLINE)) is not None:
        constants.HF_HUB_OFFLINE = said.upper() in constants.ENV_VARS_TRUE_VALUES
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
