"""Targets from real text for benchmarks/storage.py; made on a CPU in minutes.

Two teachers of its own with a vocabulary of 102,400, on held-out text of the Python standard library and of the
packages beside it, and one that is pretrained:

    neural     a small transformer alone, trained with sampled softmax
    mixture    the transformer, n-grams of up to five tokens and a cache of the document: sharper, as large
               models are, but its n-grams name ids that a neural model would not
    pretrained SmolLM2-135M-Instruct, vocabulary 49,152, on the text of benchmarks/real

Everything is kept in a folder and reused.
"""

import hashlib
import math
import os
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from pipeline.targets import SparseTargets, unsketched

VOCAB_SIZE, TOP_K, TEMPERATURES = 102_400, 64, (1.0, 2.0)
TEXT_BYTES = 70_000_000
HIDDEN, CONTEXT, SEQUENCE = 256, 256, 1024
TRAINING_STEPS, BATCH, NEGATIVES = 170, 16, 6144
ORDERS = (1, 2, 3, 4)
"""Lengths of the n-grams' contexts."""
BLOCK_ROWS = 64
TEACHERS = ("mixture", "neural", "pretrained")


def load_targets(folder: Path, teacher: str, num_sequences: int) -> tuple[np.ndarray, SparseTargets]:
    """int32 [N] tokens and the teacher's targets at each of them; made now unless they are in `folder`."""
    if teacher == "pretrained":
        from benchmarks.real.targets import score_pretrained

        return _of_columns(score_pretrained(folder, num_sequences))
    path = folder / f"{teacher}-{num_sequences}.npz"
    if not path.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        train, held_out = _tokens(folder)
        model = _Transformer.load(folder, train)
        print(f"{teacher}: scoring {num_sequences * SEQUENCE:,} tokens", flush=True)
        ngrams = _NGrams(train) if teacher == "mixture" else None
        _score(path, model, ngrams, held_out[: num_sequences * SEQUENCE + 1])
    with np.load(path) as stored:
        return _of_columns({name: stored[name] for name in stored.files})


def _of_columns(columns: dict[str, np.ndarray]) -> tuple[np.ndarray, SparseTargets]:
    tokens = columns.pop("tokens")
    draws = np.zeros((len(tokens), 0), np.int32)
    return tokens, SparseTargets(temperatures=TEMPERATURES, draws=draws, **columns, **unsketched(len(draws)))


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:8]


