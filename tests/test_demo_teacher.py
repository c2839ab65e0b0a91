"""The demo's text, tokenizer and teacher, on a miniature standard library."""

import dataclasses
import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from pipeline.errors import CorpusError
from pipeline.processes import owner_name
from pipeline.progress import Progress, Reporter
from stages.demo import teacher as teacher_module
from stages.demo.recipe import DemoRecipe, student_config
from stages.demo.teacher import ensure_teacher, train_teacher, train_tokenizer
from stages.demo.text import HELD_OUT, TRAIN, collect_text, is_held_out, read_documents, sample_documents

TINY = DemoRecipe(
    vocab_size=300,
    sequence_length=32,
    teacher_hidden_size=32,
    teacher_intermediate_size=64,
    teacher_layers=1,
    teacher_head_size=32,
    teacher_tokens=2 * 4 * 32,
    teacher_batch_size=4,
)

AWKWARD_TEXTS = [
    "The quick brown fox's 3.14 don't\n\n  jump .",
    "中文分词，測試。 привет 🙂 naïve",
    "def f(x: int) -> str:\r\n\treturn f'{x!r}'  # comment\n\n\n    ",
    "\x00\x01\x1b[0m\x7f\u2028\ufeff\u0301e\u200d",
    " leading and trailing ",
    "<|endoftext|> , .",
]


