"""Files whose names begin with a number: commit records, leases, failures, shards."""

import re
from collections.abc import Iterable

from pipeline.files import PARTIAL
from pipeline.stores.store import Store


def list_names(folder: Store) -> list[str]:
    """Names of the numbered files in a folder, less those that are being written; empty if there is no folder."""
    return [name for name in folder.names() if "0" <= name[:1] <= "9" and not name.endswith(PARTIAL)]


def numbers_in(names: Iterable[str], form: str) -> list[tuple[int, ...]]:
    """The numbers in the names that have this form, a regular expression; names of others are not ours."""
    found = (re.fullmatch(form, name, re.ASCII) for name in names)
    return [tuple(map(int, match.groups())) for match in found if match]
