"""Documents that share a row, in students of every way to know of them: against each document alone, in float64."""

import json

import numpy as np
import pytest
import torch

from pipeline import open_cache
from pipeline.errors import PipelineError
from pipeline.hidden import first_forward
from pipeline.models import text_body
from pipeline.progress import KeptLines
from stages.train_student.agreement import dense_loss
from stages.train_student.dataset import Collate, stack_rows
from stages.train_student.documents import LENGTH_CLASSES, _length_classes, target_hidden
from stages.train_student.head import attach_fused_loss
from stages.train_student.isolation import isolate_documents, probe
from stages.train_student.loss_settings import LossSettings
from stages.train_student.run import train_student
from stages.train_student.settings import TrainConfig
from stages.train_student.targets import DistillationTargets
from tests.support.kinds import APART, MIXED, kind_model, kind_student
from tests.support.oracle import softmax
from tests.support.small import make_cache, true_logits

VOCAB = 90
LENGTHS = (13, 19, 5)


@pytest.fixture(scope="module")
def cache(tmp_path_factory, corpus):
    return make_cache(tmp_path_factory.mktemp("cache"), corpus, max_kl_error=0.0)


@pytest.fixture
def documents():
    return list(torch.randint(1, VOCAB, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).split(LENGTHS))


def hooked(model):
    attach_fused_loss(model, LossSettings(vocab_size=VOCAB))
    return model


@pytest.mark.parametrize("kind", APART)
def test_kind_that_follows_positions_keeps_its_rows(documents, kind):
    model = hooked(kind_model(kind, VOCAB))
    assert isolate_documents(model, model, documents) is None
    assert not model.one_by_one


@pytest.mark.parametrize("kind", MIXED)
def test_kind_that_mixes_documents_is_found_and_computes_each_alone(documents, kind):
    """Hidden states of every document of a padded batch, and the gradients that they give, are those of it alone."""
    model = hooked(kind_model(kind, VOCAB, dtype="float64"))
    note = isolate_documents(model, model, documents)
    assert "does not keep the documents of a row apart" in note
    assert "`pipeline prepare --packing none`" in note
    rows = [(torch.cat(documents).numpy(), list(LENGTHS)), (documents[1].numpy()[:11], [11])]
    input_ids, position_ids = stack_rows(rows)
    target_rows = torch.tensor([2, 12, 14, 30, 33, 36, 38, 46])
    hidden = target_hidden(model, input_ids, position_ids, target_rows, one_by_one=model.one_by_one).hidden_MH
    alone = [kind_output(model, document) for document in [*documents, documents[1][:11]]]
    expected = torch.cat(alone)[target_rows]
    torch.testing.assert_close(hidden, expected, rtol=1e-6, atol=1e-6)
    weights = torch.linspace(-1, 1, hidden.numel(), dtype=hidden.dtype).view_as(hidden)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    pairs = [torch.autograd.grad((out * weights).sum(), trained, allow_unused=True) for out in (hidden, expected)]
    for ours, theirs in zip(*pairs, strict=True):
        if theirs is not None:
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def kind_output(model, document):
    positions = torch.arange(len(document))[None]
    return text_body(model)(input_ids=document[None], position_ids=positions, use_cache=False).last_hidden_state[0]


def test_model_that_looks_ahead_is_refused(documents):
    model = hooked(kind_model("llama", VOCAB))
    model.model.layers[0].register_forward_hook(lambda module, inputs, out: out + 0.01 * out.mean(1, keepdim=True))
    with pytest.raises(PipelineError, match=r"LlamaForCausalLM: .* as in a model that is not causal; this student"):
        isolate_documents(model, model, documents)


def test_leak_of_a_thousandth_into_one_token_of_a_long_row_is_found():
    """A convolution without attention behind it mixes the first token of a document alone."""
    documents = list(torch.randint(1, VOCAB, (96,), generator=torch.Generator().manual_seed(1)).split([48, 48]))
    model = hooked(kind_model("llama", VOCAB))

    def leak(module, inputs, out):
        return (
            torch.cat([out[:, :48], out[:, 48:49] + 1e-3 * out[:, 47:48], out[:, 49:]], 1) if out.shape[1] > 48 else out
        )

    model.model.norm.register_forward_hook(leak)
    assert isolate_documents(model, model, documents) is not None


