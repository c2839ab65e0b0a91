"""Small teachers, corpora and caches, made on the spot in milliseconds."""

import functools
import itertools
from pathlib import Path

import numpy as np
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING as SEES_PICTURES

from pipeline import open_cache
from pipeline.cache.folder import CacheFolder
from pipeline.cache.manifest import CacheManifest
from pipeline.cache.partitions import plan_partitions
from pipeline.corpus import TOKENIZER, Corpus, CorpusManifest, TokenSequence, write_partition
from pipeline.stores.places import store_of
from pipeline.tokenizer import identify
from stages.cache_logits.capture import capture
from stages.cache_logits.fake_engine import FakeEngine
from tests.support.helpers import tiny_tokenizer
from tests.support.rounding import logit_errors

CONTEXT = 96


def llama_config(vocab_size: int, **changes: object) -> LlamaConfig:
    """A one-layer Llama that vLLM serves on a CPU."""
    settings = {
        "vocab_size": vocab_size,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": CONTEXT,
        "initializer_range": 0.25,
    }
    return LlamaConfig(**settings | changes)


def make_teacher(folder: Path, padding: int = 21, seed: int = 0, **changes: object) -> Path:
    """A random Llama with a peaked output, its tokenizer beside it; its head has `padding` dead rows."""
    tokenizer = tiny_tokenizer(folder)
    torch.manual_seed(seed)
    LlamaForCausalLM(llama_config(len(tokenizer) + padding, **changes)).save_pretrained(folder)
    return folder


def make_counting_teacher(folder: Path) -> Path:
    """A Llama whose answer is known: after token t it expects token t + 1, whatever came before."""
    vocab_size = len(tiny_tokenizer(folder))
    model = LlamaForCausalLM(llama_config(vocab_size))
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        codes = torch.nn.functional.normalize(torch.randn(vocab_size, 64), dim=1)
        model.model.embed_tokens.weight.copy_(codes)
        model.lm_head.weight.copy_(4 * codes.roll(1, dims=0))
    model.save_pretrained(folder)
    return folder


def random_sequences(count: int, vocab_size: int, seed: int = 0, longest: int = CONTEXT) -> list[TokenSequence]:
    """Sequences of one to three isolated documents with random masks; the last one is one that fills the context."""
    random = np.random.default_rng(seed)
    sequences = []
    for index in range(count):
        length = longest if index == count - 1 else int(random.integers(6, longest))
        num_cuts = 0 if index == count - 1 else int(random.integers(0, 3))
        cuts = np.sort(random.choice(np.arange(1, length - 1), size=num_cuts, replace=False))
        mask = random.random(length) < 0.7
        mask[0], mask[cuts], mask[-1] = False, False, True
        sequences.append(
            TokenSequence(
                token_ids=random.integers(0, vocab_size, length).astype(np.int32),
                loss_mask=mask,
                document_lengths=np.diff([0, *cuts, length]).astype(np.int32),
            )
        )
    return sequences


def make_corpus(folder: Path, sequences: list[TokenSequence], num_partitions: int = 2) -> Path:
    """A finished corpus of the given sequences, in the vocabulary of `tiny_tokenizer`."""
    tokenizer = tiny_tokenizer(folder / TOKENIZER)
    cuts = np.linspace(0, len(sequences), num_partitions + 1).astype(int)
    parts = tuple(
        write_partition(folder, f"{i:05d}", sequences[a:b]) for i, (a, b) in enumerate(itertools.pairwise(cuts))
    )
    CorpusManifest(
        sequence_length=max(len(sequence.token_ids) for sequence in sequences),
        packing="isolated",
        tokenizer=identify(tokenizer),
        partitions=parts,
        settings={},
        statistics={},
    ).write(folder)
    return folder


