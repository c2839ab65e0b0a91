"""Published rules of text quality, one by one, and by which kind of text each is judged.

Gopher's rules (Rae et al., arXiv 2112.11446, table A1 and the text before it) and those of C4 (Raffel et al., arXiv
1910.10683, section 2.2) as far as they are about whole documents; a document is kept or dropped and never edited. They
were made for English. Chinese is judged by characters, of which two stand for a word; code by the lengths of its lines
and its share of letters and digits (as for Codex, arXiv 2107.03374). What a rule has no measure for it lets pass.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from pipeline.errors import ConfigError

HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
OTHER_SCRIPT = re.compile(r"[\u0370-\u1cff\u3040-\u30ff\uac00-\ud7af]")
CHINESE_WORD = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3400-\u4dbf\u4e00-\u9fff]+")
CODE_LINE = re.compile(
    r"[;{}\])]\s*$|^\s*(def|class|import|from \S+ import|return|if .*[:{]|for .*[:{]|while .*[:{]|else|elif|try|except|"
    r"fn|func|function|let|const|var|public|private|static|struct|enum|#include|package|use)\b|"
    r"^\s*[\w.\[\]]+ ?[-+*/|&]?= ?\S"
)
"""A line as those of code look: how it ends, how it begins, or an assignment."""
SENTENCE_ENDS = (".", "?", "!", '"', "”", "。", "？", "！", "」")
ENGLISH_STOP_WORDS = frozenset({"the", "be", "to", "of", "and", "that", "have", "with"})
CHINESE_STOP_WORDS = frozenset("的是了在和有不我")
TOP_N_GRAMS = ((2, 0.20), (3, 0.18), (4, 0.16))
"""Words, and the share of the characters that the most frequent n-gram may have."""
REPEATED_N_GRAMS = ((5, 0.15), (6, 0.14), (7, 0.13), (8, 0.12), (9, 0.11), (10, 0.10))
"""Words, and the share of the characters that may lie in n-grams that came before."""
KINDS = ("latin", "chinese", "code", "other")


@dataclass(frozen=True)
class Reading:
    """A text as the rules see it; each part is made once, when it is asked for."""

    text: str

    @cached_property
    def kind(self) -> str:
        """One of KINDS, by its characters and the look of its lines."""
        num_letters = sum(map(str.isalpha, self.text))
        if num_letters and len(HAN.findall(self.text)) >= 0.3 * num_letters:
            return "chinese"
        if num_letters and len(OTHER_SCRIPT.findall(self.text)) >= 0.5 * num_letters:
            return "other"
        coded = sum(CODE_LINE.search(line) is not None for line in self.lines)
        return "code" if coded >= max(3, 0.4 * len(self.lines)) else "latin"

    @cached_property
    def lines(self) -> list[str]:
        """Those that hold anything, without white space around."""
        return [line.strip() for line in self.text.splitlines() if line.strip()]

    @cached_property
    def paragraphs(self) -> list[str]:
        """What stands between empty lines."""
        return [part.strip() for part in re.split(r"\n\s*\n", self.text) if part.strip()]

    @cached_property
    def words(self) -> list[str]:
        """What stands between white space; of Chinese its characters, and words of other letters."""
        return CHINESE_WORD.findall(self.text) if self.kind == "chinese" else self.text.split()

    @property
    def scale(self) -> int:
        """How many of `words` stand for a word."""
        return 2 if self.kind == "chinese" else 1

    @property
    def has_words(self) -> bool:
        """Whether words and sentences of the text can be told apart."""
        return self.kind in ("latin", "chinese")


def _word_count(text: Reading) -> bool:
    return text.has_words and not 50 <= len(text.words) / text.scale <= 100_000


def _word_length(text: Reading) -> bool:
    words = text.words
    return text.kind == "latin" and bool(words) and not 3 <= sum(map(len, words)) / len(words) <= 10


def _symbols(text: Reading) -> bool:
    if not text.has_words:
        return False
    allowed = 0.1 * len(text.words) / text.scale
    return text.text.count("#") > allowed or text.text.count("...") + text.text.count("…") > allowed


def _bullets(text: Reading) -> bool:
    return text.has_words and _share(text.lines, lambda line: line.startswith(("•", "-", "*", "·"))) > 0.9


def _ellipses(text: Reading) -> bool:
    return text.has_words and _share(text.lines, lambda line: line.endswith(("...", "…"))) > 0.3


def _letters(text: Reading) -> bool:
    return text.has_words and _share(text.words, lambda word: any(map(str.isalpha, word))) < 0.8


def _stop_words(text: Reading) -> bool:
    if text.kind == "chinese":
        return len(CHINESE_STOP_WORDS & set(text.words)) < 2
    return (
        text.kind == "latin" and sum(word.lower().strip(",.;:!?\"'()") in ENGLISH_STOP_WORDS for word in text.words) < 2
    )


def _repeated_lines(text: Reading) -> bool:
    if text.kind == "code":
        return False  # closing brackets
    return any(
        repeated > 0.30 * len(parts) or characters > 0.20 * max(sum(map(len, parts)), 1)
        for parts in (text.lines, text.paragraphs)
        for repeated, characters in [_repeated(parts)]
    )


def _repeated_words(text: Reading) -> bool:
    if not text.has_words:
        return False
    words, total = text.words, max(sum(map(len, text.words)), 1)
    return any(_top_characters(words, text.scale * n) > share * total for n, share in TOP_N_GRAMS) or any(
        _repeated_characters(words, text.scale * n) > share * total for n, share in REPEATED_N_GRAMS
    )


def _sentences(text: Reading) -> bool:
    """Fewer than 5 that end in a line which ends as a sentence does and has 3 words."""
    if not text.has_words:
        return False
    ends = [
        len(re.findall(r"[.?!。？！]+(?=[\s\"”」]|$)|[。？！]", line)) or 1
        for line in text.lines
        if line.endswith(SENTENCE_ENDS) and not line.endswith("...") and len(Reading(line).words) >= 3 * text.scale
    ]
    return sum(ends) < 5


def _lorem_ipsum(text: Reading) -> bool:
    return "lorem ipsum" in text.text.lower()


def _braces(text: Reading) -> bool:
    return text.kind != "code" and "{" in text.text


def _code_lines(text: Reading) -> bool:
    lengths = [len(line) for line in text.text.splitlines()] or [0]
    return text.kind == "code" and (max(lengths) > 1000 or sum(lengths) / len(lengths) > 100)


def _code_letters(text: Reading) -> bool:
    return text.kind == "code" and sum(map(str.isalnum, text.text)) < 0.25 * len(text.text)


RULES: dict[str, Callable[[Reading], bool]] = {
    "gopher-word-count": _word_count,
    "gopher-word-length": _word_length,
    "gopher-symbols": _symbols,
    "gopher-bullets": _bullets,
    "gopher-ellipses": _ellipses,
    "gopher-letters": _letters,
    "gopher-stop-words": _stop_words,
    "gopher-repeated-lines": _repeated_lines,
    "gopher-repeated-words": _repeated_words,
    "c4-sentences": _sentences,
    "c4-lorem-ipsum": _lorem_ipsum,
    "c4-braces": _braces,
    "code-lines": _code_lines,
    "code-letters": _code_letters,
}
"""Each says whether a text breaks it."""


def rules_of(names: Iterable[str]) -> tuple[str, ...]:
    """The rules that names of rules, or of all that begin so, stand for, in the order of RULES; raises ConfigError."""
    chosen = set()
    for name in names:
        found = [rule for rule in RULES if rule == name or rule.partition("-")[0] == name]
        if not found:
            raise ConfigError(f"quality is {name!r}; choose gopher, c4, code, or one of: {', '.join(RULES)}.")
        chosen.update(found)
    return tuple(rule for rule in RULES if rule in chosen)


def broken_rule(text: Reading, rules: Sequence[str]) -> str | None:
    """The first rule that the text breaks."""
    return next((rule for rule in rules if RULES[rule](text)), None)


def _share(items: Sequence[str], holds: Callable[[str], bool]) -> float:
    return sum(map(holds, items)) / max(len(items), 1)


def _repeated(parts: Sequence[str]) -> tuple[int, int]:
    """How many came before, and their characters."""
    counts = Counter(parts)
    return len(parts) - len(counts), sum((count - 1) * len(part) for part, count in counts.items())


def _top_characters(words: Sequence[str], n: int) -> int:
    """Characters of all occurrences of the most frequent n-gram; of one that comes up once none."""
    counts = Counter(tuple(words[at : at + n]) for at in range(len(words) - n + 1))
    return max((count * sum(map(len, gram)) for gram, count in counts.items() if count > 1), default=0)


def _repeated_characters(words: Sequence[str], n: int) -> int:
    """Characters of the words that lie in an n-gram that came before, each counted once."""
    seen: set[tuple[str, ...]] = set()
    is_repeated = [False] * len(words)
    for at in range(len(words) - n + 1):
        gram = tuple(words[at : at + n])
        if gram in seen:
            is_repeated[at : at + n] = [True] * n
        seen.add(gram)
    return sum(len(word) for word, repeated in zip(words, is_repeated) if repeated)
