"""Every number of the demo: sizes of the two models, amounts of data, learning rates.

Found by a search on two CPU cores; change a value and the teacher is trained again. About 320 seconds of CPU time in
all, of which the teacher takes 140 and each student 75, on cores that are held to AVX2.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class DemoRecipe:
    """What the demo trains, and for how long."""

    vocab_size: int = 2048
    """Ids of the byte-level BPE tokenizer, special tokens included."""
    sequence_length: int = 256
    """Tokens in a sequence, for the teacher and the students."""
    seed: int = 0
    """Seed of the teacher's weights and of the order of its data."""

    teacher_hidden_size: int = 192
    """Width of the teacher."""
    teacher_intermediate_size: int = 512
    """Width of the teacher's feed-forward layers."""
    teacher_layers: int = 4
    """Layers of the teacher."""
    teacher_head_size: int = 64
    """Width of one attention head of the teacher; vLLM's CPU attention takes 32 and 64 among others."""
    teacher_tokens: int = 600_000
    """Tokens that the teacher is trained on."""
    teacher_batch_size: int = 8
    """Sequences in a step of the teacher."""
    teacher_learning_rate: float = 3e-3
    """Peak learning rate of the teacher's AdamW (embeddings, head, norms)."""
    teacher_matrix_learning_rate: float = 0.02
    """Peak learning rate of the teacher's Muon (matrices inside the layers)."""

    student_hidden_size: int = 128
    """Width of a student."""
    student_intermediate_size: int = 352
    """Width of a student's feed-forward layers."""
    student_layers: int = 2
    """Layers of a student."""
    student_head_size: int = 32
    """Width of one attention head of a student."""

    student_text_bytes: int = 320_000
    """Bytes of training text that the students see (about 100,000 tokens); the teacher draws on all of it."""
    held_out_text_bytes: int = 200_000
    """Bytes of held-out text on which the students are compared (about 69,000 tokens)."""
    student_steps: int = 400
    """Optimizer steps of a student."""
    student_batch_size: int = 8
    """Sequences in a step of a student."""
    student_learning_rate: float = 1e-3
    """Peak learning rate of a student; of those tried (1, 2 and 5e-3) the best for the one with hard labels."""
    alpha: float = 0.5
    """Weight of the distillation term in the distilled student's loss."""
    temperature: float = 2.0
    """Temperature T of the distillation term."""

    def to_dict(self) -> dict[str, Any]:
        """JSON values that name the recipe."""
        return dataclasses.asdict(self)


def student_config(recipe: DemoRecipe) -> dict[str, Any]:
    """The config.json of a student that starts from random weights."""
    return llama_config(
        recipe,
        hidden_size=recipe.student_hidden_size,
        intermediate_size=recipe.student_intermediate_size,
        layers=recipe.student_layers,
        head_size=recipe.student_head_size,
    )


def teacher_config(recipe: DemoRecipe) -> dict[str, Any]:
    """The config.json of the teacher."""
    return llama_config(
        recipe,
        hidden_size=recipe.teacher_hidden_size,
        intermediate_size=recipe.teacher_intermediate_size,
        layers=recipe.teacher_layers,
        head_size=recipe.teacher_head_size,
    )


def llama_config(
    recipe: DemoRecipe, *, hidden_size: int, intermediate_size: int, layers: int, head_size: int
) -> dict[str, Any]:
    """A Llama with an untied head, and the demo's tokenizer and sequence length."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": recipe.vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // head_size,
        "num_key_value_heads": hidden_size // head_size,
        "head_dim": head_size,
        "max_position_embeddings": 2 * recipe.sequence_length,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 1,
        "dtype": "float32",
    }
