"""The weight files of a model folder: which of them are loaded, whether they are whole, and what they hold.

transformers fills what a checkpoint lacks with random numbers and leaves out what it does not know, and both
engines say so in a log at most. Here the names and shapes of all tensors, read from the files' headers, are held
against the model's before anything is loaded.
"""

import glob
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import xxhash

from pipeline.errors import ConfigError
from pipeline.files import canonical_json
from pipeline.library_logs import warnings_of

INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
"""Name the files of a checkpoint in several pieces."""
SINGLES = ("model.safetensors", "pytorch_model.bin")
PATTERNS = ("*.safetensors", "*.bin")
ADAPTER = "adapter_config.json"
GIT_LFS = b"version https://git-lfs"
OTHER_FORMATS = (".pth", ".pt", ".gguf", ".ckpt", ".h5", ".msgpack", ".npz", ".onnx")

SAMPLE_BYTES = 1 << 16
SAMPLES = 256
"""Blocks of SAMPLE_BYTES that are hashed of every weight file, its first and last among them."""
FREE = ("_name_or_path", "transformers_version", "use_cache")
"""Keys of config.json that can differ between copies of one model."""
SHOWN = 3
"""Tensors that a message names."""

PACKED = ((".qweight", ".weight"), (".weight_packed", ".weight"), (".weight_quantized", ".weight"), ("_blocks", ""))
"""How quantised checkpoints spell the name of a weight."""


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The files that are loaded, whole as far as their sizes tell; raises ConfigError, which says what is there."""
    if (folder / ADAPTER).is_file():
        raise ConfigError(
            f"{folder}: holds an adapter ({ADAPTER}), which one engine would merge in and another leave out; merge it "
            "into its model and save that, or move the adapter's files out of the folder."
        )
    index = next((folder / name for name in INDEXES if (folder / name).is_file()), None)
    single = next((folder / name for name in SINGLES if (folder / name).is_file()), None)
    files = _files_of(index) if index is not None else () if single is None else (single,)
    if not files:
        raise ConfigError(f"{folder}: no weights there; {_what_is_there(folder)}expected {' or '.join(SINGLES)}.")
    if index is not None and single is not None and single not in files and single.suffix == files[0].suffix:
        raise ConfigError(
            f"{folder}: holds {single.name}, and {index.name} which does not name it; move away what is out of date."
        )
    for path in files:
        _require_whole(path)
    return files


def common_pattern(files: Sequence[Path]) -> str | None:
    """A shell pattern that finds `files` and no others beside them; None if there is none."""
    names = [path.name for path in files]
    pattern = glob.escape(names[0])
    if len(names) > 1:
        start = os.path.commonprefix(names)  # noqa: RUF071 - of names, not paths
        pattern = f"{glob.escape(start)}*{files[0].suffix}"
    return pattern if {path.name for path in files[0].parent.glob(pattern)} == set(names) else None


def hash_config(document: dict[str, Any]) -> str:
    """Hash of a config.json without what can differ between copies of one model."""
    return xxhash.xxh3_128_hexdigest(canonical_json({key: value for key, value in document.items() if key not in FREE}))


def hash_weights(folder: Path) -> str:
    """Hash of every weight file's name, size and evenly spaced samples.

    Takes seconds for 135 GB, and a retrained or converted checkpoint differs everywhere. It tells
    models apart; it does not check the disk.
    """
    digest = xxhash.xxh3_128()
    for path in sorted({path for pattern in PATTERNS for path in folder.glob(pattern)}):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        last = max(size - SAMPLE_BYTES, 0)
        with path.open("rb") as file:
            for offset in sorted({last * index // (SAMPLES - 1) for index in range(SAMPLES)}):
                file.seek(offset)
                digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def require_all_tensors(model_class: Any, config: Any, folder: Path, *, trust_remote_code: bool = False) -> list[str]:
    """Raise ConfigError unless the files hold every tensor of the model, in its shape, and none that it leaves out.

    Reads headers alone. Returns the names of tensors that are no part of the language model, such as a value head.
    Of a quantised checkpoint, whose shapes are its own, only names are compared.
    """
    tensors = read_headers(weight_files(folder))
    quantised = getattr(config, "quantization_config", None) is not None
    if quantised:
        config = _unquantised(config)
        tensors = {_plain_name(name): tensor for name, tensor in tensors.items()}
    logged: list[str] = []
    try:
        with warnings_of("transformers.modeling_utils") as logged:
            model, found = model_class.from_pretrained(
                None,
                config=config,
                state_dict=tensors,
                device_map="meta",
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                trust_remote_code=trust_remote_code,
            )
    except Exception as exc:
        if quantised:  # tensors that belong together cannot be joined in their packed form
            return []
        raise ConfigError(
            f"{folder}: its tensors are not those of {model_class.__name__}: {_why(exc, logged)}"
        ) from exc
    if quantised:
        found |= {"unexpected_keys": set(), "mismatched_keys": set()}
    return judge(folder, model, found)


def judge(folder: Path, model: Any, found: dict[str, Any]) -> list[str]:
    """Raise ConfigError, naming the tensors, if loading left a part of `model` random or a part of the file out.

    `found` is what transformers calls loading info. Returns the names of what lies outside of the model's own parts.
    """
    problems = []
    if found["missing_keys"]:
        problems.append(f"{named(found['missing_keys'])} would start from random numbers: the files lack them")
    if found["mismatched_keys"]:
        shapes = [
            f"{name} is {list(ours)}, the model's {list(theirs)}" for name, ours, theirs in found["mismatched_keys"]
        ]
        problems.append(named(shapes) + ": another shape")
    parts = {name for name, _ in model.named_children()}
    inside = {name for name in found["unexpected_keys"] if name.split(".")[0] in parts}
    if inside:
        problems.append(f"{named(inside)} would be left out: the model has no such part")
    problems += found["error_msgs"]
    if problems:
        raise ConfigError(
            f"{folder}: its weights are not those of {type(model).__name__} as config.json describes it: "
            f"{'; '.join(problems)}."
        )
    return sorted(set(found["unexpected_keys"]) - inside)


def read_headers(files: Iterable[Path]) -> dict[str, Any]:
    """Every tensor in the files by name, with its shape and type but no contents; raises ConfigError."""
    import torch
    from safetensors import safe_open
    from transformers.modeling_utils import str_to_torch_dtype

    tensors: dict[str, Any] = {}
    for path in files:
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt") as file:
                    for name in file.keys():  # noqa: SIM118 - no mapping
                        part = file.get_slice(name)
                        dtype = str_to_torch_dtype.get(part.get_dtype(), torch.float32)
                        tensors[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
            else:
                found = torch.load(path, map_location="meta", weights_only=True)
                tensors |= {name: tensor for name, tensor in found.items() if torch.is_tensor(tensor)}
        except Exception as exc:  # whatever a damaged or foreign file makes the libraries raise
            raise ConfigError(f"{path}: not a whole weight file: {' '.join(str(exc).split())[:300]}") from exc
    return tensors


def named(names: Iterable[str] | Sequence[str]) -> str:
    """The first few of some names in alphabetical order, for a message."""
    names = sorted(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _why(exc: Exception, logged: list[str]) -> str:
    """The tensors that could not be converted, which only transformers' log names, or what the exception says."""
    rows = re.findall(r"^(\S+)\s+\|[^|\n]*CONVERSION", "\n".join(logged), re.MULTILINE)
    if rows:
        return f"{named(rows)} cannot be put together: a piece is missing or has another shape"
    return " ".join(str(exc).split())[:300]


