"""Other people's checkpoints: whole ones load; what would leave a model random in part is refused in one line."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    BertConfig,
    T5Config,
)

from pipeline.errors import ConfigError
from pipeline.models import NO_LIMIT, read_model, text_body
from pipeline.weights import common_pattern, weight_files

SMALL = {
    "vocab_size": 120,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
SMALL_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL_VISION |= {"image_size": 28, "patch_size": 14}
GPT2 = {"vocab_size": 120, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
KINDS = {
    "llama": ("llama", SMALL),
    "tied": ("qwen3", SMALL | {"tie_word_embeddings": True}),
    "experts": ("mixtral", SMALL | {"num_local_experts": 4}),
    "gpt2": ("gpt2", GPT2),
    "pictures": ("gemma3", {"text_config": SMALL, "vision_config": SMALL_VISION, "mm_tokens_per_image": 1}),
    "pictures tied outside": ("mistral3", {"text_config": SMALL | {"model_type": "mistral"}}),
}
KINDS["pictures tied outside"][1]["vision_config"] = SMALL_VISION | {"model_type": "pixtral"}


@pytest.fixture(scope="module", params=KINDS)
def whole(request, tmp_path_factory) -> Path:
    """A random model of a kind, as transformers saves it."""
    folder = tmp_path_factory.mktemp("whole")
    kind, settings = KINDS[request.param]
    config = AutoConfig.for_model(kind, **settings)
    classes = AutoModelForImageTextToText if "vision_config" in settings else AutoModelForCausalLM
    classes.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture
def model(whole, tmp_path) -> Path:
    """A copy to be damaged."""
    return shutil.copytree(whole, tmp_path / "model")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "model.safetensors")


def change(folder: Path, **entries: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def an_inner(tensors: dict[str, torch.Tensor]) -> str:
    """A matrix of the last layer of the language model."""
    names = [name for name, tensor in tensors.items() if ".1." in name and "vision" not in name and tensor.ndim == 2]
    return sorted(names)[-1]


def test_whole_model_is_loaded_as_it_is(whole):
    folder = read_model(whole)
    assert folder.require_weights() == []
    assert (folder.vocab_size, folder.context_length, folder.quantization) == (120, 64, "none")
    loaded = folder.load("float32")
    saved = tensors_of(whole)
    embeddings = next(tensor for name, tensor in saved.items() if "embed_tokens" in name or "wte" in name)
    torch.testing.assert_close(loaded.get_input_embeddings().weight.data, embeddings, rtol=0, atol=0)
    ids = torch.arange(7)[None]
    own = loaded(input_ids=ids).logits
    hidden = text_body(loaded)(input_ids=ids, use_cache=False).last_hidden_state
    torch.testing.assert_close(loaded.get_output_embeddings()(hidden), own)
    assert folder.ties_head == (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight)


def without_a_matrix(folder: Path) -> None:
    tensors = tensors_of(folder)
    del tensors[an_inner(tensors)]
    write(folder, tensors)


def with_a_matrix_of_another_shape(folder: Path) -> None:
    tensors = tensors_of(folder)
    name = an_inner(tensors)
    tensors[name] = tensors[name][:, :-1]
    write(folder, tensors)


def under_a_prefix(folder: Path) -> None:
    write(folder, {f"backbone.{name}": tensor for name, tensor in tensors_of(folder).items()})


def with_a_bias_too_many(folder: Path) -> None:
    tensors = tensors_of(folder)
    write(folder, tensors | {an_inner(tensors).replace(".weight", ".lora_A.weight"): torch.zeros(3)})


def with_another_layer(folder: Path) -> None:
    tensors = tensors_of(folder)
    name = an_inner(tensors)
    write(folder, tensors | {name.replace(".1.", ".2.", 1): tensors[name]})


def without_embeddings(folder: Path) -> None:
    tensors = tensors_of(folder)
    write(
        folder, {name: tensor for name, tensor in tensors.items() if "embed_tokens" not in name and "wte" not in name}
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (without_a_matrix, "would start from random numbers|cannot be put together"),
        (with_a_matrix_of_another_shape, "another shape|cannot be put together"),
        (under_a_prefix, "would start from random numbers"),
        (with_a_bias_too_many, "would be left out"),
        (with_another_layer, "would be left out"),
        (without_embeddings, "would start from random numbers"),
    ],
)
def test_tensors_that_are_not_the_models_are_refused_and_named(model, damage, message):
    damage(model)
    with pytest.raises(ConfigError, match=message) as caught:
        read_model(model).require_weights()
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError) as caught:
        read_model(model).load("float32")
    assert "\n" not in str(caught.value)


def test_module_beside_the_language_model_is_noted_and_left_out(model):
    write(model, tensors_of(model) | {"v_head.summary.weight": torch.zeros(1, 32)})
    assert read_model(model).require_weights() == ["v_head.summary.weight"]
    read_model(model).load("float32")


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def pointer(folder: Path) -> None:
    lines = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
    (folder / "model.safetensors").write_text(lines)


def only_others(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q4_K_M.gguf")


def only_pth(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "consolidated.00.pth")


def nothing(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def other_bytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"\x80\x02}q\x00." * 40)


def pickled_code(folder: Path) -> None:
    import os

    (folder / "model.safetensors").unlink()

    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(folder / "executed"),)

    torch.save({"weight": Evil()}, folder / "pytorch_model.bin")


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def index_that_leads_away(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))


def index_that_is_none(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("[1]")


def stale_single_file(folder: Path) -> None:
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00001.safetensors")
    names = dict.fromkeys(tensors_of(folder), "model-00001-of-00001.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


@pytest.mark.parametrize("whole", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, r"model\.safetensors: not a whole weight file"),
        (pointer, r"model\.safetensors: a pointer of Git LFS"),
        (only_others, r"no weights there; found model\.Q4_K_M\.gguf"),
        (only_pth, r"no weights there; found consolidated\.00\.pth"),
        (nothing, r"no weights there; expected model\.safetensors"),
        (empty, r"model\.safetensors: empty"),
        (other_bytes, r"model\.safetensors: not a whole weight file"),
        (pickled_code, r"pytorch_model\.bin: not a whole weight file"),
        (missing_shard, r"names model-00002-of-00002\.safetensors, not there"),
        (index_that_leads_away, r"names '\.\./model\.safetensors'"),
        (index_that_is_none, r"not an index of weight files"),
        (stale_single_file, r"holds model\.safetensors, and model\.safetensors\.index\.json which does not name it"),
        (adapter, r"holds an adapter"),
    ],
)
def test_files_that_are_no_whole_checkpoint_are_refused_in_one_line(model, damage, message):
    damage(model)
    with pytest.raises(ConfigError, match=message) as caught:
        read_model(model).require_weights()
    assert "\n" not in str(caught.value)
    assert not (model / "executed").exists()


@pytest.mark.parametrize("whole", ["llama", "experts"], indirect=True)
def test_other_forms_of_a_whole_checkpoint_are_taken(whole, tmp_path):
    loaded = read_model(whole).load("float32")
    loaded.save_pretrained(tmp_path / "sharded", max_shard_size="20kB")
    assert len(weight_files(tmp_path / "sharded")) > 2
    shutil.copytree(whole, tmp_path / "pickled")
    torch.save(tensors_of(whole), tmp_path / "pickled" / "pytorch_model.bin")
    (tmp_path / "pickled" / "model.safetensors").unlink()
    for name in ("sharded", "pickled"):
        assert read_model(tmp_path / name).require_weights() == []
        state = read_model(tmp_path / name).load("float32").state_dict()
        assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("whole", ["llama"], indirect=True)
def test_pattern_of_the_weight_files_finds_no_others(model):
    assert common_pattern(weight_files(model)) == "model.safetensors"
    shutil.copy(model / "model.safetensors", model / "consolidated.safetensors")
    assert common_pattern(weight_files(model)) == "model.safetensors"
    loaded = read_model(model).load("float32")
    (model / "model.safetensors").unlink()
    loaded.save_pretrained(model, max_shard_size="20kB")
    pattern = common_pattern(weight_files(model))
    assert {path.name for path in model.glob(pattern)} == {path.name for path in weight_files(model)}
    shutil.copy(model / "consolidated.safetensors", model / "model-00009-of-00099.safetensors")
    assert common_pattern(weight_files(model)) is None


@pytest.mark.parametrize("whole", ["llama"], indirect=True)
@pytest.mark.parametrize("scheme", ["awq", "compressed-tensors"])
def test_quantised_checkpoint_that_lacks_a_weight_is_refused(model, scheme):
    suffix = {"awq": ".qweight", "compressed-tensors": ".weight_packed"}[scheme]
    tensors = {}
    for name, tensor in tensors_of(model).items():
        packed = name.endswith("proj.weight")
        tensors[name.replace(".weight", suffix) if packed else name] = tensor[:, :4] if packed else tensor
        if packed:
            tensors[name.replace(".weight", ".scales")] = torch.ones(3)
    write(model, tensors)
    change(model, quantization_config={"quant_method": scheme, "bits": 4})
    folder = read_model(model)
    assert folder.quantization == scheme
    assert folder.require_weights() == []
    del tensors[f"model.layers.1.mlp.up_proj{suffix}"]
    write(model, tensors)
    with pytest.raises(ConfigError, match=r"layers\.1\.mlp\.up_proj\.weight would start from random"):
        read_model(model).require_weights()


def bert(folder: Path) -> None:
    BertConfig(vocab_size=120).save_pretrained(folder)


def no_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def a_list(folder: Path) -> None:
    (folder / "config.json").write_text("[]")


def t5(folder: Path) -> None:
    T5Config(vocab_size=120).save_pretrained(folder)


def unknown_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "home-made", "vocab_size": 12}')


def no_type(folder: Path) -> None:
    (folder / "config.json").write_text('{"vocab_size": 12}')


def no_vocabulary(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "vocab_size": null}')


def odd_values(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "wide", "num_attention_heads": 0}')


def pictures_alone(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "vit"}')


@pytest.mark.parametrize(
    "damage", [no_json, a_list, t5, unknown_type, no_type, no_vocabulary, odd_values, pictures_alone]
)
def test_config_of_no_causal_lm_is_one_line_that_names_it(tmp_path, damage):
    damage(tmp_path)
    with pytest.raises(ConfigError, match=r"config\.json") as caught:
        read_model(tmp_path).model_class  # noqa: B018
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


@pytest.mark.parametrize(
    ("entries", "length"),
    [
        ({}, 64),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}, 256),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, 128),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}}, 64),
        ({"model_max_length": 32}, 32),
        ({"seq_length": None}, 64),
    ],
)
@pytest.mark.parametrize("whole", ["llama"], indirect=True)
def test_longest_sequence_is_read_under_every_name(model, entries, length):
    change(model, **entries)
    assert read_model(model).context_length == length


@pytest.mark.parametrize("whole", ["llama", "gpt2"], indirect=True)
def test_null_stands_for_what_the_class_has(model):
    change(model, architectures=None, text_config=None, quantization_config=None, rope_scaling=None, dtype=None)
    folder = read_model(model)
    found = (folder.architecture, folder.dtype, folder.quantization, folder.context_length)
    assert found == (type(folder.load("float32")).__name__, "float32", "none", 64)


def test_model_without_a_longest_sequence_has_no_limit(tmp_path):
    AutoConfig.for_model("mamba", hidden_size=32, num_hidden_layers=1, vocab_size=12).save_pretrained(tmp_path)
    assert read_model(tmp_path).context_length == NO_LIMIT


CUSTOM_CODE = """
import pathlib
from transformers import LlamaConfig, LlamaForCausalLM
pathlib.Path({marker!r}).touch()
class HomeConfig(LlamaConfig):
    model_type = "home-made"
class HomeForCausalLM(LlamaForCausalLM):
    config_class = HomeConfig
"""


@pytest.mark.parametrize("whole", ["llama"], indirect=True)
@pytest.mark.parametrize("model_type", ["home-made", "llama"])
def test_code_of_a_folder_runs_only_with_the_flag(model, tmp_path, monkeypatch, model_type):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    marker = tmp_path / "executed"
    (model / "home.py").write_text(CUSTOM_CODE.format(marker=str(marker)))
    auto_map = {"AutoConfig": "home.HomeConfig", "AutoModelForCausalLM": "home.HomeForCausalLM"}
    change(model, model_type=model_type, architectures=["HomeForCausalLM"], auto_map=auto_map)
    if model_type == "home-made":
        with pytest.raises(ConfigError, match="give --trust-remote-code"):
            read_model(model)
    else:
        read_model(model).load("float32")
    assert not marker.exists()
    trusted = read_model(model, trust_remote_code=True)
    trusted.require_weights()
    assert type(trusted.load("float32")).__name__ == "HomeForCausalLM"
    assert marker.exists()
