"""A model folder: its config.json by transformers' own reading, and loading it so that nothing of it is left random.

What a config says under other names (n_positions), in a part of it (text_config of a vision-language model) or by
its class's default is found by asking transformers. Nothing of a folder is executed unless the user allows it.
"""

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.errors import ConfigError
from pipeline.weights import judge, read_headers, require_all_tensors, weight_files

CONTEXT_NAMES = (
    *("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "model_max_length"),
    *("max_target_positions", "max_sequence_length", "max_seq_length", "seq_len"),
)
"""What configs call the longest sequence."""
STRETCHED = ("linear", "dynamic", "ntk")
"""Kinds of rotary scaling whose factor is not in the longest sequence yet; of the others it is."""
FACTORS = {"logit_scale": 1, "lm_head_multiplier": 1, "logits_scaling": -1}
"""Attributes that scale the logits (Cohere, Falcon-H1, Granite), and to which power."""
SOFTCAP = "final_logit_softcapping"
"""Attribute: c of c tanh(logits / c) (Gemma 2)."""
NO_LIMIT = 1 << 30


@dataclass(frozen=True, kw_only=True)
class ModelFolder:
    """A causal language model on disk, or the text side of a vision-language one."""

    folder: Path
    document: dict[str, Any]
    """config.json as it stands."""
    config: Any
    """The same as transformers reads it."""
    trust_remote_code: bool = False

    @property
    def path(self) -> Path:
        """The place of config.json, for messages."""
        return self.folder / "config.json"

    @property
    def text(self) -> Any:
        """The config of the language model: a part of the whole where that sees pictures too."""
        return self.config.get_text_config()

    @cached_property
    def architecture(self) -> str:
        """The name of the class that config.json gives, or that transformers has for its model type."""
        named = self.config.architectures
        return named[0] if named else self.model_class.__name__

    @cached_property
    def text_architecture(self) -> str:
        """The class that serves the language model alone; empty where it is a part of a whole and has none."""
        from transformers import AutoModelForCausalLM

        if self.text is self.config:
            return self.architecture
        classes = AutoModelForCausalLM._model_mapping
        return classes[type(self.text)].__name__ if type(self.text) in classes else ""

    @property
    def vocab_size(self) -> int:
        """Rows of the head."""
        return int(self.text.vocab_size)

    @property
    def context_length(self) -> int:
        """The longest sequence, NO_LIMIT if the config names none."""
        lengths = [value for name in CONTEXT_NAMES if isinstance(value := getattr(self.text, name, None), int)]
        rope = getattr(self.text, "rope_parameters", None) or {}
        kinds = [part for part in rope.values() if isinstance(part, dict)] or [rope]
        stretch = max(float(kind.get("factor") or 1.0) if kind.get("rope_type") in STRETCHED else 1.0 for kind in kinds)
        return int(min(lengths) * stretch) if lengths else NO_LIMIT

    @property
    def dtype(self) -> str:
        """The type of the weights, as config.json says; float32 if it does not."""
        dtype = getattr(self.text, "dtype", None) or getattr(self.config, "dtype", None) or "float32"
        return str(dtype).removeprefix("torch.")

    @property
    def quantization(self) -> str:
        """Name of the scheme in which the weights are stored, or none."""
        scheme = self.attribute("quantization_config")
        return str(dict(scheme).get("quant_method") or "unnamed") if scheme else "none"

    @property
    def logit_scale(self) -> float:
        """What the model multiplies the head's output with."""
        return math.prod(float(self.attribute(name) or 1.0) ** power for name, power in FACTORS.items())

    @property
    def logit_softcap(self) -> float | None:
        """The bound of the model's logits, if it has one."""
        return self.attribute(SOFTCAP)

    def attribute(self, name: str) -> Any:
        """An attribute of the language model's config, or else of the whole model's; None if neither has it."""
        value = getattr(self.text, name, None)
        return getattr(self.config, name, None) if value is None else value

    @cached_property
    def model_class(self) -> Any:
        """transformers' class; raises ConfigError for what is no causal language model or no model at all."""
        return type(self.without_weights())

    @cached_property
    def ties_head(self) -> bool:
        """Whether head and embeddings are one; of a kind that transformers does not know, as its config says."""
        if not self.is_known:
            return bool(getattr(self.text, "tie_word_embeddings", False))
        model = self.without_weights()
        return model.get_output_embeddings().weight is model.get_input_embeddings().weight

    @property
    def is_known(self) -> bool:
        """Whether transformers has a class for it, or the folder brings one along."""
        return _is_known(self.document) or "auto_map" in self.document

    def without_weights(self) -> Any:
        """The model on torch's meta device: parameters have shapes and take no memory."""
        import torch

        with _one_line(self.path, "transformers cannot make this model"), torch.device("meta"):
            return self._auto_class().from_config(self.config, trust_remote_code=self.trust_remote_code)

    def require_weights(self) -> list[str]:
        """Raise ConfigError unless the folder's files hold the whole model; reads headers alone.

        Returns the names of tensors that are no part of it and left out. Of a kind that transformers does not know,
        only that the files are whole.
        """
        if not self.is_known:
            read_headers(weight_files(self.folder))
            return []
        options = {"trust_remote_code": self.trust_remote_code}
        return require_all_tensors(self.model_class, self.config, self.folder, **options)

    def load(self, dtype: str, **options: Any) -> Any:
        """The model with its weights, in evaluation mode; raises ConfigError if any of it would be random."""
        with _one_line(self.folder, "transformers cannot load this model"):
            model, found = self.model_class.from_pretrained(
                str(self.folder),
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
                **options,
            )
        judge(self.folder, model, found)
        return model

    def fresh(self, seed: int) -> Any:
        """The model with random weights that the seed decides, float32."""
        from transformers import set_seed

        set_seed(seed)
        self.config.dtype = self.text.dtype = "float32"
        with _one_line(self.path, "transformers cannot make this model"):
            return self._auto_class().from_config(self.config, trust_remote_code=self.trust_remote_code)

    def _auto_class(self) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

        if getattr(self.config, "is_encoder_decoder", False):
            raise ConfigError(f"{self.path}: an encoder with a decoder; expected the config of a causal LM.")
        kind, auto_map = type(self.config), getattr(self.config, "auto_map", None) or {}
        sees_pictures = kind in AutoModelForImageTextToText._model_mapping
        named = (self.config.architectures or [""])[0]
        if sees_pictures and not named.endswith("ForCausalLM"):
            return AutoModelForImageTextToText
        if kind in AutoModelForCausalLM._model_mapping or "AutoModelForCausalLM" in auto_map:
            return AutoModelForCausalLM
        if sees_pictures:
            return AutoModelForImageTextToText
        raise ConfigError(
            f"{self.path}: transformers has no causal LM of model type {self.config.model_type!r}; expected the config "
            "of a causal LM."
        )


def read_model(
    path: Path, *, trust_remote_code: bool = False, read_config: Callable[[Path, bool], Any] | None = None
) -> ModelFolder:
    """The model whose config.json is `path` or lies in it; raises ConfigError in one line, whatever is wrong with it.

    `read_config(folder, trust_remote_code)` reads what transformers does not know.
    """
    config_path = path if path.suffix == ".json" else path / "config.json"
    if not config_path.is_file():
        raise ConfigError(f"{path}: no model there; expected a folder with config.json.")
    try:
        document = json.loads(config_path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as exc:
        raise ConfigError(f"{config_path}: not JSON: {exc}") from exc
    if not isinstance(document, dict):
        raise ConfigError(f"{config_path}: found a {type(document).__name__}; expected the config of a causal LM.")
    if document.get("auto_map") and not trust_remote_code and not _is_known(document):
        raise ConfigError(
            f"{config_path.parent}: model type {document.get('model_type')!r} comes with code of its own; give "
            "--trust-remote-code to run it, if you trust who made it."
        )
    if read_config is None or "auto_map" in document or _is_known(document):
        read_config = _as_transformers_reads_it
    with _one_line(config_path, "not the config of a causal LM"):
        config = read_config(config_path.parent, trust_remote_code)
        vocab_size = getattr(config.get_text_config(), "vocab_size", None)
    if not isinstance(vocab_size, int) or vocab_size < 1:
        raise ConfigError(f"{config_path}: vocab_size is {vocab_size!r}; expected the config of a causal LM.")
    return ModelFolder(folder=config_path.parent, document=document, config=config, trust_remote_code=trust_remote_code)


def text_body(model: Any) -> Any:
    """The module that makes hidden states of token ids: after the final norm, before the head."""
    if type(model.config) is not type(model.config.get_text_config()):
        return model.get_decoder()
    if model.base_model is not model:
        return model.base_model
    heads = (model.get_output_embeddings(),)  # some classes have the wrong name for their body (Llama 4)
    (body,) = (child for child in model.children() if child not in heads and hasattr(child, "base_model"))
    return body


def _as_transformers_reads_it(folder: Path, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=trust_remote_code)


def _is_known(document: dict[str, Any]) -> bool:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return document.get("model_type") in CONFIG_MAPPING


class _one_line:
    """Whatever a library raises inside is a ConfigError of one line that begins with a path."""

    def __init__(self, where: Path, what: str) -> None:
        self._where, self._what = where, what
        self._warnings = warnings.catch_warnings()

    def __enter__(self) -> None:
        self._warnings.__enter__()
        warnings.simplefilter("ignore")  # of classes that are about to change: not the user's to mend

    def __exit__(self, kind: Any, exc: BaseException | None, traceback: Any) -> None:
        self._warnings.__exit__(kind, exc, traceback)
        if isinstance(exc, Exception) and not isinstance(exc, ConfigError):
            reason = " ".join(str(exc).split())[:400] or type(exc).__name__
            raise ConfigError(f"{self._where}: {self._what}: {reason}") from exc
