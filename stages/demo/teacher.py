"""A tokenizer and a small Llama, trained on the spot in a few minutes on a CPU.

    WORK/
      text/              train.jsonl and heldout.jsonl
      tokenizer/         byte-level BPE, as a transformers folder
      teacher/           config.json, model.safetensors, the tokenizer, recipe.json

Each folder appears under its name when it is whole. Knows nothing of caches or students.
"""

import math
import platform
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import xxhash
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pipeline.documents import Finite, entry_of
from pipeline.errors import CorpusError
from pipeline.files import canonical_json, hash_file, remove_partials, replacing
from pipeline.progress import Progress, Reporter, duration
from pipeline.stores.sealed import read_json, write_json
from pipeline.tokenizer import load_tokenizer, save_tokenizer
from stages.demo.muon import Muon
from stages.demo.recipe import DemoRecipe, teacher_config
from stages.demo.text import TRAIN, collect_text, read_documents

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|pad|>"
RECIPE = "recipe.json"
"""Names what a teacher was made of; written before the folder gets its name."""


@dataclass(frozen=True, kw_only=True)
class FinishedTeacher:
    """A teacher on disk."""

    folder: Path
    """Model and tokenizer."""
    seconds: float
    """Time that the tokenizer and the model took when they were trained."""


def ensure_teacher(work: Path, recipe: DemoRecipe | None = None, reporter: Reporter | None = None) -> FinishedTeacher:
    """The finished teacher in `work`, trained now unless one of the same recipe, text and Python is there.

    The text is collected every time: it takes a second, and tells a changed Python.
    """
    recipe, reporter = recipe or DemoRecipe(), reporter or Reporter()
    summary = collect_text(work / "text")
    reporter.log(
        f"text: {summary.train_documents} documents, {summary.train_bytes:,} bytes to train on; "
        f"{summary.held_out_documents} documents, {summary.held_out_bytes:,} bytes held out"
    )
    train, folder = work / "text" / TRAIN, work / "teacher"
    if is_finished(folder, train, recipe):
        reporter.log(f"teacher: {folder} is finished; reused")
    else:
        started = time.monotonic()
        tokenizer = train_tokenizer(train, work / "tokenizer", vocab_size=recipe.vocab_size)
        reporter.log(f"tokenizer: {recipe.vocab_size:,} ids in {duration(time.monotonic() - started)}")
        train_teacher(train, tokenizer, folder, recipe, reporter, started=started)
    return FinishedTeacher(folder=folder, seconds=_seconds(folder / RECIPE))


def _seconds(path: Path) -> float:
    return entry_of(read_json(path, CorpusError), "seconds", Finite, 0.0, path, CorpusError)


def is_finished(folder: Path, train: Path, recipe: DemoRecipe) -> bool:
    """Whether `folder` holds a whole teacher made by `recipe` from the text in `train`, by this Python."""
    path = folder / RECIPE
    return path.is_file() and read_json(path, CorpusError).get("key") == _key(train, recipe)


