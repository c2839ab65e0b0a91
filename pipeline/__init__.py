"""Cache a teacher's exact sparse targets once; train any number of students from the shards.

from pipeline import open_cache
cache = open_cache(path)        # len(cache), cache[i]
"""

from pipeline.shards.reader import Cache, open_cache

__all__ = ["Cache", "open_cache"]
