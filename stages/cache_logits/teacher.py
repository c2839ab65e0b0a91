"""The teacher as its folder describes it: read and checked before anything is loaded."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from pipeline.cache.manifest import TOKENIZER
from pipeline.errors import ConfigError
from pipeline.models import ModelFolder, read_model
from pipeline.settings import COMPUTED_IN
from pipeline.stores.store import Store
from pipeline.tokenizer import TokenizerIdentity, has_tokenizer, identify, load_tokenizer
from pipeline.vocabulary import difference_in_use, extra_tokens
from pipeline.weights import common_pattern, hash_config, hash_weights, named, weight_files
from stages.cache_logits.settings import TeacherConfig

LLAMA4_BEGINS, LLAMA4_TUNED = 8192, 32_768
"""Tokens from which on Llama 4's attention has a temperature, and above which vLLM has it."""


class Scored(Protocol):
    """What a teacher is held against: the manifest of a corpus, or of a cache for an audit of it."""

    @property
    def tokenizer(self) -> TokenizerIdentity:
        """Of the ids."""

    @property
    def sequence_length(self) -> int:
        """Longest sequence, tokens."""


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """A model folder, and the vocabulary that takes part."""

    model: ModelFolder
    vocab_size: int
    """Real vocabulary: the tokenizer's, or the head's where that is smaller; the head's further rows are padding."""
    dtype: str
    """Of the body: float32, bfloat16 or float16."""
    quantization: str
    """vLLM's name of the scheme, or none."""
    weight_pattern: str | None = None
    """Shell pattern of the files that hold the weights, where one finds them and no others."""
    left_out: tuple[str, ...] = ()
    """Tensors in these files that are no part of the model."""
    length_regime: str = ""
    """How the engine computes all sequences because the longest is as long as it is; empty if that changes nothing."""
    notes: tuple[str, ...] = ()
    """What a user should know of it."""

    @property
    def folder(self) -> Path:
        return self.model.folder

    @property
    def architecture(self) -> str:
        return self.model.architecture

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the head."""
        return self.model.vocab_size

    def identity(self) -> dict[str, Any]:
        """What decides the targets: the files, by hash, and the types of the computation."""
        identity = {
            "architecture": self.architecture,
            "config": hash_config(self.model.document),
            "weights": hash_weights(self.folder),
            "dtype": self.dtype,
            "head_dtype": "float32",
            "quantization": self.quantization,
        }
        more = {"trust_remote_code": True} if self.model.trust_remote_code else {}
        return identity | more | ({"length_regime": self.length_regime} if self.length_regime else {})


def read_teacher(
    config: TeacherConfig, scored: Scored, folder_of_scored: Path | Store, largest_id: Callable[[], int]
) -> Teacher:
    """The teacher, checked against the settings and what it is to score; raises ConfigError.

    `largest_id` gives the largest token id there, and is asked only if the vocabularies differ.
    """
    folder = config.teacher
    read_config = _as_vllm_reads_it if config.engine == "vllm" else None
    model = read_model(folder, trust_remote_code=config.trust_remote_code, read_config=read_config)
    notes = _check_tokenizer(model, scored, folder_of_scored / TOKENIZER, largest_id)
    left_out = model.require_weights()
    if left_out:
        notes.append(f"{folder}: {named(left_out)}: no part of the teacher, left out.")
    regime = length_regime(model, scored.sequence_length) if config.engine == "vllm" else ""
    if regime:
        notes.append(
            f"{folder}: since the longest sequence has {scored.sequence_length} tokens, vLLM computes all of them "
            f"{regime}, and transformers, with which a student is trained, does not; another --sequence-length of "
            "`pipeline prepare`, or --engine transformers, makes them equal."
        )
    teacher = Teacher(
        model=model,
        vocab_size=min(scored.tokenizer.vocab_size, model.vocab_size),
        dtype=config.dtype if config.dtype != "auto" else model.dtype,
        quantization=config.quantization or model.quantization,
        weight_pattern=common_pattern(weight_files(folder)),
        left_out=tuple(left_out),
        length_regime=regime,
        notes=tuple(notes),
    )
    if teacher.dtype not in COMPUTED_IN:
        raise ConfigError(f"{model.path}: dtype is {teacher.dtype!r}; give --dtype as one of {', '.join(COMPUTED_IN)}.")
    if config.top_k > teacher.vocab_size:
        raise ConfigError(f"top_k is {config.top_k}; the vocabulary of {folder} has {teacher.vocab_size} ids.")
    if scored.sequence_length > model.context_length:
        raise ConfigError(
            f"{folder_of_scored}: sequences of up to {scored.sequence_length} tokens; the context of {folder} is "
            f"{model.context_length}; prepare again with --sequence-length {model.context_length} or less."
        )
    return teacher


def length_regime(model: ModelFolder, longest: int) -> str:
    """How vLLM computes every sequence, short ones too, because the longest has so many tokens; empty: as any other.

    Read in vLLM 0.32: phi3_long_rope_scaled_rope.py takes one set of factors for an engine, by its `max_model_len`,
    where transformers takes one a sequence; llama4.py tunes the attention's temperature from 32,768 tokens on, and
    transformers from the first position at which it is not 1.
    """
    rope, original = rope_of(model), original_context(model)
    if rope.get("rope_type", rope.get("type")) == "longrope" and original and longest > original:
        return f"with the rope factors of texts above {original} tokens"
    begins = model.attribute("floor_scale") or LLAMA4_BEGINS
    if is_llama4(model) and begins < longest <= LLAMA4_TUNED:
        return f"without the temperature of attention above {begins:g} tokens"
    return ""


def rope_of(model: ModelFolder) -> dict[str, Any]:
    """The parameters of the model's rotary embedding, empty if it states none."""
    return model.attribute("rope_parameters") or model.attribute("rope_scaling") or {}


