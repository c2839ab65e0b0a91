"""What several tests need and none of them is about."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.cli import main
from tests.support import leftovers

LAST_RESORT_S = 500.0
BOS, EOS = "<|begin|>", "<|end|>"
TRAINING_TEXT = (
    "The keeper wrote down what was seen, and then what was missing.\n",
    "def add(first: int, second: int) -> int:\n    return first + second\n",
    "今天的潮水教明天的我，昨天的我教今天的你。\n",
    "<user>question</user><assistant>answer</assistant>\n",
)
CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Without marks: the assistant's turns show only in its prefixes."""
MARKED_CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>"
    "{% if message.role == 'assistant' %}{% generation %}{{ message.content }}</assistant>{% endgeneration %}"
    "{% else %}{{ message.content }}</{{ message.role }}>{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
"""Marks the assistant's text and the tag that ends it, but not the line end after it."""


def run(*arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def wait_until(condition: Callable[[], object], what: str = "") -> None:
    """Poll until the condition holds; an error once all that could bring it about has ended.

    The time is a last resort against a program that hangs: on a busy machine nothing is in a hurry.
    """
    working, deadline = leftovers.children(), time.monotonic() + LAST_RESORT_S
    while not condition():
        if working and not any(map(leftovers.is_running, working)):
            assert condition(), f"{what or 'the condition'}: all processes have ended before it held"
            return
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def tiny_tokenizer(folder: Path, vocab_size: int = 400, chat_template: str | None = None, bos: bool = False) -> Any:
    """A byte-level BPE tokenizer, trained in milliseconds and saved in `folder`.

    It decodes every text to itself and has the end token EOS; with `bos` it puts BOS first, as Llama's does.
    """
    special = [EOS, BOS] if bos else [EOS]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TRAINING_TEXT * 4, trainer)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        bos_token=BOS if bos else None,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=64,
    )
    tokenizer.save_pretrained(str(folder))
    return tokenizer
