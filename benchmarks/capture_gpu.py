"""What the capture costs on a GPU: the reduction against reading the logits once, and its share of a 67B prefill step.

    python -m benchmarks.capture_gpu                       # one CUDA device, about 40 GB of its memory
    python -m benchmarks.capture_gpu --device cpu --rows 64 --vocab 4096 --hidden 256 --ffn 512 --heads 4 --kv-heads 1

reduction   The reduction of a step's logits alone (top k, logsumexp, tail and entropy at two temperatures), by rows
            a chunk, against the time of reading the logits once at the bandwidth that a copy reaches here.
step        A decoder of the true 67B shape with random weights, cut to `--layers`, in plain torch; the LM head at
            every position with float32 results; the reduction. A step of the whole model is its layers' time
            scaled by the number of layers, 95; both times are printed.

Times are medians. The true model in vLLM is `benchmarks/capture.py --shape 67b --dummy`.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from stages.cache_logits.draws import reduce_rows
from stages.cache_logits.reduction import Reduction

TEMPERATURES = (1.0, 2.0)


class Layer(nn.Module):
    """A Llama decoder layer with causal grouped-query attention; rotations are left out, they cost next to nothing."""

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__()
        head_size = options.hidden // options.heads
        self.heads, self.kv_heads = options.heads, options.kv_heads
        kv_size = options.kv_heads * head_size
        self.norms = nn.ModuleList(nn.RMSNorm(options.hidden) for _ in range(2))
        self.qkv = nn.Linear(options.hidden, options.hidden + 2 * kv_size, bias=False)
        self.out = nn.Linear(options.hidden, options.hidden, bias=False)
        self.gate_up = nn.Linear(options.hidden, 2 * options.ffn, bias=False)
        self.down = nn.Linear(options.ffn, options.hidden, bias=False)
        self.split = [options.hidden, kv_size, kv_size]

    def forward(self, x_BSH: Tensor) -> Tensor:
        """One layer over whole sequences."""
        query, key, value = self.qkv(self.norms[0](x_BSH)).split(self.split, dim=-1)
        query = query.unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = (part.unflatten(-1, (self.kv_heads, -1)).transpose(1, 2) for part in (key, value))
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        x_BSH = x_BSH + self.out(mixed.transpose(1, 2).flatten(2))
        gate, up = self.gate_up(self.norms[1](x_BSH)).chunk(2, dim=-1)
        return x_BSH + self.down(nn.functional.silu(gate) * up)


def median_seconds(run: Callable[[], object], device: torch.device, rounds: int) -> float:
    """Median time of a call after two that warm up."""
    seconds = []
    for index in range(rounds + 2):
        _synchronise(device)
        start = time.perf_counter()
        run()
        _synchronise(device)
        if index >= 2:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def reduction_alone(options: argparse.Namespace, device: torch.device) -> None:
    """Print the reduction's time against one reading of the logits."""
    reduction = Reduction(options.top_k, TEMPERATURES)
    labels, uniforms = torch.zeros(options.rows, dtype=torch.long, device=device), torch.zeros(options.rows)
    print(f"\nreduction of [{options.rows}, {options.vocab}], k={options.top_k}, T={TEMPERATURES}")
    for dtype in (torch.bfloat16, torch.float32):
        logits = torch.randn(options.rows, options.vocab, device=device, dtype=dtype) * 3
        copy = torch.empty_like(logits)
        copying = median_seconds(lambda copy=copy, logits=logits: copy.copy_(logits), device, options.rounds)
        bytes_a_second = 2 * logits.nbytes / copying
        reading = logits.nbytes / bytes_a_second
        del copy
        for chunk in options.row_chunks:

            def run(logits: Tensor = logits, chunk: int = chunk) -> None:
                for part in zip(logits.split(chunk), labels.split(chunk), uniforms.split(chunk)):
                    reduce_rows(reduction, part[0].float(), *part[1:])

            memory = _peak_bytes(run, device)
            seconds = median_seconds(run, device, options.rounds)
            print(
                f"  {dtype!s:<15} {chunk:>6} rows a chunk: {seconds * 1e3:8.2f} ms; reading once {reading * 1e3:.2f} "
                f"ms at {bytes_a_second / 1e12:.2f} TB/s; {reading / seconds:.0%} of that limit; "
                f"peak {memory} over inputs"
            )