def train_tokenizer(train: Path, out: Path, *, vocab_size: int) -> Path:
    """Train a byte-level BPE of exactly `vocab_size` ids; decoding gives back every byte of any text.

    Replaces the folder `out` when finished, and returns it.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((document["text"] for document in read_documents(train)), trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise CorpusError(
            f"{train}: its text gives {tokenizer.get_vocab_size()} ids, expected {vocab_size}; "
            "add text or ask for fewer."
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
    )
    with _replacing(out) as partial:
        fast.save_pretrained(partial)
    return out


def train_teacher(
    train: Path,
    tokenizer_folder: Path,
    out: Path,
    recipe: DemoRecipe | None = None,
    reporter: Reporter | None = None,
    started: float | None = None,
) -> Path:
    """Train a Llama on the text in `train`; replaces the folder `out` when finished, and returns it.

    `started` is the time.monotonic() from which the recorded seconds count; now, if it is not given.
    """
    started = time.monotonic() if started is None else started
    recipe, reporter = recipe or DemoRecipe(), reporter or Reporter()
    total_tokens = _steps(recipe) * recipe.teacher_batch_size * recipe.sequence_length
    tokenizer = load_tokenizer(tokenizer_folder)
    sequences = _tokenise(train, tokenizer, recipe.sequence_length)
    torch.manual_seed(recipe.seed)
    teacher = LlamaForCausalLM(LlamaConfig.from_dict(teacher_config(recipe)))
    with _replacing(out) as partial:
        with reporter.progress("teacher", total_tokens) as progress:
            _train(teacher, sequences, recipe, progress)
        teacher.save_pretrained(partial)
        save_tokenizer(tokenizer, partial)
        stamp = {
            "key": _key(train, recipe),
            "recipe": recipe.to_dict(),
            "python": platform.python_version(),
            "seconds": time.monotonic() - started,
        }
        write_json(partial / RECIPE, stamp)
    return out


def _train(model: LlamaForCausalLM, sequences: np.ndarray, recipe: DemoRecipe, progress: Progress) -> None:
    """Train in place for `teacher_tokens` tokens: Muon for the layers' matrices, AdamW for all else.

    Everything in float32: not every CPU multiplies bfloat16, and the teacher shall be the same on all of them.
    """
    batch, steps = recipe.teacher_batch_size, _steps(recipe)
    optimizers = _optimizers(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, _cosine(steps)) for optimizer in optimizers]
    order = _order(len(sequences), steps * batch, recipe.seed)
    for step in range(steps):
        ids = torch.from_numpy(sequences[order[step * batch : (step + 1) * batch]]).long()
        logits = model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        progress.advance(ids.numel(), f"loss {loss.item():.3f}")


def _steps(recipe: DemoRecipe) -> int:
    return max(1, recipe.teacher_tokens // (recipe.teacher_batch_size * recipe.sequence_length))


def _optimizers(model: LlamaForCausalLM, recipe: DemoRecipe) -> list[torch.optim.Optimizer]:
    matrices = [weight for weight in model.model.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in matrices}
    others = [weight for weight in model.parameters() if id(weight) not in chosen]
    return [
        Muon(matrices, lr=recipe.teacher_matrix_learning_rate),
        torch.optim.AdamW(others, lr=recipe.teacher_learning_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    ]


def _cosine(steps: int) -> Any:
    """Factor of the learning rate: up over the first 5% of the steps, then a cosine down to 5%."""

    def factor(step: int) -> float:
        rise = min(1.0, (step + 1) / (0.05 * steps))
        return rise * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))

    return factor


def _tokenise(train: Path, tokenizer: Any, sequence_length: int) -> np.ndarray:
    """int32 [sequences, sequence_length]: all documents, an end-of-text after each, cut into equal pieces."""
    texts = [document["text"] for document in read_documents(train)]
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ids = np.concatenate([np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.int32) for encoding in encoded])
    count = len(ids) // sequence_length
    if count == 0:
        raise CorpusError(f"{train}: {len(ids)} tokens, expected at least one sequence of {sequence_length}; add text.")
    return ids[: count * sequence_length].reshape(count, sequence_length)


def _order(count: int, needed: int, seed: int) -> np.ndarray:
    """Indices of `needed` sequences out of `count`: whole shuffled passes, one after the other."""
    generator = np.random.default_rng(seed)
    passes = [generator.permutation(count) for _ in range(-(-needed // count))]
    return np.concatenate(passes)[:needed]


def _key(train: Path, recipe: DemoRecipe) -> str:
    """Changes with the recipe, the text and the Python."""
    contents = [recipe.to_dict(), hash_file(train), platform.python_version()]
    return xxhash.xxh3_128_hexdigest(canonical_json(contents))


@contextmanager
def _replacing(out: Path) -> Iterator[Path]:
    """A temporary folder that takes the place of `out` on success and is removed on error."""
    out.parent.mkdir(parents=True, exist_ok=True)
    remove_partials(out.parent, out.name)
    with replacing(out) as partial:
        partial.mkdir()
        yield partial
        shutil.rmtree(out, ignore_errors=True)
