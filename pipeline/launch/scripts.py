"""Scripts that a person can read, edit and submit by hand."""

import string
from pathlib import Path


class Script(string.Template):
    """A template whose names begin with @, so that the shell's own $ can stand as it is."""

    delimiter = "@"


def write_script(path: Path, template: str, **values: object) -> None:
    """Fill the template and write it, executable."""
    path.write_text(Script(template).substitute(values), encoding="utf-8")
    path.chmod(0o755)