@torch.inference_mode()
def share_of_step(options: argparse.Namespace, device: torch.device) -> None:
    """Print what the head and the reduction add to a prefill step."""
    dtype = torch.bfloat16
    with torch.device(device):
        layers = [Layer(options).to(dtype) for _ in range(options.layers)]
        head_VH = torch.randn(options.vocab, options.hidden, dtype=dtype) / options.hidden**0.5
    hidden_BSH = torch.randn(options.rows // options.length, options.length, options.hidden, device=device, dtype=dtype)
    hidden_NH = hidden_BSH.flatten(0, 1)
    labels, uniforms = torch.zeros(options.rows, dtype=torch.long, device=device), torch.zeros(options.rows)
    reduction, chunk = Reduction(options.top_k, TEMPERATURES), options.row_chunks[0]

    def body() -> None:
        x_BSH = hidden_BSH
        for layer in layers:
            x_BSH = layer(x_BSH)

    def head(reduce: bool) -> None:
        for part in zip(hidden_NH.split(chunk), labels.split(chunk), uniforms.split(chunk)):
            logits = _float32_product(part[0], head_VH)
            if reduce:
                reduce_rows(reduction, logits, *part[1:])

    layer_seconds = median_seconds(body, device, options.rounds) / options.layers
    head_seconds = median_seconds(lambda: head(False), device, options.rounds)
    both_seconds = median_seconds(lambda: head(True), device, options.rounds)
    whole = layer_seconds * options.model_layers
    flops = 2 * options.rows * sum(weight.numel() for weight in layers[0].parameters() if weight.ndim == 2)
    print(f"\nprefill step of {options.rows} tokens in sequences of {options.length}, {options.layers} layers measured")
    print(
        f"  a layer        {layer_seconds * 1e3:9.2f} ms ({flops / layer_seconds / 1e12:.0f} TFLOP/s in its products)"
    )
    print(f"  {options.model_layers} layers      {whole * 1e3:9.2f} ms, scaled")
    print(f"  LM head        {head_seconds * 1e3:9.2f} ms, {head_seconds / whole:.2%} of the layers")
    print(f"  and reduction  {both_seconds * 1e3:9.2f} ms, {both_seconds / whole:.2%} of the layers")


def _float32_product(hidden_NH: Tensor, head_VH: Tensor) -> Tensor:
    """float32 results of a product of bfloat16 matrices, as vLLM's head makes them on CUDA."""
    if hidden_NH.device.type == "cuda":
        return torch.mm(hidden_NH, head_VH.T, out_dtype=torch.float32)
    return hidden_NH.float() @ head_VH.float().T


def _peak_bytes(run: Callable[[], object], device: torch.device) -> str:
    if device.type != "cuda":
        return "not measured"
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    return f"{(torch.cuda.max_memory_allocated() - before) / 2**20:,.0f} MiB"


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--rows", type=int, default=8192, help="Tokens of a step.")
    parser.add_argument("--length", type=int, default=4096, help="Tokens of a sequence.")
    parser.add_argument("--vocab", type=int, default=102_400)
    parser.add_argument("--top-k", type=int, default=64)
    parser.add_argument("--row-chunks", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--ffn", type=int, default=22_016)
    parser.add_argument("--heads", type=int, default=64)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--layers", type=int, default=12, help="Layers that are measured.")
    parser.add_argument("--model-layers", type=int, default=95, help="Layers of the whole model.")
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    options.length = min(options.length, options.rows)
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.exit(0, "no CUDA device here; nothing was measured.\n")
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine()
    print(f"{name}; Python {platform.python_version()}, torch {torch.__version__}")
    reduction_alone(options, device)
    share_of_step(options, device)


if __name__ == "__main__":
    main()