def original_context(model: ModelFolder) -> int | None:
    """Tokens for which the model was trained before its context was stretched, if it says so."""
    name = "original_max_position_embeddings"
    return model.attribute(name) or rope_of(model).get(name)


def is_llama4(model: ModelFolder) -> bool:
    """Whether vLLM serves it by a class of Llama 4's."""
    return "Llama4" in model.text_architecture


def _as_vllm_reads_it(folder: Path, trust_remote_code: bool) -> Any:
    """vLLM knows configs of its own; for a model type that transformers does not know."""
    from vllm.transformers_utils.config import get_config

    return get_config(str(folder), trust_remote_code)


def _check_tokenizer(
    model: ModelFolder, scored: Scored, tokenizer: Path | Store, largest_id: Callable[[], int]
) -> list[str]:
    """Notes; raises ConfigError unless every id that is to be scored means the same to the teacher."""
    notes = []
    if has_tokenizer(model.folder):
        own = load_tokenizer(model.folder, trust_remote_code=model.trust_remote_code)
        difference = identify(own).difference(scored.tokenizer)
        if difference:
            theirs = load_tokenizer(tokenizer, trust_remote_code=model.trust_remote_code)
            difference = difference_in_use(own, theirs, largest_id())
            notes.append(
                f"{model.folder}: its tokenizer differs from the corpus's in tokens that the corpus does not use: "
                f"{extra_tokens(own, theirs, largest_id())}."
            )
        if difference:
            raise ConfigError(
                f"{model.folder}: its tokenizer is not the one that made the corpus: {difference}; "
                f"prepare the corpus again with --tokenizer {model.folder}."
            )
    if scored.tokenizer.vocab_size > model.vocab_size:
        if largest_id() >= model.vocab_size:
            raise ConfigError(
                f"{model.folder}: a head of {model.vocab_size} ids for a corpus that holds id {largest_id()} (its "
                f"tokenizer has {scored.tokenizer.vocab_size}); the tokenizer does not match the teacher."
            )
        notes.append(
            f"{model.folder}: a head of {model.vocab_size} ids for a tokenizer of {scored.tokenizer.vocab_size}; the "
            "corpus uses none of those that are left over."
        )
    return notes
