"""What makes two tokenizers the same, and loading one from a folder.

Ids have to mean the same tokens to the corpus, the teacher and the student. The identity is
of the vocabulary and of the ids of a fixed probe text (which also sees merges and
pre-tokenisation), not of the files, so that a re-saved tokenizer stays the same.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from pipeline.copies import kept_copy
from pipeline.errors import ConfigError
from pipeline.files import canonical_json
from pipeline.storage import Location, ObjectPath

FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "merges.txt", "tekken.json")
PROBE = "The quick brown fox's 3.14159…\n\tdef f(x: int) -> str:\r\n    return f'{x!r}'  # 中文分词，測試。 привет 🙂 naïve\x00\n\n"


@dataclass(frozen=True, kw_only=True)
class TokenizerIdentity:
    """Equal if and only if two tokenizers agree on the vocabulary and on the probe text."""

    vocab_size: int
    """Real vocabulary: largest id plus one. A model's padded head may be larger."""
    vocabulary: str
    """Hash of all (token, id) pairs."""
    probe: str
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


def load_tokenizer(folder: Location, *, trust_remote_code: bool = False) -> Any:
    """The transformers tokenizer in `folder`, or under a URL; never asks a model hub."""
    if isinstance(folder, ObjectPath):
        folder = kept_copy(folder)
    if not has_tokenizer(folder):
        raise ConfigError(f"{folder}: no tokenizer there; expected a folder with tokenizer.json or tokenizer.model.")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)
    except Exception as exc:  # whatever a foreign file makes the library raise
        raise ConfigError(f"{folder}: transformers cannot load this tokenizer: {' '.join(str(exc).split())}") from exc


def identify(tokenizer: Any) -> TokenizerIdentity:
    """The identity of a transformers tokenizer."""
    probe_ids = tokenizer.encode(PROBE, add_special_tokens=False, verbose=False)
    pairs = sorted((index, token) for token, index in tokenizer.get_vocab().items())
    return TokenizerIdentity(
        vocab_size=pairs[-1][0] + 1,
        vocabulary=xxhash.xxh3_128_hexdigest(canonical_json(pairs)),
        probe=xxhash.xxh3_128_hexdigest(canonical_json(probe_ids)),
    )


def identify_folder(folder: Path) -> TokenizerIdentity | None:
    """The identity of the tokenizer in `folder`; None if it ships none."""
    return identify(load_tokenizer(folder)) if has_tokenizer(folder) else None