def _files_of(index: Path) -> tuple[Path, ...]:
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as exc:
        raise ConfigError(f"{index}: not an index of weight files; expected `weight_map` with file names.") from exc
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ConfigError(f"{index}: names {name!r}; expected the name of a file beside it.")
    missing = sorted(name for name in names if not (index.parent / name).is_file())
    if missing:
        raise ConfigError(f"{index}: names {named(missing)}, not there; complete the download.")
    return tuple(index.parent / name for name in sorted(names))


def _require_whole(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(len(GIT_LFS))
    if start == GIT_LFS:
        raise ConfigError(f"{path}: a pointer of Git LFS, not the weights; fetch them with `git lfs pull`.")
    if not start:
        raise ConfigError(f"{path}: empty; complete the download.")


def _what_is_there(folder: Path) -> str:
    found = [path.name for pattern in PATTERNS for path in folder.glob(pattern)]
    found += [path.name for path in folder.iterdir() if path.suffix in OTHER_FORMATS] if folder.is_dir() else []
    return f"found {named(sorted(found))}, which transformers does not load; " if found else ""


def _unquantised(config: Any) -> Any:
    import copy

    config = copy.deepcopy(config)
    del config.quantization_config
    return config


def _plain_name(name: str) -> str:
    for packed, plain in PACKED:
        if name.endswith(packed):
            return name.removesuffix(packed) + plain
    return name
