"""Stage one: run the teacher over a tokenised corpus and cache its sparse targets."""

from stages.cache_logits.run import cache_logits

__all__ = ["cache_logits"]
