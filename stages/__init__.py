"""The stages of the pipeline; they meet only in the manifest of a cache."""
