"""Stage one: run the teacher over a tokenised corpus and cache its sparse targets."""
