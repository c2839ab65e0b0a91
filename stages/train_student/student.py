"""The student as its folder describes it: checked against the cache before anything is loaded."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import CacheMismatchError, ConfigError
from pipeline.manifest import CacheManifest
from pipeline.tokenizer import identify_folder

WEIGHT_PATTERNS = ("*.safetensors", "*.bin")
FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Keys of config.json that scale the logits (Cohere, Falcon-H1, Granite), and to which power."""
SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SOFTCAP = "final_logit_softcapping"
"""Key of config.json: c of c tanh(logits / c) (Gemma 2)."""


@dataclass(frozen=True, kw_only=True)
class Student:
    """What to train, and where it starts from."""

    folder: Path
    """Where config.json lies."""
    config: dict[str, Any]
    has_weights: bool
    """False: start from random weights."""

    @property
    def logit_scale(self) -> float:
        """What the model multiplies the head's output with."""
        return math.prod(float(self.config.get(key) or 1.0) ** power for key, power in FACTORS.items())

    @property
    def logit_softcap(self) -> float | None:
        """The bound of the model's logits, if it has one."""
        return self.config.get(SOFTCAP)

    def load(self, seed: int) -> Any:
        """The transformers model, float32, with its weights or fresh ones that the seed decides."""
        from transformers import AutoConfig, AutoModelForCausalLM, set_seed

        set_seed(seed)
        if self.has_weights:
            return AutoModelForCausalLM.from_pretrained(str(self.folder), dtype="float32", local_files_only=True)
        config = AutoConfig.from_pretrained(str(self.folder), local_files_only=True)
        config.dtype = "float32"
        return AutoModelForCausalLM.from_config(config)


def read_student(path: Path, manifest: CacheManifest) -> Student:
    """The student at `path`, a model folder or a config.json; raises ConfigError or CacheMismatchError."""
    folder = path.parent if path.suffix == ".json" else path
    config_path = path if path.suffix == ".json" else path / "config.json"
    if not config_path.is_file():
        raise ConfigError(f"{path}: no student there; expected a folder with config.json, or a config.json.")
    if config_path.name != "config.json":
        raise ConfigError(
            f"{path}: the file of a student's settings must be called config.json, in a folder of its own."
        )
    try:
        document = json.loads(config_path.read_text(encoding="utf-8"))
        vocab_size, _ = int(document["vocab_size"]), document["model_type"]
    except (ValueError, KeyError, TypeError) as exc:
        raise ConfigError(f"{config_path}: not the config of a causal LM ({exc}).") from exc
    _check_special_tokens(config_path, document, vocab_size)
    _check_vocabulary(folder, config_path, vocab_size, manifest)
    context = document.get("max_position_embeddings", manifest.sequence_length)
    if context < manifest.sequence_length:
        raise CacheMismatchError(
            f"{config_path}: a context of {context} tokens; the cache has sequences of {manifest.sequence_length}; "
            "take a student with a longer context, or prepare and cache with a shorter --sequence-length."
        )
    has_weights = path.suffix != ".json" and any(any(folder.glob(pattern)) for pattern in WEIGHT_PATTERNS)
    return Student(folder=folder, config=document, has_weights=has_weights)


def _check_special_tokens(config_path: Path, document: dict[str, Any], vocab_size: int) -> None:
    for name in SPECIAL_TOKENS:
        for token in _ids(document.get(name)):
            if token >= vocab_size:  # below 0 stands for none
                raise ConfigError(f"{config_path}: {name} is {token}, outside its vocabulary of {vocab_size}.")


def special_token_notes(student: Student, tokenizer: Any) -> list[str]:
    """What a user should know where the student's special tokens are not those that the cache's tokenizer has."""
    found = {name: _ids(student.config.get(name)) for name in SPECIAL_TOKENS}
    return [
        f"{student.folder}: {name} is {' or '.join(map(str, found[name]))}; the cache's tokenizer has {expected}: what "
        "generates with the student should be told."
        for name in SPECIAL_TOKENS
        if found[name] and (expected := getattr(tokenizer, name)) is not None and expected not in found[name]
    ]


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_vocabulary(folder: Path, config_path: Path, vocab_size: int, manifest: CacheManifest) -> None:
    own = identify_folder(folder)
    difference = own.difference(manifest.tokenizer) if own is not None else ""
    if difference:
        raise CacheMismatchError(
            f"{folder}: the student's tokenizer is not the cache's: {difference}; "
            "cache again with a teacher that shares the student's tokenizer."
        )
    fits = vocab_size in (manifest.vocab_size, manifest.padded_vocab_size) or (
        own is not None and vocab_size >= manifest.vocab_size
    )
    if not fits:
        raise CacheMismatchError(
            f"{config_path}: a vocabulary of {vocab_size}; the cache has {manifest.vocab_size} ids "
            f"(padded to {manifest.padded_vocab_size}); take a student with the teacher's vocabulary."
        )