def test_row_of_one_document_is_halved_only_where_documents_share_rows(cache):
    sequences = [sequence for sequence in open_cache(cache) if len(sequence.document_lengths) == 1][:1]
    halves, whole = probe(sequences, "isolated"), probe(sequences, "crossing")
    assert [len(half) for half in halves] == [len(part) for part in whole[0].tensor_split(2)]
    several = probe(open_cache(cache), "isolated")
    assert len(several) > 1
    assert [len(document) for document in probe(sequences, "isolated", few_tokens=True)] == [
        min(len(half), 128) for half in halves
    ]


def test_length_classes_pad_a_document_to_less_than_twice_its_length():
    lengths = [96, 49, 48, 25, 24, 13, 12, 7, 6, 5, 4, 3, 2, 1]
    classes = list(_length_classes(lengths, 96))
    assert len(classes) == LENGTH_CLASSES
    assert sorted(place for chosen in classes for place in chosen) == list(range(len(lengths)))
    for chosen in classes[:-1]:
        found = [lengths[place] for place in chosen]
        assert max(found) < 2 * min(found)


@pytest.mark.parametrize("one_by_one", [False, True])
def test_batch_without_target_rows_has_no_hidden_states(documents, one_by_one):
    model, none = kind_model("mamba2", VOCAB), torch.zeros(0, dtype=torch.long)
    positions = torch.arange(len(documents[0]))[None]
    assert target_hidden(model, documents[0][None], positions, none, one_by_one=one_by_one).hidden_MH.shape == (0, 32)


def test_failing_forward_is_one_line():
    with (
        pytest.raises(PipelineError, match="Some: its forward ends in ValueError: two lines; this model"),
        first_forward("Some"),
    ):
        raise ValueError("two\nlines")


def test_recurrent_student_trains_on_packed_rows_as_on_documents_alone(tmp_path, cache):
    """The run says that it takes longer; its loss and held-out metrics are those of every document by itself."""
    vocab_size = open_cache(cache).manifest.vocab_size
    student = kind_student(tmp_path / "student", "mamba2", vocab_size)
    values = {"max_steps": 2, "batch_size": 4, "log_steps": 1, "save_steps": 100, "learning_rate": 1e-3}
    config = TrainConfig(student=student, cache=cache, out=tmp_path / "run", eval_cache=cache, **values)
    notes = KeptLines()
    metrics = train_student(config, notes)
    assert sum("Mamba2ForCausalLM: does not keep the documents of a row apart" in line for line in notes.lines) == 1
    total, count = 0.0, 0
    for sequence in open_cache(cache):
        labels = sequence.token_ids[sequence.target_positions + 1]
        probs = softmax(true_logits(config.out, sequence, vocab_size), 1.0)
        total, count = total - np.log(probs[np.arange(len(labels)), labels]).sum(), count + len(labels)
    assert metrics["eval_cross_entropy"] == pytest.approx(total / count, rel=1e-4)
    steps = [json.loads(line) for line in (config.out / "log.jsonl").read_text().splitlines()]
    assert all(np.isfinite(step["loss"]) for step in steps if "loss" in step)


def test_fused_loss_of_a_kind_that_mixes_documents_is_that_of_its_own_logits_alone(cache):
    vocab_size = open_cache(cache).manifest.vocab_size
    model = kind_model("lfm2", vocab_size, dtype="float64")
    settings = LossSettings(vocab_size=vocab_size)
    attach_fused_loss(model, settings)
    sequences = [open_cache(cache)[index] for index in (3, 8, 1)]
    batch = Collate(settings)(sequences)
    del batch["keys"]
    rows = []
    for sequence in sequences:
        parts = torch.tensor(sequence.token_ids.astype(np.int64)).split(sequence.document_lengths.tolist())
        logits = torch.cat([model(input_ids=part[None], use_cache=False).logits[0] for part in parts])
        rows.append(logits[torch.tensor(sequence.target_positions.astype(np.int64))])
    expected = dense_loss(torch.cat(rows), DistillationTargets.of_batch(batch), settings).item()
    assert model(**batch).loss.item() != pytest.approx(expected, rel=1e-6)
    model.one_by_one = True
    assert model(**batch).loss.item() == pytest.approx(expected, rel=1e-9)
