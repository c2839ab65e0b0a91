"""What finding duplicates costs at scale, with the real code and keys that are random.

    python -m benchmarks.prepare_scale --documents 1000000000 --units 10000 FOLDER

A billion documents in 10,000 units are 256 buckets of keys. One of them is made and done: every unit's file holds its
keys of that bucket alone. Of a hundred keys one is another unit's. The files take 20 bytes a key.
"""

import argparse
import resource
import time
from pathlib import Path

import numpy as np

from pipeline.stores.local_store import LocalStore
from stages.prepare.duplicates import MOST_BUCKETS, Duplicates, find_duplicates
from stages.prepare.staging import STAGED, StagedFile, write_keys

REPEATED = 100


def main() -> None:
    """Make a bucket, find its duplicates, and print what that took."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--documents", type=int, default=1_000_000_000)
    parser.add_argument("--units", type=int, default=10_000)
    options = parser.parse_args()
    folder = LocalStore(options.folder)
    (folder / STAGED).mkdir(parents=True)
    count = options.documents // options.units // MOST_BUCKETS
    units = list(_make_units(folder, options.units, count))
    before, started = resource.getrusage(resource.RUSAGE_SELF), time.process_time()
    task = find_duplicates(folder, 0, 0, 1, units)
    seconds, after = time.process_time() - started, resource.getrusage(resource.RUSAGE_SELF)
    found = task.statistics["duplicates"]
    started = time.process_time()
    duplicates = Duplicates(folder, [task])
    numbers = sum(len(duplicates.of(unit)) for unit in range(0, options.units, 100))
    lookup = (time.process_time() - started) / (options.units // 100)
    print(
        f"{count * options.units:,} keys of {options.units:,} units: {found:,} duplicates in {seconds:.1f} CPU s, "
        f"{(after.ru_maxrss - before.ru_maxrss) / 1024:,.0f} MB more than before; {numbers:,} looked up, "
        f"{1e3 * lookup:.2f} ms a unit"
    )


def _make_units(folder: LocalStore, num_units: int, count: int) -> list[StagedFile]:
    random = np.random.default_rng(0)
    staged, earlier = [], random.bytes(16 * (count // REPEATED))
    for unit in range(num_units):
        own = random.bytes(16 * (count - count // REPEATED))
        keys = earlier + own
        path = folder / STAGED / f"{unit:05d}.keys"
        write_keys(path, [keys[start : start + 16] for start in range(0, len(keys), 16)])
        staged.append(StagedFile(file=path.name, bytes=path.stat().st_size, xxh3_128="0" * 32))
        earlier = own[: 16 * (count // REPEATED)]
    return staged


if __name__ == "__main__":
    main()
