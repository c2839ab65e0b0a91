"""What a library logs and nobody would see: some of it decides what a model or a tokenizer is."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def warnings_of(logger_name: str) -> Iterator[list[str]]:
    """Every warning of one logger inside the block, whatever its level is; they are not shown."""
    logger = logging.getLogger(logger_name)
    handler, messages = logging.Handler(logging.WARNING), list[str]()
    handler.emit = lambda record: messages.append(record.getMessage())  # type: ignore[method-assign]
    level, propagates = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)  # at WARNING transformers' loading also looks for a plan of tensor parallelism
    logger.propagate = False
    try:
        yield messages
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = propagates
