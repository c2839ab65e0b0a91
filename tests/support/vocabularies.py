"""Small tokenizers of every kind, trained on the spot, as files tokenizer.json."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from tests.support.helpers import BOS, EOS, TRAINING_TEXT

TEXT = (*TRAINING_TEXT, "  indented\tby 12 345 tabs\n\n\nCafé naïve ÀÉ 🙂 don't it's we're\n", "▁a b  c 3.14")
SPECIAL = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", BOS, EOS)]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level() -> Tokenizer:
    """GPT-2's way."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _deepseek() -> Tokenizer:
    """Byte-level as deepseek's: digits alone, Chinese apart, words with one space before them."""
    tokenizer = _byte_level()
    split = [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", r"[一-龥]+"]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in split),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return tokenizer


def _metaspace() -> Tokenizer:
    """SentencePiece BPE as Llama's class makes it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def _llama_2() -> Tokenizer:
    """SentencePiece BPE as Llama 2's file has it: a space before each piece between special tokens."""
    tokenizer = _metaspace()
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = None
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return tokenizer


def _unigram() -> Tokenizer:
    """SentencePiece unigram with NFKC, as T5's."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def _wordpiece() -> Tokenizer:
    """BERT's, lower-casing."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def _cased_words() -> Tokenizer:
    """WordPiece that keeps case and splits at white space alone."""
    tokenizer = _wordpiece()
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


KINDS = {
    "byte-level": _byte_level,
    "deepseek": _deepseek,
    "metaspace": _metaspace,
    "llama-2": _llama_2,
    "unigram": _unigram,
    "wordpiece": _wordpiece,
    "cased-words": _cased_words,
}
LOSSLESS = ("byte-level", "deepseek", "metaspace", "llama-2")
"""Kinds that decode every text to itself."""


def make_file(kind: str, path: Path, vocab_size: int = 700) -> Tokenizer:
    """Train the tokenizer of a kind, write it to `path`, and return it."""
    tokenizer = KINDS[kind]()
    settings = {"vocab_size": vocab_size, "special_tokens": SPECIAL, "show_progress": False}
    if isinstance(tokenizer.model, models.Unigram):
        trainer = trainers.UnigramTrainer(**settings, unk_token="<unk>")
    elif isinstance(tokenizer.model, models.WordPiece):
        trainer = trainers.WordPieceTrainer(**settings)
    elif tokenizer.model.byte_fallback:
        trainer = trainers.BpeTrainer(**settings)
    else:
        trainer = trainers.BpeTrainer(**settings, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    post_processor, tokenizer.post_processor = tokenizer.post_processor, None
    tokenizer.train_from_iterator(TEXT * 4, trainer)
    if post_processor is not None:
        tokenizer.post_processor = post_processor
    path.parent.mkdir(parents=True, exist_ok=True)
    document = json.loads(tokenizer.to_str())
    if document["model"].get("byte_fallback"):
        vocabulary = document["model"]["vocab"]
        vocabulary |= {token: len(vocabulary) + index for index, token in enumerate(BYTES)}
    path.write_text(json.dumps(document))
    return Tokenizer.from_file(str(path))