@pytest.fixture(autouse=True)
def miniature_library(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the shape of a standard library, in the place of the real one."""
    root = tmp_path_factory.mktemp("stdlib")
    for index in range(120):
        write(
            root / f"module_{index}.py",
            f'"""Module {index}."""\n\n\ndef function_{index}(x):\n    return x + {index}\n' * 3,
        )
    write(root / "copy_a.py", "same = 'text'\n" * 20)
    write(root / "copy_b.py", "same = 'text'\n" * 20)
    write(root / "site-packages" / "foreign.py", "foreign = True\n" * 20)
    write(root / "test" / "test_x.py", "tested = True\n" * 20)
    write(
        root / "pydoc_data" / "topics.py",
        f"topics = {{'assert': {'Assert statement. ' * 9!r}, 'del': {'Del. ' * 30!r}}}\n",
    )
    (root / "latin.py").write_bytes("name = 'caf\xe9'\n".encode("latin-1") * 20)
    monkeypatch.setattr("stages.demo.text.sysconfig.get_path", lambda name: str(root))
    return root


class Lines(Reporter, Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.total = self.done = 0

    def write(self, line: str, level: int) -> None:
        self.lines.append(line)

    def progress(self, what: str, total: int, unit: str = "tokens") -> Progress:
        self.total = total
        return self

    def advance(self, amount: int, note: str = "") -> None:
        self.done += amount


def write(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(text, encoding="utf-8")


def sources(path: Path) -> list[str]:
    return [document["source"] for document in read_documents(path)]


def test_split_is_deterministic_and_no_held_out_text_is_trained_on(tmp_path: Path) -> None:
    summary = collect_text(tmp_path / "a")
    collect_text(tmp_path / "b")
    for name in (TRAIN, HELD_OUT):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    trained = {document["text"] for document in read_documents(tmp_path / "a" / TRAIN)}
    held_out = {document["text"] for document in read_documents(tmp_path / "a" / HELD_OUT)}
    assert trained
    assert held_out
    assert not trained & held_out
    assert summary.train_documents == len(trained)
    assert summary.held_out_documents == len(held_out)


def test_split_of_a_file_does_not_depend_on_the_other_files(miniature_library: Path, tmp_path: Path) -> None:
    collect_text(tmp_path / "before")
    (miniature_library / "module_7.py").unlink()
    collect_text(tmp_path / "after")
    assert sources(tmp_path / "after" / HELD_OUT) == [
        source for source in sources(tmp_path / "before" / HELD_OUT) if source != "module_7.py"
    ]


def test_copies_foreign_files_and_other_encodings_stay_out_and_are_counted(tmp_path: Path) -> None:
    summary = collect_text(tmp_path)
    found = sources(tmp_path / TRAIN) + sources(tmp_path / HELD_OUT)
    assert ("copy_a.py" in found, "copy_b.py" in found) == (True, False)
    assert not [source for source in found if "site-packages" in source or source.startswith("test/")]
    assert (summary.duplicates, summary.not_utf8) == (1, 1)


def test_each_topic_of_the_reference_is_a_document_and_none_is_held_out(tmp_path: Path) -> None:
    collect_text(tmp_path)
    topics = [source for source in sources(tmp_path / TRAIN) if source.startswith("pydoc_data/")]
    assert topics == ["pydoc_data/topics.py#assert", "pydoc_data/topics.py#del"]


def test_a_python_without_sources_is_an_error_that_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=str(tmp_path)):
        collect_text(tmp_path / "out", root=tmp_path)
    assert not (tmp_path / "out").exists()


def test_real_standard_library_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    summary = collect_text(tmp_path)
    assert summary.train_bytes > 5_000_000
    assert 0.01 < summary.held_out_bytes / summary.train_bytes < 0.15
    assert all(is_held_out(source) for source in sources(tmp_path / HELD_OUT))


def test_sample_is_a_deterministic_part_of_the_text_within_its_budget(tmp_path: Path) -> None:
    collect_text(tmp_path)
    written = sample_documents(tmp_path / TRAIN, tmp_path / "sample.jsonl", 3000)
    texts = {document["source"]: document["text"] for document in read_documents(tmp_path / TRAIN)}
    sample = list(read_documents(tmp_path / "sample.jsonl"))
    assert 2800 < written <= 3000
    assert written == sum(len(document["text"].encode()) for document in sample)
    assert all(texts[document["source"]].startswith(document["text"]) for document in sample)
    first = (tmp_path / "sample.jsonl").read_bytes()
    sample_documents(tmp_path / TRAIN, tmp_path / "sample.jsonl", 3000)
    assert (tmp_path / "sample.jsonl").read_bytes() == first


def test_tokenizer_gives_back_every_byte(tmp_path: Path) -> None:
    collect_text(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(train_tokenizer(tmp_path / TRAIN, tmp_path / "tok", vocab_size=300))
    for text in AWKWARD_TEXTS + [chr(code) for code in range(0x250)]:
        assert tokenizer.decode(tokenizer.encode(text)).encode() == text.encode()
    assert (tokenizer.eos_token, tokenizer.eos_token_id, tokenizer.pad_token_id) == ("<|endoftext|>", 0, 1)
    assert len(tokenizer) == 300


def test_too_little_text_for_the_vocabulary_is_an_error(tmp_path: Path) -> None:
    collect_text(tmp_path)
    with pytest.raises(CorpusError, match="expected 30000"):
        train_tokenizer(tmp_path / TRAIN, tmp_path / "tok", vocab_size=30_000)
    assert not (tmp_path / "tok").exists()


def test_a_teacher_of_two_steps_loads_and_scores_text(tmp_path: Path) -> None:
    reporter = Lines()
    folder = ensure_teacher(tmp_path, TINY, reporter).folder
    assert (folder / "model.safetensors").is_file()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    logits = model(torch.tensor([tokenizer.encode("def function(x):")])).logits
    assert logits.shape[-1] == 300
    assert torch.isfinite(logits).all()
    assert [line.split(":")[0] for line in reporter.lines] == ["text", "tokenizer"]
    assert (reporter.total, reporter.done) == (256, 256)


def test_training_lowers_the_loss_and_repeats_exactly(tmp_path: Path) -> None:
    recipe = dataclasses.replace(TINY, teacher_tokens=40 * 4 * 32)
    weights = []
    for name in ("first", "second"):
        model = AutoModelForCausalLM.from_pretrained(ensure_teacher(tmp_path / name, recipe).folder)
        weights.append(model.lm_head.weight)
    assert torch.equal(*weights)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first" / "teacher")
    ids = torch.tensor([tokenizer.encode("def function_3(x):\n    return x + 3\n")])
    assert model(ids, labels=ids).loss.item() < 4.5  # log(300) is 5.7


def test_a_finished_teacher_is_reused_and_another_recipe_or_text_replaces_it(
    miniature_library: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[DemoRecipe] = []

    def counting_train(model: object, sequences: object, recipe: DemoRecipe, progress: object) -> None:
        trained.append(recipe)

    monkeypatch.setattr(teacher_module, "_train", counting_train)
    other = dataclasses.replace(TINY, teacher_layers=2)
    finished = [ensure_teacher(tmp_path, recipe) for recipe in (TINY, TINY, other, other)]
    assert trained == [TINY, other]
    assert finished[0].seconds == finished[1].seconds > 0
    assert json.loads((tmp_path / "teacher" / "config.json").read_text())["num_hidden_layers"] == 2
    write(miniature_library / "module_new.py", "new = 'text'\n" * 20)
    ensure_teacher(tmp_path, other)
    assert trained == [TINY, other, other]


def test_a_killed_training_leaves_no_folder_that_looks_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("transformers.LlamaForCausalLM.save_pretrained", killed)
        with pytest.raises(KeyboardInterrupt):
            ensure_teacher(tmp_path, TINY)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text", "tokenizer"]
    finished = subprocess.Popen(["true"])
    finished.wait()
    (tmp_path / f"teacher.{owner_name().rpartition('.')[0]}.{finished.pid}.partial").mkdir()  # killed with -9
    assert (ensure_teacher(tmp_path, TINY).folder / "recipe.json").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["teacher", "text", "tokenizer"]


def test_a_failed_training_keeps_the_teacher_that_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = ensure_teacher(tmp_path, TINY).folder
    before = (folder / "model.safetensors").read_bytes()

    def failing(*_: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(teacher_module, "_train", failing)
    with pytest.raises(RuntimeError):
        train_teacher(tmp_path / "text" / TRAIN, tmp_path / "tokenizer", folder, TINY)
    assert (folder / "model.safetensors").read_bytes() == before


def test_student_config_is_a_smaller_llama_of_the_teachers_vocabulary(tmp_path: Path) -> None:
    recipe = DemoRecipe()
    (tmp_path / "config.json").write_text(json.dumps(student_config(recipe)))
    from transformers import AutoConfig

    student = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert student.config.vocab_size == recipe.vocab_size
    assert student.config.head_dim == recipe.student_head_size
    assert student.lm_head.weight is not student.model.embed_tokens.weight
