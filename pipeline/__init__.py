"""Cache a teacher's exact sparse targets once; train any number of students from the shards.

from pipeline import open_cache
cache = open_cache(path)        # len(cache), cache[i]
"""

from typing import TYPE_CHECKING, Any

from pipeline.starting import begin

if TYPE_CHECKING:
    from pipeline.cache.reader import Cache, open_cache

__all__ = ["Cache", "open_cache"]

begin()


def __getattr__(name: str) -> Any:
    """`Cache` and `open_cache`, loaded when asked for: a command has to begin before it loads anything large."""
    if name not in __all__:
        raise AttributeError(f"module 'pipeline' has no attribute {name!r}")
    from pipeline.cache import reader

    return getattr(reader, name)