def _texts() -> list[str]:
    """Source and documentation, in an order that depends on the files' names alone; no text twice."""
    paths = []
    for root in (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")):
        for folder, folders, names in os.walk(root):
            folders[:] = [name for name in folders if name not in ("__pycache__", "test", "tests", "encodings")]
            paths += [os.path.join(folder, name) for name in names if name.endswith((".py", ".rst", ".md", ".txt"))]
    seen: set[bytes] = set()
    texts, total = [], 0
    for path in sorted(set(paths), key=_hash):
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (UnicodeDecodeError, OSError):
            continue
        if 500 < len(text) < 200_000 and _hash(text) not in seen:
            seen.add(_hash(text))
            texts.append(text)
            total += len(text)
        if total > TEXT_BYTES:
            break
    return texts


def _tokens(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Training and held-out tokens, by a byte-level BPE that was trained on the former; documents begin with id 0."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    paths = folder / "train.npy", folder / "heldout.npy"
    if not all(path.is_file() for path in paths):
        print("tokenizer: training", flush=True)
        texts = _texts()
        cut = len(texts) // 25
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=["<eot>"], initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts[cut:], trainer)
        for path, part in zip(paths, (texts[cut:], texts[:cut])):
            encoded = tokenizer.encode_batch_fast(part, add_special_tokens=False)
            np.save(path, np.concatenate([np.array([0, *item.ids], np.int32) for item in encoded]))
    return np.load(paths[0]), np.load(paths[1])


class _Transformer:
    """Three layers whose output is tied to its embeddings."""

    def __init__(self, counts: np.ndarray) -> None:
        from transformers import LlamaConfig, LlamaModel

        torch.manual_seed(0)
        self.body = LlamaModel(
            LlamaConfig(
                vocab_size=VOCAB_SIZE,
                hidden_size=HIDDEN,
                intermediate_size=704,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                head_dim=64,
                max_position_embeddings=2 * CONTEXT,
            )
        )
        torch.nn.init.normal_(self.embeddings, std=0.05)
        self.bias = torch.nn.Parameter(torch.tensor(np.log(counts / counts.sum()), dtype=torch.float32))

    @property
    def embeddings(self) -> torch.nn.Parameter:
        return self.body.embed_tokens.weight

    @classmethod
    def load(cls, folder: Path, train: np.ndarray) -> "_Transformer":
        """The model in `folder`, trained now unless it is there."""
        counts = np.bincount(train, minlength=VOCAB_SIZE) + 0.5
        model, path = cls(counts), folder / "teacher.pt"
        if not path.is_file():
            _train(model, train, counts)
            torch.save({"body": model.body.state_dict(), "bias": model.bias.data}, path)
        state = torch.load(path)
        model.body.load_state_dict(state["body"])
        model.bias.data = state["bias"]
        return model

    def hidden(self, tokens: np.ndarray) -> torch.Tensor:
        """float32 [N, HIDDEN], every CONTEXT tokens for themselves."""
        pieces = torch.from_numpy(tokens.astype(np.int64)).split(CONTEXT)
        return torch.cat([self.body(piece[None], use_cache=False).last_hidden_state[0] for piece in pieces])


def _train(model: _Transformer, train: np.ndarray, counts: np.ndarray) -> None:
    """Sampled softmax: the labels of the batch and NEGATIVES ids, by the 0.6th power of their frequency."""
    matrices = [weight for weight in model.body.layers.parameters() if weight.ndim == 2]
    chosen = {id(weight) for weight in [*matrices, model.embeddings]}
    others = [model.bias, *(weight for weight in model.body.parameters() if id(weight) not in chosen)]
    rates = {torch.optim.Muon(matrices): 0.02, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0): 3e-3}
    proposal = torch.tensor(counts**0.6 / (counts**0.6).sum())
    squares, random = torch.zeros(VOCAB_SIZE), np.random.default_rng(0)
    for step in range(TRAINING_STEPS):
        scale = min(1, (step + 1) / 20) * (0.05 + 0.475 * (1 + math.cos(math.pi * step / TRAINING_STEPS)))
        starts = random.integers(0, len(train) - CONTEXT - 1, BATCH)
        rows = torch.from_numpy(np.stack([train[start : start + CONTEXT + 1] for start in starts])).long()
        labels, places = torch.unique(rows[:, 1:], return_inverse=True)
        negatives = torch.multinomial(proposal, NEGATIVES)
        negatives = negatives[~torch.isin(negatives, labels)]
        ids = torch.cat([labels, negatives])
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.body(rows[:, :-1], use_cache=False).last_hidden_state.flatten(0, 1)
            logits = hidden @ model.embeddings[ids].T
        correction = torch.zeros(len(ids))
        correction[len(labels) :] = -torch.log(1 - torch.exp(-proposal[negatives] * NEGATIVES)).float()
        loss = F.cross_entropy(logits.float() + model.bias[ids] + correction, places.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(matrices + others, 1.0)
        for optimizer, rate in rates.items():
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():  # row-wise Adagrad: most embeddings have no gradient
            touched = torch.unique(torch.cat([rows.flatten(), ids]))
            gradient = model.embeddings.grad[touched]
            squares[touched] += gradient.pow(2).mean(1)
            model.embeddings[touched] -= 0.05 * scale * gradient / (squares[touched].sqrt() + 1e-8)[:, None]
            model.embeddings.grad = None
        if step % 20 == 0:
            print(f"transformer: step {step} of {TRAINING_STEPS}, loss {loss.item():.3f}", flush=True)


class _NGrams:
    """Successors of every context in the training text, and how to mix them into a distribution."""

    def __init__(self, train: np.ndarray) -> None:
        self._random = np.random.default_rng(0)
        self._orders = []
        for order in ORDERS:
            hashes = _context_hashes(train, order)[:-1]
            places = np.argsort(hashes, kind="stable")
            self._orders.append((order, hashes[places], train[1:][places]))

    def mix_into(self, probs_RV: torch.Tensor, tokens: np.ndarray, first: int) -> None:
        """Rows of probabilities of the transformer become those of the mixture, for tokens `first` on."""
        hashes = [_context_hashes(tokens, order) for order in ORDERS]
        for row, place in zip(probs_RV, range(first, first + len(probs_RV))):
            scale, parts = 1.0, []
            for weight, values in self._successors(hashes, tokens, place):
                parts = [(ids, probs * (1 - weight)) for ids, probs in parts]
                scale *= 1 - weight
                ids, counts = np.unique(values, return_counts=True)
                parts.append((ids, counts / len(values) * weight))
            row *= scale
            for ids, probs in parts:
                row.index_add_(0, torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(probs.astype(np.float32)))

    def _successors(
        self, hashes: list[np.ndarray], tokens: np.ndarray, place: int
    ) -> Iterator[tuple[float, np.ndarray]]:
        """From general to special: a weight, as Witten and Bell have it, and the ids that it goes to."""
        for (order, contexts, successors), own in zip(self._orders, hashes):
            first, last = np.searchsorted(contexts, own[place]), np.searchsorted(contexts, own[place], side="right")
            if place + 1 < order or first == last:
                break
            values = successors[first:last]
            if len(values) > 4000:
                values = values[self._random.integers(0, len(values), 4000)]
            distinct = len(np.unique(values))
            yield len(values) / (len(values) + (6 if order > 1 else 20) * distinct), values
        recent = tokens[max(0, place - 600) : place + 1]
        begins = np.flatnonzero(recent == 0)
        recent = recent[begins[-1] + 1 :] if len(begins) else recent
        if len(recent):
            yield 0.12 * len(recent) / (len(recent) + 50), recent


def _context_hashes(tokens: np.ndarray, order: int) -> np.ndarray:
    """uint64 [N]: of the `order` tokens that end at each place."""
    hashes = np.zeros(len(tokens), np.uint64)
    for back in range(order):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + np.roll(tokens, back).astype(np.uint64) + np.uint64(1)
        hashes ^= hashes >> np.uint64(29)
    return hashes


@torch.no_grad()
def _score(path: Path, model: _Transformer, ngrams: _NGrams | None, tokens: np.ndarray) -> None:
    """Write the targets of all tokens but the last one. One buffer: fresh blocks of 26 MB would pile up."""
    weights, bias = model.embeddings.bfloat16().T.contiguous(), model.bias
    logits = torch.empty((BLOCK_ROWS, VOCAB_SIZE))
    products, scratch = torch.empty_like(logits, dtype=torch.bfloat16), torch.empty_like(logits)
    blocks, started = [], time.monotonic()
    for start in range(0, len(tokens) - 1, SEQUENCE):
        sequence = tokens[start : start + SEQUENCE + 1]
        hidden = model.hidden(sequence[:-1]).bfloat16()
        for first in range(0, len(hidden), BLOCK_ROWS):
            torch.mm(hidden[first : first + BLOCK_ROWS], weights, out=products)
            logits.copy_(products).add_(bias)
            if ngrams is not None:
                torch.softmax(logits, 1, out=scratch)
                ngrams.mix_into(scratch, sequence[:-1], first)
                torch.log(scratch, out=logits)
            labels = torch.from_numpy(sequence[first + 1 : first + BLOCK_ROWS + 1].astype(np.int64))
            blocks.append(reduce_logits(logits, labels, scratch))
        if start % (32 * SEQUENCE) == 0:
            print(f"  {start:,} tokens in {time.monotonic() - started:.0f} s", flush=True)
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    np.savez(path, tokens=tokens[:-1], **columns)


def reduce_logits(logits: torch.Tensor, labels: torch.Tensor, scratch: torch.Tensor) -> dict[str, np.ndarray]:
    """The columns of targets, T=1 and 2, of float32 logits [N, V], which are changed; `scratch` is as large."""
    top, ids = logits.topk(TOP_K, dim=1)
    logits -= top[:, :1]
    columns: dict[str, list[np.ndarray]] = {"logsumexps": [], "tail_logprobs": [], "entropies": []}
    for temperature in TEMPERATURES:
        torch.mul(logits, math.log2(math.e) / temperature, out=scratch).exp2_()
        total = scratch.sum(1)
        moment = torch.linalg.vecdot(scratch, logits)
        scratch.scatter_(1, ids, 0.0)
        columns["logsumexps"].append(total.log().numpy())
        columns["tail_logprobs"].append((scratch.sum(1) / total).log().numpy())
        columns["entropies"].append((total.log() - moment / (temperature * total)).numpy())
    stacked = {name: np.stack(values, axis=1) for name, values in columns.items()}
    label_logits = logits.gather(1, labels[:, None])[:, 0].numpy()
    stacked |= {"ids": ids.numpy().astype(np.int32), "logits": (top - top[:, :1]).numpy()}
    return stacked | {"label_logits": label_logits}
