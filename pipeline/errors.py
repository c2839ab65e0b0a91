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

MENDABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EFBIG}
MENDABLE |= {errno.ENOTDIR, errno.EISDIR, errno.ELOOP}
"""Operating-system errors that are the user's to mend, and that no other partition would be spared: a full disk, a
read-only folder, a file in the place of a folder."""


class PipelineError(Exception):
    """A mistake or a fault that the user can mend."""

    exit_code = 2


class ConfigError(PipelineError):
    """A setting, a flag or a YAML key is wrong."""


class CorpusError(PipelineError):
    """Input text or a tokenised corpus is missing, empty or damaged."""


class EngineError(PipelineError):
    """The teacher cannot be served by the chosen engine."""


class Drained(PipelineError):
    """A signal asked the command to stop; what was in hand is finished and saved."""

    exit_code = 75


class StorageError(PipelineError):
    """An object store refuses a request."""


class StorageSilentError(StorageError):
    """An object store did not answer for as long as it is waited for; nothing is wrong with the command."""

    exit_code = 75


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
