"""Students for a real teacher: the teacher without a block of its layers, and a small Llama of random weights.

`pruned`: one block of neighbouring layers goes, the one across which the residual stream turns least on training text
(Gromov et al., arXiv 2403.17887; ShortGPT, arXiv 2403.03853, ranks single layers by the same idea; Minitron, arXiv
2407.14679, distils after it). The last layer stays in any case, as Gromov et al. found it must.
`random`: nothing is known at the start, so training moves it far.
"""

import json
import math
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from pipeline.corpus import Corpus
from pipeline.files import replacing
from pipeline.stores.sealed import write_json
from pipeline.tokenizer import load_tokenizer, save_tokenizer

CHOICE = "removed.json"
RANDOM_SIZES = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
}


def choose_block(distances: list[float]) -> int:
    """First layer of the block to take out: the shortest turn, of those that leave the last layer in its place."""
    allowed = distances[:-1]
    return min(range(len(allowed)), key=allowed.__getitem__)


def ensure_pruned(teacher: Path, corpus: Corpus, out: Path, num_removed: int) -> Path:
    """The teacher without `num_removed` layers, as a folder; removed.json says which, and all distances."""
    if (out / CHOICE).is_file():
        return out
    model = AutoModelForCausalLM.from_pretrained(teacher, dtype=torch.float32)
    distances = block_distances(_residual_streams(model, corpus), num_removed).tolist()
    first = choose_block(distances)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([*layers[:first], *layers[first + num_removed :]])
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.layer_types = None  # one entry a layer, which transformers makes anew
    with replacing(out) as partial:
        model.save_pretrained(partial)
        save_tokenizer(load_tokenizer(teacher), partial)
        write_json(partial / CHOICE, {"first": first, "number": num_removed, "distances": distances})
    return out


def ensure_random(teacher: Path, out: Path) -> Path:
    """The config.json of a small Llama of the teacher's vocabulary, with its tokenizer beside it."""
    if not (out / "config.json").is_file():
        config = json.loads((teacher / "config.json").read_text(encoding="utf-8"))
        kept = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id", "rope_parameters", "tie_word_embeddings")
        sizes = RANDOM_SIZES | {"max_position_embeddings": 2048}
        with replacing(out) as partial:
            LlamaConfig(**{name: config[name] for name in kept}, **sizes).save_pretrained(partial)
            save_tokenizer(load_tokenizer(teacher), partial)
    return out / "config.json"


def block_distances(hidden_LNH: Tensor, num_removed: int) -> Tensor:
    """[L - n]: mean angle between what enters layer l and what enters layer l + n, in units of pi.

    `hidden_LNH` has the residual stream before every layer and after the last, so one more than there are layers
    (Gromov et al., arXiv 2403.17887, equation 7).
    """
    last = len(hidden_LNH) - num_removed
    cosines = [
        torch.cosine_similarity(hidden_LNH[layer], hidden_LNH[layer + num_removed], dim=-1).clamp(-1, 1)
        for layer in range(last)
    ]
    return torch.stack([cosine.arccos().mean() / math.pi for cosine in cosines])


@torch.inference_mode()
def _residual_streams(model: torch.nn.Module, corpus: Corpus, num_tokens: int = 1024) -> Tensor:
    """[L + 1, N, H] before every layer and after the last one, without the final norm, document by document."""
    streams: list[list[Tensor]] = [[] for _ in range(len(model.model.layers) + 1)]

    def before(layer: int):
        return lambda module, inputs: streams[layer].append(inputs[0][0])

    hooks = [layer.register_forward_pre_hook(before(index)) for index, layer in enumerate(model.model.layers)]
    hooks.append(model.model.norm.register_forward_pre_hook(before(len(model.model.layers))))
    seen = 0
    for sequence in corpus.rows():
        for document in torch.tensor(sequence.token_ids).long().split(sequence.document_lengths.tolist()):
            model.model(document[None], use_cache=False)
            seen += len(document)
        if seen >= num_tokens:
            break
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(parts) for parts in streams])
