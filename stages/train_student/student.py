"""The student as its folder describes it: checked against the cache before anything is loaded."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.cache.manifest import TOKENIZER
from pipeline.cache.reader import Cache
from pipeline.errors import CacheMismatchError, ConfigError
from pipeline.models import ModelFolder, read_model, text_body
from pipeline.tokenizer import has_tokenizer, identify, load_tokenizer
from pipeline.vocabulary import difference_in_use, extra_tokens
from pipeline.weights import named

SPECIAL_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")


@dataclass(frozen=True, kw_only=True)
class Student:
    """What to train, and where it starts from."""

    model: ModelFolder
    has_weights: bool
    """False: start from random weights."""
    vocab_size: int
    """Ids that take part in its loss: the cache's, or the student's where those are fewer."""
    notes: tuple[str, ...] = ()
    """What a user should know of it."""

    def load(self, seed: int) -> Any:
        """The transformers model, float32, with its weights or fresh ones that the seed decides.

        Of a vision-language model what makes no text is frozen.
        """
        if not self.has_weights:
            return _only_text_trained(self.model.fresh(seed))
        from transformers import set_seed

        set_seed(seed)
        return _only_text_trained(self.model.load("float32"))


def read_student(path: Path, cache: Cache, *, trust_remote_code: bool = False) -> Student:
    """The student at `path`, a model folder or a config.json; raises ConfigError or CacheMismatchError."""
    if not (path if path.suffix == ".json" else path / "config.json").is_file():
        raise ConfigError(f"{path}: no student there; expected a folder with config.json, or a config.json.")
    if path.suffix == ".json" and path.name != "config.json":
        raise ConfigError(
            f"{path}: the file of a student's settings must be called config.json, in a folder of its own."
        )
    model = read_model(path, trust_remote_code=trust_remote_code)
    if model.quantization != "none":
        raise ConfigError(
            f"{model.path}: a quantised student ({model.quantization}); quantised weights cannot be trained: give the "
            "model that it was made from."
        )
    _check_special_tokens(model)
    notes = _check_vocabulary(model, cache)
    longest = cache.manifest.sequence_length
    if model.context_length < longest:
        raise CacheMismatchError(
            f"{model.path}: a context of {model.context_length} tokens; the cache has sequences of {longest}; "
            "take a student with a longer context, or prepare and cache with a shorter --sequence-length."
        )
    has_weights = path.suffix != ".json"
    if has_weights:
        left_out = _require_weights(model)
        notes += [f"{path}: {named(left_out)}: no part of the student, left out."] if left_out else []
    model.model_class  # noqa: B018 - a config that makes no model is found now
    return Student(
        model=model,
        has_weights=has_weights,
        vocab_size=min(cache.manifest.vocab_size, model.vocab_size),
        notes=tuple(notes),
    )


def special_token_notes(student: Student, tokenizer: Any) -> list[str]:
    """What a user should know where the student's special tokens are not those that the cache's tokenizer has."""
    found = {name: _ids(student.model.attribute(name)) for name in SPECIAL_TOKENS}
    return [
        f"{student.model.folder}: {name} is {' or '.join(map(str, found[name]))}; the cache's tokenizer has "
        f"{expected}: what generates with the student should be told."
        for name in SPECIAL_TOKENS
        if found[name] and (expected := getattr(tokenizer, name)) is not None and expected not in found[name]
    ]


def _require_weights(model: ModelFolder) -> list[str]:
    try:
        return model.require_weights()
    except ConfigError as exc:
        raise ConfigError(f"{exc} To start from random weights, give {model.path} itself.") from exc


def _only_text_trained(model: Any) -> Any:
    """`model`, frozen but for its language model and head."""
    kept = {id(weight) for part in (text_body(model), model.get_output_embeddings()) for weight in part.parameters()}
    for weight in model.parameters():
        if id(weight) not in kept:
            weight.requires_grad_(False)
    return model


def _check_special_tokens(model: ModelFolder) -> None:
    for name in SPECIAL_TOKENS:
        for token in _ids(model.attribute(name)):
            if token >= model.vocab_size:  # below 0 stands for none
                raise ConfigError(f"{model.path}: {name} is {token}, outside its vocabulary of {model.vocab_size}.")


def _ids(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _check_vocabulary(model: ModelFolder, cache: Cache) -> list[str]:
    """Notes; raises CacheMismatchError unless every id of the cache's sequences means the same to the student."""
    manifest, notes = cache.manifest, []
    if not has_tokenizer(model.folder):
        if model.vocab_size not in (manifest.vocab_size, manifest.padded_vocab_size):
            raise CacheMismatchError(
                f"{model.path}: a vocabulary of {model.vocab_size}; the cache has {manifest.vocab_size} ids "
                f"(padded to {manifest.padded_vocab_size}); take a student with the teacher's vocabulary."
            )
        return []
    own = load_tokenizer(model.folder, trust_remote_code=model.trust_remote_code)
    difference = identify(own).difference(manifest.tokenizer)
    if difference:
        theirs = load_tokenizer(cache.folder / TOKENIZER, trust_remote_code=model.trust_remote_code)
        difference = difference_in_use(own, theirs, cache.largest_token_id())
        notes.append(
            f"{model.folder}: its tokenizer differs from the cache's in tokens that no sequence uses: "
            f"{extra_tokens(own, theirs, cache.largest_token_id())}."
        )
    if difference:
        raise CacheMismatchError(
            f"{model.folder}: the student's tokenizer is not the cache's: {difference}; "
            "cache again with a teacher that shares the student's tokenizer."
        )
    if model.vocab_size < manifest.vocab_size:
        if cache.largest_token_id() >= model.vocab_size:
            raise CacheMismatchError(
                f"{model.path}: a vocabulary of {model.vocab_size}; the cache holds id {cache.largest_token_id()}; "
                "take a student with the teacher's vocabulary."
            )
        notes.append(
            f"{model.path}: a vocabulary of {model.vocab_size}, of the cache's {manifest.vocab_size}: no sequence uses "
            "the others, and what the teacher gives them counts as tail."
        )
    return notes
