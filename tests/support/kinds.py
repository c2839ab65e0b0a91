"""Small random models of kinds that differ in how they know the documents of a row, and in what their weights are."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 96,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 8,
}
SHARED_EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "n_shared_experts": 1}

APART: dict[str, dict[str, Any]] = {
    "llama": {},
    "gemma2": {"sliding_window": 5},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "qwen3_moe": EXPERTS,
    "deepseek_v3": MLA
    | SHARED_EXPERTS
    | {"n_group": 1, "topk_group": 1, "num_key_value_heads": 2, "first_k_dense_replace": 1},
}
"""Keep the documents of a row apart by their position ids."""

MIXED: dict[str, dict[str, Any]] = {
    "bloom": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0},
    "lfm2": {"layer_types": ["conv", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1, "state_size": 8, "chunk_size": 8},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 5},
    "llama4_text": {"num_local_experts": 4, "attention_chunk_size": 8, "intermediate_size_mlp": 48},
}
"""Do not: a bias by distance, positions that go on, a convolution, a state, a mask without positions, row chunks."""

UNUSED: dict[str, dict[str, Any]] = {
    "trocr": {
        "d_model": 32,
        "decoder_layers": 1,
        "decoder_attention_heads": 2,
        "decoder_ffn_dim": 48,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
}
"""Have parameters that their forward does not use: a cross-attention without an encoder."""

NAMES = {  # where a config calls the sizes otherwise
    "gpt2": {"hidden_size": "n_embd", "num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
    "bloom": {"num_hidden_layers": "n_layer", "num_attention_heads": "n_head"},
}


def kind_config(kind: str, vocab_size: int, **changes: Any) -> Any:
    """The config of a small model of a kind of APART or MIXED, or of another with what `changes` gives it."""
    known = AutoConfig.for_model(kind)
    names = NAMES.get(kind, {})
    sizes = {names.get(key, key): value for key, value in SIZES.items() if hasattr(known, names.get(key, key))}
    return AutoConfig.for_model(
        kind, **{"vocab_size": vocab_size} | sizes | (APART | MIXED | UNUSED).get(kind, {}) | changes
    )


def kind_model(kind: str, vocab_size: int, dtype: str = "float32", **changes: Any) -> Any:
    """A random model; in float64 its experts are computed the plain way, which knows that type."""
    torch.manual_seed(0)
    config = kind_config(kind, vocab_size, **changes)
    config.dtype = "float32"
    plain = {"experts_implementation": "eager"} if dtype == "float64" else {}
    return AutoModelForCausalLM.from_config(config, **plain).to(getattr(torch, dtype))


def kind_student(folder: Path, kind: str, vocab_size: int) -> Path:
    """The config.json, in `folder`, of a student that starts from random weights."""
    kind_config(kind, vocab_size).save_pretrained(folder)
    return folder / "config.json"
