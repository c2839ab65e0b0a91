"""The errors that a user can mend.

    PipelineError                   printed as one line, exit code 2
    ├── ConfigError                 a setting, a flag or a YAML key
    ├── CorpusError                 input text, or a tokenised corpus
    ├── EngineError                 a teacher that the chosen engine cannot serve
    ├── Drained                     asked to stop: run the same command again (exit code 75)
    ├── StorageError                an object store that refuses
    │   └── StorageSilentError      one that does not answer: run the same command again (exit code 75)
    └── CacheError                  a folder of cached targets
        ├── PartitionsFailedError   partitions were set aside after failures; the rest is captured
        ├── CacheIncompleteError    partitions are missing: run `pipeline cache-logits` again
        ├── CacheCorruptError       a file is damaged; `pipeline verify` names all of them
        └── CacheMismatchError      made by other settings, or for another vocabulary

A message says where, what was found, what was expected and what to do. Anything that is not
a PipelineError is a bug of ours or a fault of the machine and keeps its traceback.
"""

import errno
import os
import re

from pipeline import exit_codes

MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
MENDABLE |= {errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.EMFILE, errno.ENFILE, errno.ENOTSUP}
"""Operating-system errors that are the user's to mend, and that no other partition would be spared: a full disk, a
read-only folder, a file in the place of a folder, a limit on open files."""
NO_MEMORY = re.compile(r"can't allocate memory|can't start new thread|Cannot allocate memory|malloc of size \d+ failed")
"""What libraries say where they raise no MemoryError."""


class PipelineError(Exception):
    """A mistake or a fault that the user can mend."""

    exit_code = exit_codes.MENDABLE


class ConfigError(PipelineError):
    """A setting, a flag or a YAML key is wrong."""


class CorpusError(PipelineError):
    """Input text or a tokenised corpus is missing, empty or damaged."""


class EngineError(PipelineError):
    """The teacher cannot be served by the chosen engine."""


class Drained(PipelineError):
    """A signal asked the command to stop; what was in hand is finished and saved."""

    exit_code = exit_codes.AGAIN


class StorageError(PipelineError):
    """An object store refuses a request."""


class StorageSilentError(StorageError):
    """An object store did not answer for as long as it is waited for; nothing is wrong with the command."""

    exit_code = exit_codes.AGAIN


class CacheError(PipelineError):
    """A folder of cached targets cannot be used."""


class PartitionsFailedError(CacheError):
    """Some partitions failed again and again and were set aside."""


class CacheIncompleteError(CacheError):
    """Some partitions have not been captured yet."""


class CacheCorruptError(CacheError):
    """A file of the cache is damaged, truncated or foreign."""


class CacheMismatchError(CacheError):
    """The cache was made by other settings, or for another vocabulary."""


def fault_of_machine(error: BaseException) -> str | None:
    """What the operating system refused, as a line, also where a library wraps it; None if it is no such error."""
    if isinstance(error, OSError) and error.errno is not None and (error.filename or error.errno in MENDABLE):
        return f"{error.filename2 or error.filename or 'reading or writing'}: {os.strerror(error.errno)}."
    if isinstance(error, FileNotFoundError) and "temporary directory" in str(error):
        return f"{error.strerror}; set TMPDIR to a folder that can be written."
    if isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM or NO_MEMORY.search(str(error)):
        return f"out of memory: {' '.join(str(error).split())[:200] or 'the system gives no more'}."
    if isinstance(error, UnicodeEncodeError) and error.reason == "surrogates not allowed":
        name = error.object[max(0, error.start - 60) : error.end + 60]
        return f"{name}: the name of a file or folder is not UTF-8; rename it."
    if wrapped := re.search(r"\(os error (\d+)\)", str(error)):  # as libraries written in Rust say it
        return f"reading or writing: {os.strerror(int(wrapped[1]))}."
    return fault_of_machine(error.__cause__) if error.__cause__ is not None else None
