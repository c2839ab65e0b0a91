"""What makes two tokenizers the same, and loading one from a folder as its tokenizer.json says.

Ids have to mean the same tokens to the corpus, the teacher and the student. The identity is
of the vocabulary and of the ids of a fixed probe text (which also sees merges and
pre-tokenisation), not of the files, so that a re-saved tokenizer stays the same.

transformers chooses a tokenizer's class by names in tokenizer_config.json and config.json, and some classes read
texts in their family's way, whatever tokenizer.json says (pipeline/probe.py). Where that makes a difference, the
file is read without the class; where that too makes one, the folder is refused.
"""

import importlib.util
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash
from tokenizers import processors

from pipeline.documents import Hash, Width
from pipeline.errors import ConfigError
from pipeline.files import canonical_json
from pipeline.probe import (
    TOKENIZER_JSON,
    find_difference,
    find_difference_without_file,
    heard,
    named_tokens,
    read_tokenizer_json,
)
from pipeline.stores.places import store_of
from pipeline.stores.store import Store

SETTINGS = "tokenizer_config.json"
FILES = (TOKENIZER_JSON, "tokenizer.model", SETTINGS, "vocab.json", "merges.txt", "tekken.json")
OBEYED_BOS = ("LlamaTokenizer", "CodeLlamaTokenizer", "GemmaTokenizer", "CohereTokenizer")
"""Classes for which add_bos_token had a meaning beside tokenizer.json."""
PROBE = (
    "The quick brown fox's 3.14159…\n\tdef f(x: int) -> str:\r\n    return f'{x!r}'  # 中文分词，測試。 "
    "привет 🙂 naïve\x00\n\n"
)


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """Equal if and only if two tokenizers agree on the vocabulary and on the probe text."""

    vocab_size: Width
    """Real vocabulary: largest id plus one. A model's padded head may be larger."""
    vocabulary: Hash
    """Hash of all (token, id) pairs."""
    probe: Hash
    """Hash of the ids of the probe text."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values from which the identity can be made again."""
        return asdict(self)

    def difference(self, other: "TokenizerIdentity") -> str:
        """What differs, in words; empty if nothing does."""
        if self.vocab_size != other.vocab_size:
            return f"vocabularies of {self.vocab_size} and {other.vocab_size} ids"
        if self.vocabulary != other.vocabulary:
            return f"two vocabularies of {self.vocab_size} ids in which some ids stand for other tokens"
        return "equal vocabularies that split the same text into other ids" if self.probe != other.probe else ""


def has_tokenizer(folder: Path) -> bool:
    """Whether `folder` ships a tokenizer."""
    return folder.is_dir() and any((folder / name).is_file() for name in FILES)


Note = Callable[[str], None]


def load_tokenizer(folder: Path | Store, *, trust_remote_code: bool = False, note: Note = lambda line: None) -> Any:
    """The transformers tokenizer in `folder`, or under a URL; it reads texts as tokenizer.json does, if there is one.

    Never asks a model hub, and runs code of the folder only with `trust_remote_code`. `note` is told what a user
    should know. Raises ConfigError.
    """
    folder = _on_this_machine(folder)
    if not has_tokenizer(folder):
        raise ConfigError(f"{folder}: no tokenizer there; expected a folder with tokenizer.json or tokenizer.model.")
    settings = read_settings(folder)
    auto_map = settings.get("auto_map") or {}
    own_code = isinstance(auto_map, list) or auto_map.get("AutoTokenizer") is not None
    if own_code and not trust_remote_code:
        raise ConfigError(
            f"{folder}: this tokenizer is code of its own (`auto_map` in {SETTINGS}), which runs only with "
            "--trust-remote-code (trust_remote_code: true); give it if you trust that code."
        )
    if not (folder / TOKENIZER_JSON).is_file():
        tokenizer = _load_without_file(folder, own_code, note)
    else:
        tokenizer = _load_as_the_file_says(folder, settings, own_code, note)
    _add_missing_begin(tokenizer, settings, lambda line: note(f"{folder}: {line}"))
    return tokenizer


def _on_this_machine(folder: Path | Store) -> Path:
    """The folder, or a copy of it that lives as long as this process."""
    store = store_of(folder)
    if store.path is not None:
        return store.path
    scratch = tempfile.TemporaryDirectory()
    _kept.append(scratch)
    return store.as_folder(Path(scratch.name))


_kept: list[tempfile.TemporaryDirectory[str]] = []


def save_tokenizer(tokenizer: Any, folder: Path, *, trust_remote_code: bool = False) -> None:
    """Write `tokenizer` into `folder` so that `load_tokenizer` gives it back; raises ConfigError if it would not."""
    tokenizer.save_pretrained(str(folder))
    again = load_tokenizer(folder, trust_remote_code=trust_remote_code)
    difference = identify(again).difference(identify(tokenizer))
    if not difference and (folder / TOKENIZER_JSON).is_file():
        file = read_tokenizer_json(folder)
        file.encode_special_tokens = tokenizer.split_special_tokens
        difference = find_difference(tokenizer, file, set())
    for name, read in _KEPT.items():
        if not difference and read(again) != read(tokenizer):
            difference = f"{name} was {read(tokenizer)!r}, saved is {read(again)!r}"
    if difference:
        raise ConfigError(
            f"{tokenizer.name_or_path}: transformers does not save this tokenizer as it is: {difference}."
        )


_KEPT: dict[str, Callable[[Any], Any]] = {
    "the end token": lambda tokenizer: tokenizer.eos_token_id,
    "what surrounds a text": lambda tokenizer: list(tokenizer("", verbose=False)["input_ids"]),
    "the chat template": lambda tokenizer: tokenizer.chat_template,
}
"""What a corpus depends on beside the readings of texts."""


