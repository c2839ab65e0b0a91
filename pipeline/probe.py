"""What a tokenizer makes of texts, beside what the file tokenizer.json in its folder says.

transformers chooses a class by names in two other files, and some classes build normaliser, split and decoder
anew, whatever tokenizer.json has: a byte-level vocabulary read in SentencePiece's way loses all white space. The
file is what the teacher was trained with, and the `tokenizers` library reads it without asking for a class.
Special tokens that are put around a text are not compared: they are the post-processor's.
"""

import contextlib
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer

from pipeline.errors import ConfigError
from pipeline.library_logs import warnings_of

TOKENIZER_JSON = "tokenizer.json"
NAMING_FILES = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
TEXTS = (
    "The keeper wrote down what was seen.",
    "def add(first: int, second: int) -> int:\n    return first + second\n",
    "\tif (a<=b && c!=d) {\r\n\t\tx[i] += 0xFF;  // 1e-9\r\n\t}\r\n",
    "今天的潮水教明天的我，昨天的我。「はい」 カタカナ 한국어",
    "cafe\u0301 naïve Å ﬁ ½ ① ΑΒΓ Ünïcödé ПРИВЕТ",
    "नमस्ते ก็ ไม่ שלום مرحبا",
    "  two leading spaces, two trailing  ",
    " \n \n\n\t \r\n",
    "a  b   c    d\u00a0e\u3000f\u2009g\u200bh",
    "🙂👍🏽👨\u200d👩\u200d👧 𝔘𝔫𝔦",
    "NUL \x00 BEL \x07 DEL \x7f BOM \ufeff \ufffd",
    "0 12 345 6789 3.14159 1,000,000 ２０２６",
    "It's what we're, I'LL; don't.'s \"quoted\" .,!? ( x )",
    "HTTPServer snake_case CamelCase https://a.b/c?d=e#f",
    "one line\ntwo lines\n\nthree\n",
    "▁ Ġ Ċ ## </w> <0x0A>",
)
"""Short, so that a difference can be shown whole: prose, code, scripts, combining marks, white space of many kinds
and at the ends, emoji, control characters, digits, contractions, and the marks that vocabularies use themselves."""

AROUND = "{0}", "a {0} b", "c{0}d\n{0}{0}E"
"""Where each added token is put."""
SHOWN_TOKENS = 12


def read_tokenizer_json(folder: Path, *, prefix_space: bool | None = None) -> Tokenizer:
    """The tokenizer of tokenizer.json itself, without truncation and padding; `prefix_space` overrides what it says
    of a space before a text. Raises ConfigError."""
    path = folder / TOKENIZER_JSON
    try:
        if prefix_space is None:
            tokenizer = Tokenizer.from_file(str(path))
        else:
            document = json.loads(path.read_text(encoding="utf-8"))
            _set_prefix_space(document.get("pre_tokenizer") or {}, prefix_space)
            tokenizer = Tokenizer.from_str(json.dumps(document))
    except Exception as exc:  # the library has no type of its own
        raise ConfigError(f"{path}: not a tokenizer: {' '.join(str(exc).split())}") from exc
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _set_prefix_space(pre_tokenizer: dict[str, Any], value: bool) -> None:
    for part in pre_tokenizer.get("pretokenizers", [pre_tokenizer]):
        if part.get("type") == "ByteLevel":
            part["add_prefix_space"] = value
        elif part.get("type") == "Metaspace" and (not value or part.get("prepend_scheme") == "never"):
            part["prepend_scheme"] = "first" if value else "never"


def find_difference(tokenizer: Any, file: Tokenizer, named: set[str]) -> str:
    """How a transformers tokenizer differs from its tokenizer.json, in words; empty if no text shows a difference.

    Tokens that the file lacks, or does not read whole, may be added if another file of the folder names them: `named`.
    An end token of the vocabulary may be its class's. `file` is changed.
    """
    own, said = tokenizer.get_vocab(), file.get_vocab(with_added_tokens=True)
    for token, index in sorted(said.items(), key=lambda pair: pair[1]):
        if own.get(token) != index:
            return f"the token {token!r} gets the id {own.get(token)}; tokenizer.json says {index}"
    whole = {token.content for token in file.get_added_tokens_decoder().values()}
    added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
    more = sorted((own.keys() - said.keys()) | (added.keys() - whole), key=own.__getitem__)
    for token in more:
        if token not in named and not (token in said and token == tokenizer.eos_token):
            return f"the token {token!r} is added (id {own[token]}), which no file of the folder names"
    file.add_tokens([added.get(token, AddedToken(token)) for token in more])
    for text in _texts(file):
        ids, expected = tokenizer.encode(text, add_special_tokens=False, verbose=False), _encode(file, text)
        if ids != expected:
            names = [[file.id_to_token(index) for index in reading] for reading in (ids, expected)]
            return f"{text!r} becomes {_shown(*names)}; tokenizer.json says {_shown(*reversed(names))}"
        back = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if back != (expected_back := file.decode(ids, skip_special_tokens=False)):
            return f"the ids of {text!r} decode to {back!r}; tokenizer.json says {expected_back!r}"
    return ""


