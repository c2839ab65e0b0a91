"""The transformers engine over kinds of teachers whose states, masks and experts padding could change."""

import pytest
from transformers.models.llama.modeling_llama import LlamaModel

from pipeline.errors import EngineError
from tests.support.helpers import tiny_tokenizer
from tests.support.kinds import kind_model
from tests.support.small import make_teacher
from tests.test_cache_logits import assert_exact, capture, settings


@pytest.mark.parametrize("kind", ["bloom", "gpt_oss", "lfm2", "llama4_text", "mamba2"])
def test_padded_batches_of_every_kind_are_exact(tmp_path, corpus, kind):
    """Against every document alone in float64."""
    teacher = tmp_path / kind
    attends = {"layer_types": ["conv", "full_attention"]} if kind == "lfm2" else {}  # its cache has to have a length
    kind_model(kind, len(tiny_tokenizer(teacher)) + 5, **attends).save_pretrained(teacher)
    config = settings(teacher, corpus, tmp_path / "cache", engine="transformers")
    capture(config)
    assert_exact(config.out, teacher, corpus)


@pytest.mark.parametrize(("dtype", "share"), [("float32", 1e-4), ("bfloat16", 0.2)])
def test_teacher_that_padding_changes_is_refused(tmp_path, corpus, monkeypatch, dtype, share):
    """A state that depends on the width of the batch, and on no token that follows."""
    teacher = make_teacher(tmp_path / "teacher")
    forward = LlamaModel.forward

    def counts_columns(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.last_hidden_state = out.last_hidden_state * (1 + share * out.last_hidden_state.shape[1])
        return out

    config = settings(teacher, corpus, tmp_path / "cache", engine="transformers", dtype=dtype)
    monkeypatch.setattr(LlamaModel, "forward", counts_columns)
    with pytest.raises(EngineError, match=r"when other text or padding follows it, and arithmetic explains"):
        capture(config)
