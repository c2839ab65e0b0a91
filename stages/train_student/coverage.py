"""What of a student is trained, and what is not, in a line."""

import re
from collections import Counter
from typing import Any

from stages.train_student.compat.peft_hooks import adapted_weights

SHOWN = 6
"""Kinds of frozen weights that are named."""


def coverage_notes(model: Any) -> list[str]:
    """Which share of the weights is adapted, and which kinds stay as they are; nothing if all are trained."""
    adapted = adapted_weights(model)
    own = {name: parameter for name, parameter in model.named_parameters() if "lora_" not in name}
    frozen = {name: p.numel() for name, p in own.items() if not p.requires_grad and id(p) not in adapted}
    if not frozen:
        return []
    total = sum(parameter.numel() for parameter in own.values())
    kinds: Counter[str] = Counter()
    for name, size in frozen.items():
        kinds[kind_of(name)] += size
    named = ", ".join(f"{kind} {size / total:.2%}" for kind, size in kinds.most_common(SHOWN))
    more = f" and {len(kinds) - SHOWN} kinds more" if len(kinds) > SHOWN else ""
    what = "adapters change" if adapted else "training changes"
    return [f"{what} {1 - sum(frozen.values()) / total:.2%} of the weights; as they are stay: {named}{more}"]


def kind_of(name: str) -> str:
    """The name of a parameter without the wrappers of an adapter and the numbers of layers: what all layers share."""
    plain = re.sub(r"\b(base_model\.model\.|base_layer\.)", "", name)
    return re.sub(r"\.\d+(?=\.)", ".*", plain)