def misreading(folder: Path, *, trust_remote_code: bool = False) -> str:
    """How AutoTokenizer alone, as others will call it, reads otherwise than tokenizer.json; empty if it does not."""
    try:
        return _difference(_by_class(folder, trust_remote_code), folder, read_settings(folder))
    except Exception as exc:  # whatever a foreign file makes the library raise
        return _one_line(exc)


def _load_as_the_file_says(folder: Path, settings: dict[str, Any], own_code: bool, note: Note) -> Any:
    problem, end = "", None
    for load in (_by_class, _by_code_on_file if own_code else _by_file):
        before = [f"read as {TOKENIZER_JSON} says, not as its class would: there {problem}"] if problem else []
        try:
            with heard(folder) as warnings:
                tokenizer = load(folder, own_code)
            if end is not None and tokenizer.eos_token is None and end in tokenizer.get_vocab():
                tokenizer.add_special_tokens({"eos_token": end})  # that of the class, where the settings name none
            end = tokenizer.eos_token
            problem = _difference(tokenizer, folder, settings)
        except ConfigError:
            raise
        except Exception as exc:  # whatever a foreign file makes the library raise
            problem = f"loading stops with {type(exc).__name__}: {_one_line(exc)}"
        if not problem:
            for line in [*before, *warnings]:
                note(f"{folder}: {line}")
            return tokenizer
    read_tokenizer_json(folder)  # which says so if the file itself is broken
    raise ConfigError(
        f"{folder}: transformers does not read texts as {TOKENIZER_JSON} there does: {problem}; mend tokenizer.json, "
        f"or tokenizer_class and the tokens in {SETTINGS}."
    )


def _load_without_file(folder: Path, own_code: bool, note: Note) -> Any:
    try:
        with heard(folder) as warnings:
            tokenizer = _by_class(folder, own_code)
        problem = find_difference_without_file(tokenizer, folder)
    except Exception as exc:
        problem = _one_line(exc)
    if problem:
        reason = f"transformers cannot load this tokenizer: {problem}"
        if (folder / "tokenizer.model").is_file() and importlib.util.find_spec("sentencepiece") is None:
            reason = "has tokenizer.model alone, which takes the package sentencepiece to read, and it is not installed"
        raise ConfigError(f"{folder}: {reason}; put a {TOKENIZER_JSON} there.")
    for line in [
        *warnings,
        f"has no {TOKENIZER_JSON}: that {type(tokenizer).__name__} reads its texts right is unchecked",
    ]:
        note(f"{folder}: {line}")
    return tokenizer


def _by_class(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)


def _by_code_on_file(folder: Path, trust_remote_code: bool) -> Any:
    """As `_by_class`, but the folder's code gets the file as it is: transformers 5 takes it apart for every class with
    an __init__ of its own, and drops its normaliser, split and decoder."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        str(folder),
        local_files_only=True,
        trust_remote_code=trust_remote_code,
        tokenizer_object=read_tokenizer_json(folder),
    )


def _by_file(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


def _difference(tokenizer: Any, folder: Path, settings: dict[str, Any]) -> str:
    """How the tokenizer differs from the file; empty if it does not, or only as the settings say in so many words."""
    named, prefix_space = named_tokens(folder), settings.get("add_prefix_space")
    difference = ""
    for value in (None, prefix_space) if isinstance(prefix_space, bool) else (None,):
        file = read_tokenizer_json(folder, prefix_space=value)
        file.encode_special_tokens = settings.get("split_special_tokens") is True
        found = find_difference(tokenizer, file, named)
        if not found:
            return ""
        difference = difference or found
    return difference


def read_settings(folder: Path) -> dict[str, Any]:
    """What tokenizer_config.json holds, empty if there is none; raises ConfigError."""
    path = folder / SETTINGS
    if not path.is_file():
        return {}
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as exc:
        raise ConfigError(f"{path}: not JSON: {exc}") from exc
    if not isinstance(settings, dict):
        raise ConfigError(f"{path}: found a {type(settings).__name__}; expected the settings of a tokenizer.")
    return settings


def _add_missing_begin(tokenizer: Any, settings: dict[str, Any], note: Note) -> None:
    """Put the begin token before each text where the settings of a class that obeyed them ask for it.

    transformers 4 did; 5 drops add_bos_token where there is a tokenizer.json.
    """
    by_class = str(settings.get("tokenizer_class")).removesuffix("Fast") in OBEYED_BOS
    if not by_class or settings.get("add_bos_token") is not True or not tokenizer.is_fast:
        return
    token, index, backend = tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.backend_tokenizer
    if index is None or tokenizer("", verbose=False)["input_ids"][:1] == [index]:
        return
    begin = processors.TemplateProcessing(single=f"{token} $A", special_tokens=[(token, index)])
    earlier = [backend.post_processor] if backend.post_processor is not None else []
    backend.post_processor = processors.Sequence([*earlier, begin])
    note(f"each text begins with {token!r}, as add_bos_token in {SETTINGS} says, although {TOKENIZER_JSON} adds none")


def _one_line(exc: Exception) -> str:
    return " ".join(str(exc).split()) or type(exc).__name__


def identify(tokenizer: Any) -> TokenizerIdentity:
    """The identity of a transformers tokenizer."""
    probe_ids = tokenizer.encode(PROBE, add_special_tokens=False, verbose=False)
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return TokenizerIdentity(
        vocab_size=pairs[-1][0] + 1,
        vocabulary=xxhash.xxh3_128_hexdigest(canonical_json(pairs)),
        probe=xxhash.xxh3_128_hexdigest(canonical_json(probe_ids)),
    )
