"""Stage zero: text in, a tokenised, masked, packed and deduplicated corpus out.

    inputs.py         paths and URLs -> input files -> units of work
    plan.py           the plan: files, units, and the tasks that they make
    staging.py        what a task leaves on disk: its record, tokens, keys
    duplicates.py     which keys are there twice, over all units
    readers.py        a file -> records; json_files.py: of a .json file
    forms.py          a record's fields -> text, a prompt with its completion, or a conversation
    conversations.py  messages in the one form that templates take
    needs.py          what a chat template wants of messages
    chat.py           a conversation -> text and the spans that the assistant wrote
    thoughts.py       blocks of thinking that a template inserts
    tokens.py         text and spans -> token ids and loss masks
    documents.py      records -> documents: forms, templates and tokens in a row
    packing.py        documents -> rows of at most `sequence_length` tokens
    tasks.py          each task, from what earlier ones have left to its own record
    worker.py         a worker: takes tasks, phase after phase
    run.py            the command: a plan, processes that share it, a finished corpus
    preview.py        the first rows as a person reads them

Knows nothing of teachers.
"""
