"""Targets of the pretrained teacher at every token of a text, for benchmarks/storage.py; saved as they come.

English, Chinese and code in turn, a sequence each as long as there is text. The body runs in bfloat16, the head in
float32: good enough for what ids and values take, and twice as fast. 2.5 s a sequence on one busy core.
"""

import itertools
import json
from pathlib import Path

import numpy as np

from benchmarks.real.teacher import DEFAULT_SITE, ensure_teacher, install
from benchmarks.real.text import TRAIN, collect_passages
from benchmarks.storage_teacher import SEQUENCE, reduce_logits
from pipeline.files import replacing
from pipeline.tokenizer import load_tokenizer

PASSAGE_TOKENS = 1000
BLOCK_ROWS = 128
END_OF_TEXT = 0


def score_pretrained(folder: Path, num_sequences: int, site: Path = DEFAULT_SITE) -> dict[str, np.ndarray]:
    """`tokens` int32 [N] and the columns of their targets; raises PipelineError without the teacher's package."""
    teacher = ensure_teacher(folder / "teacher", site)
    install(site)
    texts = _sequences(folder, teacher, site, num_sequences)
    todo = [number for number in range(len(texts)) if not _path(folder, number).is_file()]
    if todo:
        _score(folder, teacher, {number: texts[number] for number in todo})
    columns: dict[str, list[np.ndarray]] = {}
    for number in range(len(texts)):
        with np.load(_path(folder, number)) as stored:
            for name in stored.files:
                columns.setdefault(name, []).append(stored[name])
    return {name: np.concatenate(parts) for name, parts in columns.items()}


def _path(folder: Path, number: int) -> Path:
    return folder / "pretrained" / f"{number:05d}.npz"


def _sequences(folder: Path, teacher: Path, site: Path, num_sequences: int) -> list[np.ndarray]:
    """int32 [SEQUENCE + 1] each: passages of one kind, an end of text before each; the kinds by turns."""
    tokenizer, text = load_tokenizer(teacher), folder / "pretrained-text"
    collect_passages(text, tokenizer, site, (num_sequences + 3) * (SEQUENCE + 32), 3, PASSAGE_TOKENS)
    streams: dict[str, list[int]] = {}
    for line in (text / TRAIN).read_text(encoding="utf-8").splitlines():
        passage = json.loads(line)
        ids = tokenizer(passage["text"], add_special_tokens=False)["input_ids"]
        streams.setdefault(passage["kind"], []).extend([END_OF_TEXT, *ids])
    pieces = [
        [np.array(ids[start : start + SEQUENCE + 1], np.int32) for start in range(0, len(ids) - SEQUENCE, SEQUENCE)]
        for ids in streams.values()
    ]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*pieces))
    return [piece for piece in turns if piece is not None][:num_sequences]


def _score(folder: Path, teacher: Path, texts: dict[int, np.ndarray]) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32).eval()
    head_HV = model.get_output_embeddings().weight.detach().T.contiguous().float()
    body = model.model.bfloat16()  # the head is a copy of the embeddings that are tied to it
    logits = torch.empty((BLOCK_ROWS, head_HV.shape[1]))
    scratch = torch.empty_like(logits)
    (folder / "pretrained").mkdir(exist_ok=True)
    for number, text in texts.items():
        ids = torch.from_numpy(text.astype(np.int64))
        with torch.inference_mode():
            hidden_NH = body(ids[None, :-1], use_cache=False).last_hidden_state[0].float()
            blocks = []
            for start in range(0, SEQUENCE, BLOCK_ROWS):
                torch.mm(hidden_NH[start : start + BLOCK_ROWS], head_HV, out=logits)
                blocks.append(reduce_logits(logits, ids[start + 1 : start + BLOCK_ROWS + 1], scratch))
        columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
        with replacing(_path(folder, number)) as partial, partial.open("wb") as file:
            np.savez(file, tokens=text[:-1], **columns)
        if number % 16 == 0:
            print(f"pretrained: {number} of {max(texts) + 1} sequences", flush=True)
