"""Stage zero: text in, tokenised, masked, packed and deduplicated partitions out.

    inputs.py     paths -> input files -> units of work
    readers.py    a file -> records
    chat.py       a conversation -> text and the spans that the assistant wrote
    documents.py  records -> token ids and loss masks
    packing.py    documents -> rows of at most `sequence_length` tokens
    units.py      what is finished, on disk: resuming after a crash
    run.py        the run

Knows nothing of teachers.
"""

from stages.prepare.run import prepare

__all__ = ["prepare"]
