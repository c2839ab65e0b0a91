"""Opens, reads and verifies caches in a process whose memory is limited; started by tests/test_sizes.py.

Prints a JSON line for each: its path, and the error that reading it gave.
"""

import json
import resource
import sys
import time
from pathlib import Path

from pipeline import open_cache
from pipeline.cache.verify import verify_cache
from pipeline.errors import PipelineError

ROOM_BYTES = 400 << 20
"""Address space that reading may take beside what the imports have taken."""


def limit_memory() -> None:
    """From here on, this process gets ROOM_BYTES more."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM_BYTES,) * 2)


def outcome(folder: Path) -> dict[str, object]:
    """What reading a cache came to."""
    started = time.monotonic()
    try:
        cache = open_cache(folder)
        for index in range(min(len(cache), 100)):
            cache[index]
        error = ""
        cache.close()
    except PipelineError as exc:
        error = str(exc)
    try:
        problems = verify_cache(folder, workers=1).problems
    except PipelineError as exc:
        problems = [str(exc)]
    return {"folder": str(folder), "error": error, "problems": problems, "seconds": time.monotonic() - started}


if __name__ == "__main__":
    limit_memory()
    for path in sys.argv[1:]:
        print(json.dumps(outcome(Path(path))), flush=True)
