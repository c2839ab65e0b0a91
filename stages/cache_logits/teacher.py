"""The teacher as its folder describes it: read and checked before anything is loaded."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from pipeline.config import CacheConfig
from pipeline.corpus import CorpusManifest
from pipeline.errors import ConfigError
from pipeline.files import canonical_json
from pipeline.tokenizer import TokenizerIdentity, identify_folder

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
SAMPLE_BYTES = 1 << 16
SAMPLES = 256
"""Blocks of SAMPLE_BYTES that are hashed of every weight file, its first and last among them."""

NOT_IDENTITY = ("_name_or_path", "transformers_version", "use_cache")
"""Keys of config.json that can differ between copies of one model."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model folder, and the vocabulary that takes part."""

    folder: Path
    config: dict[str, Any]
    architecture: str
    vocab_size: int
    """Real vocabulary: the tokenizer's; the head's further rows are padding."""
    padded_vocab_size: int
    context_length: int
    dtype: str
    """Of the body: float32, bfloat16 or float16."""
    quantization: str
    """vLLM's name of the scheme, or none."""

    def identity(self) -> dict[str, str]:
        """What decides the targets: the files, by hash, and the types of the computation."""
        config = {key: value for key, value in self.config.items() if key not in NOT_IDENTITY}
        return {
            "architecture": self.architecture,
            "config": xxhash.xxh3_128_hexdigest(canonical_json(config)),
            "weights": hash_weights(self.folder),
            "dtype": self.dtype,
            "head_dtype": "float32",
            "quantization": self.quantization,
        }


def read_teacher(config: CacheConfig, corpus: CorpusManifest) -> Teacher:
    """The teacher, checked against the corpus and the settings; raises ConfigError."""
    folder = config.teacher
    document = _read_model_config(folder)
    text = document.get("text_config", document)
    try:
        architecture, padded = document["architectures"][0], int(text["vocab_size"])
    except (KeyError, IndexError, TypeError) as exc:
        raise ConfigError(f"{folder / 'config.json'}: has no {exc}; expected the config of a causal LM.") from exc
    teacher = Teacher(
        folder=folder,
        config=document,
        architecture=architecture,
        vocab_size=min(corpus.tokenizer.vocab_size, padded),
        padded_vocab_size=padded,
        context_length=int(text.get("max_position_embeddings", 1 << 30)),
        dtype=config.dtype if config.dtype != "auto" else text.get("dtype") or text.get("torch_dtype") or "float32",
        quantization=config.quantization or document.get("quantization_config", {}).get("quant_method", "none"),
    )
    _check_tokenizer(folder, corpus.tokenizer, padded)
    if config.top_k > teacher.vocab_size:
        raise ConfigError(f"top_k is {config.top_k}; the vocabulary of {folder} has {teacher.vocab_size} ids.")
    if corpus.sequence_length > teacher.context_length:
        raise ConfigError(
            f"{config.corpus}: sequences of up to {corpus.sequence_length} tokens; the context of {folder} is "
            f"{teacher.context_length}; prepare again with --sequence-length {teacher.context_length} or less."
        )
    return teacher


def hash_weights(folder: Path) -> str:
    """Hash of every weight file's name, size and evenly spaced samples.

    Takes seconds for 135 GB, and a retrained or converted checkpoint differs everywhere. It tells
    teachers apart; it does not check the disk.
    """
    files = sorted({path for pattern in WEIGHT_PATTERNS for path in folder.glob(pattern)})
    if not files:
        raise ConfigError(f"{folder}: no weights there; expected {' or '.join(WEIGHT_PATTERNS)}.")
    digest = xxhash.xxh3_128()
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        last = max(size - SAMPLE_BYTES, 0)
        with path.open("rb") as file:
            for offset in sorted({last * index // (SAMPLES - 1) for index in range(SAMPLES)}):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def _read_model_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(f"{folder}: no model there (config.json is missing); give the folder of the teacher.")
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ConfigError(f"{path}: not JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: found a {type(document).__name__}; expected the config of a causal LM.")
    return document


def _check_tokenizer(folder: Path, corpus: TokenizerIdentity, padded_vocab_size: int) -> None:
    own = identify_folder(folder)
    difference = own.difference(corpus) if own is not None else ""
    if difference:
        raise ConfigError(
            f"{folder}: its tokenizer is not the one that made the corpus: {difference}; "
            f"prepare the corpus again with --tokenizer {folder}."
        )
    if corpus.vocab_size > padded_vocab_size:
        raise ConfigError(
            f"{folder}: a head of {padded_vocab_size} ids for a corpus whose tokenizer has {corpus.vocab_size}; "
            "the tokenizer does not match the teacher."
        )