def named_tokens(folder: Path) -> set[str]:
    """Every string in the files that may name tokens beside tokenizer.json."""
    found: set[str] = set()
    for name in NAMING_FILES:
        if (folder / name).is_file():
            with contextlib.suppress(ValueError):  # transformers tells what is wrong with it
                found.update(_strings(json.loads((folder / name).read_text(encoding="utf-8"))))
    return found


def find_difference_without_file(tokenizer: Any, folder: Path) -> str:
    """How a tokenizer differs from vocab.json or tokenizer.model of a folder without tokenizer.json; empty if it does
    not. How texts are split, vocab.json does not say; tokenizer.model does, if sentencepiece is installed."""
    path = folder / "vocab.json"
    if path.is_file():
        own = tokenizer.get_vocab()
        for token, index in json.loads(path.read_text(encoding="utf-8")).items():
            if own.get(token) != index:
                return f"the token {token!r} gets the id {own.get(token)}; vocab.json says {index}"
    path = folder / "tokenizer.model"
    if path.is_file() and importlib.util.find_spec("sentencepiece"):
        return _difference_from_model(tokenizer, path)
    return "" if tokenizer.encode(TEXTS[0], add_special_tokens=False) else f"{TEXTS[0]!r} becomes no token"


def _difference_from_model(tokenizer: Any, path: Path) -> str:
    import sentencepiece

    try:
        model = sentencepiece.SentencePieceProcessor(model_file=str(path))
    except RuntimeError:  # another kind of file of that name, such as tiktoken's
        return ""
    for text in TEXTS:
        if text[0] in " \n\t▁":
            continue  # transformers puts no further space before one: not the way of the model, but of every class
        tokens = tokenizer.convert_ids_to_tokens(tokenizer.encode(text, add_special_tokens=False, verbose=False))
        pieces = model.encode(text, out_type=str)
        if tokens != pieces:
            return f"{text!r} becomes {_shown(tokens, pieces)}; tokenizer.model says {_shown(pieces, tokens)}"
    return ""


@contextlib.contextmanager
def heard(folder: Path) -> Iterator[list[str]]:
    """What transformers warns of while it builds the tokenizer of `folder`, however quiet the library is.

    All of it means other ids: a split that is known to be wrong, a vocabulary file read in another way.
    """
    lines: list[str] = []
    with warnings_of("transformers.tokenization_utils_tokenizers") as messages:
        yield lines
    lines += [f"transformers warns: {' '.join(message.split())}" for message in messages]
    if _is_of_another_family(folder):
        lines[:] = [line for line in lines if "fix_mistral_regex" not in line]


def _is_of_another_family(folder: Path) -> bool:
    """Whether config.json names a model that is none of Mistral's, of which transformers warns all the same where the
    version that wrote it is not there."""
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type", "")
    except (OSError, ValueError, AttributeError):
        return False
    return bool(model_type) and not any(name in model_type for name in ("mistral", "ministral", "pixtral", "voxtral"))


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from value
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def _texts(file: Tokenizer) -> Iterator[str]:
    yield from TEXTS
    for token in file.get_added_tokens_decoder().values():
        yield from (pattern.format(token.content) for pattern in AROUND)


def _encode(file: Tokenizer, text: str) -> list[int]:
    return file.encode(text, add_special_tokens=False).ids


def _shown(tokens: list[Any], others: list[Any]) -> str:
    """The tokens from a little before the first that differs."""
    same = next((i for i, pair in enumerate(zip(tokens, others)) if pair[0] != pair[1]), min(len(tokens), len(others)))
    start = max(0, same - 3)
    part = tokens[start : start + SHOWN_TOKENS]
    before, after = "... " if start else "", " ..." if start + SHOWN_TOKENS < len(tokens) else ""
    return f"{before}{part}{after}"