def fake_manifest(
    corpus: Corpus,
    *,
    container: str = "arrow",
    max_kl_error: float = 1e-4,
    top_k: int = 8,
    tail_samples: int = 0,
    top_p: float | None = None,
    top_p_temperature: float | None = None,
    min_k: int | None = None,
    partitions: tuple[int, ...] | None = None,
) -> CacheManifest:
    """The manifest of a cache of `corpus` by FakeEngine."""
    tokens, _ = corpus.lengths()
    return CacheManifest(
        teacher={"architecture": "fake"},
        tokenizer=corpus.manifest.tokenizer,
        vocab_size=corpus.manifest.tokenizer.vocab_size,
        padded_vocab_size=corpus.manifest.tokenizer.vocab_size,
        top_k=top_k,
        tail_samples=tail_samples,
        draw_temperature=2.0 if tail_samples else None,
        top_p=top_p,
        top_p_temperature=None if top_p is None else top_p_temperature or 1.0,
        min_k=None if top_p is None else min_k or 1,
        temperatures=(1.0, 2.0),
        max_kl_error=max_kl_error,
        container=container,
        corpus=corpus.manifest.fingerprint,
        packing="isolated",
        sequence_length=corpus.manifest.sequence_length,
        num_tokens=corpus.manifest.num_tokens,
        num_targets=corpus.manifest.num_targets,
        partitions=partitions or plan_partitions(tokens, 400),
        settings={},
        software={},
        tokenizer_files=store_of(corpus.folder / TOKENIZER).hashes(),
    )


def prepare_folder(folder: Path, corpus_folder: Path, **settings: object) -> Path:
    """A cache of which nothing is captured, for FakeEngine."""
    return CacheFolder.begin(folder, fake_manifest(Corpus(corpus_folder), **settings), corpus_folder / TOKENIZER).folder


def make_cache(folder: Path, corpus_folder: Path, encoding_threads: int = 1, **settings: object) -> Path:
    """A cache by FakeEngine; continues one that was begun."""
    cache = CacheFolder(prepare_folder(folder, corpus_folder, **settings))
    todo = cache.todo()
    capture(FakeEngine(cache.manifest), Corpus(corpus_folder), cache, todo, encoding_threads=encoding_threads)
    return cache.folder


def contents_of(folder: Path) -> dict[bytes, list[np.ndarray]]:
    """Every array of every sequence, by key."""
    found = {}
    for sequence in open_cache(folder):
        targets = sequence.targets
        arrays = [sequence.token_ids, sequence.loss_mask, sequence.document_lengths, targets.ids, targets.logits]
        found[sequence.key] = [*arrays, targets.logsumexps, targets.tail_logprobs, targets.entropies, targets.draws]
    return found


def assert_equal_caches(first: Path, second: Path) -> None:
    ours, theirs = contents_of(first), contents_of(second)
    assert list(ours) == list(theirs)
    for key, arrays in ours.items():
        for one, other in zip(arrays, theirs[key], strict=True):
            np.testing.assert_array_equal(one, other)


@functools.cache
def float64_model(folder: Path) -> PreTrainedModel:
    """The model in a folder, for oracles; computed the plain way, which knows float64 and soft caps."""
    kind = type(AutoConfig.from_pretrained(folder))
    loader = AutoModelForImageTextToText if kind in SEES_PICTURES else AutoModelForCausalLM
    return loader.from_pretrained(folder, dtype="float64", attn_implementation="eager", experts_implementation="eager")


def true_logits(teacher: Path, sequence: TokenSequence, vocab_size: int) -> np.ndarray:
    """float64 [N, vocab_size]: the teacher's logits at the target positions, document by document, by plain torch."""
    model = float64_model(teacher)
    rows, start = [], 0
    for length in sequence.document_lengths:
        ids = torch.tensor(sequence.token_ids[start : start + length].astype(np.int64))[None]
        with torch.no_grad():
            rows.append(model(ids).logits[0, :, :vocab_size].numpy())
        start += length
    return np.concatenate(rows)[sequence.target_positions]


@functools.cache
def rounding_of_logits(teacher: Path, corpus: Path, vocab_size: int) -> list[np.ndarray]:
    """float64 [N, 1] a sequence: how far float32 arithmetic may put the logits at its target positions."""
    sequences = list(Corpus(corpus).rows())
    pieces = [np.split(row.token_ids, np.cumsum(row.document_lengths)[:-1]) for row in sequences]
    errors = iter(logit_errors(float64_model(teacher), list(itertools.chain(*pieces)), vocab_size))
    rows = [np.concatenate(list(itertools.islice(errors, len(documents)))) for documents in pieces]
    return [row[sequence.target_positions] for row, sequence in zip(rows, sequences)]
