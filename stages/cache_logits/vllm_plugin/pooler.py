"""The pooler that runs inside vLLM's workers: hidden states in, packed sparse targets out.

Only the rows that a request asks for are projected, in chunks, so that full logits never exceed
row_chunk x this rank's columns; which rows is copied to the device once a step. Under tensor
parallelism every rank reduces its own columns and only candidates and sums are gathered.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from vllm.distributed.communication_op import tensor_model_parallel_all_gather
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.pooler.abstract import Pooler
from vllm.v1.pool.metadata import PoolingMetadata

from pipeline.sketch import FittedSketch
from stages.cache_logits.draws import reduce_rows
from stages.cache_logits.engine import Request
from stages.cache_logits.reduction import Reduction
from stages.cache_logits.sketching import RowSketch
from stages.cache_logits.vllm_plugin import HEAD, HIDDEN, PROBE, ROWS, UNIT


class SparseTargetPooler(Pooler):
    """Reduces logits at the requested positions; int32 [rows, Reduction.width] a request."""

    def __init__(
        self,
        model: nn.Module,
        *,
        reduction: dict[str, Any],
        row_chunk: int,
        vocab_size: int,
        sketch: str | None = None,
    ) -> None:
        super().__init__()
        # A closure: as a submodule the model would be registered inside itself.
        self._model = lambda: model
        self._reduction = Reduction(**reduction | {"temperatures": tuple(reduction["temperatures"])})
        self._row_chunk = row_chunk
        self._vocab_size = vocab_size
        self._sketch = None if sketch is None else self._read_sketch(Path(sketch))
        self._row_sketch: RowSketch | None = None
        self._ranks = get_tensor_model_parallel_world_size()
        # Models differ in the head's name and bias, in scales and in norms: only their compute_logits knows.
        self._processors = [part for part in model.modules() if isinstance(part, LogitsProcessor)]
        self._keep_local()

    def get_supported_tasks(self) -> set[str]:
        """The one task under which vLLM returns a row for every token."""
        return {"token_classify"}

    def forward(self, hidden_states: Tensor, pooling_metadata: PoolingMetadata) -> list[Tensor | None]:
        """The packed targets of every request whose last token is in this step; None for the others."""
        cursor = pooling_metadata.get_pooling_cursor()
        scheduled = cursor.num_scheduled_tokens_cpu.tolist()
        ends, prompt_lengths = cursor.seq_lens_cpu.tolist(), cursor.prompt_lens_cpu.tolist()
        wanted, before = [], []
        offset = 0
        for params, count, end in zip(pooling_metadata.pooling_params, scheduled, ends):
            wanted_3W, given = _wanted_rows(params.extra_kwargs, offset, end - count, end)
            wanted.append(wanted_3W)
            before.append(given)
            offset += count
        wanted_3W = _to_device(np.concatenate(wanted, axis=1), hidden_states.device)
        sizes = [part.shape[1] for part in wanted]
        results: list[Tensor | None] = []
        for params, state, piece, rows_W, came_before, count, end, length in zip(
            pooling_metadata.pooling_params,
            pooling_metadata.pooling_states,
            self._reduce(hidden_states, wanted_3W).split(sizes),
            wanted_3W[0].split(sizes),
            before,
            scheduled,
            ends,
            prompt_lengths,
        ):
            extra = params.extra_kwargs or {}
            if PROBE in extra:
                piece = torch.cat([piece, *self._own_logits(hidden_states[rows_W])], dim=1)
            if HIDDEN in extra:
                piece = torch.cat([piece, hidden_states[rows_W].float().view(torch.int32)], dim=1)
            if HEAD in extra:
                units = _unit_vectors(hidden_states, int(extra[HEAD]) + came_before, len(rows_W))
                piece = torch.cat([piece, *self._own_logits(units)], dim=1)
            held = state.hidden_states_cache
            if end == count:
                held.clear()  # the first chunk, or the first again after a preemption
            if sum(map(len, held)) != came_before:
                found = sum(map(len, held))
                raise RuntimeError(f"chunked prompt: {found} rows are held where {came_before} came before")
            held.append(piece.clone())  # a view would be sent with the whole step that it is a part of
            if end < length:
                results.append(None)
                continue
            results.append(torch.cat(held))
            state.clean()
        return results

    def _reduce(self, hidden_states: Tensor, wanted_3W: Tensor) -> Tensor:
        """int32 [W, Reduction.width]: the packed targets of what `_wanted_rows` has gathered of a step."""
        packed = [torch.empty((0, self._reduction.width), dtype=torch.int32, device=hidden_states.device)]
        for rows_N, labels_N, uniforms_N in zip(*(column.split(self._row_chunk) for column in wanted_3W)):
            if len(rows_N):
                hidden_NH = hidden_states[rows_N]
                packed.append(self._reduce_chunk(hidden_NH, labels_N.long(), uniforms_N.view(torch.float32)))
        return torch.cat(packed)

    def _reduce_chunk(self, hidden_NH: Tensor, labels_N: Tensor, uniforms_N: Tensor) -> Tensor:
        logits_NV = self._model().compute_logits(hidden_NH)
        first_id = self._columns.org_vocab_start_index
        real = max(0, min(self._columns.num_org_elements, self._vocab_size - first_id))
        return reduce_rows(
            self._reduction,
            logits_NV[:, :real].float(),
            labels_N,
            uniforms_N,
            ranks=self._ranks,
            rank=get_tensor_model_parallel_rank(),
            first_id=first_id,
            gather=_gather,
            sketch=self._own_sketch(logits_NV.device, first_id, real),
            hidden_NH=hidden_NH,
        )

    def _read_sketch(self, path: Path) -> FittedSketch:
        return FittedSketch.from_bytes(path.read_bytes(), path, self._vocab_size, self._reduction.tail_rank)

    def _own_sketch(self, device: torch.device, first_id: int, num_columns: int) -> RowSketch | None:
        """The sketch of this rank's columns, which are known once a head has run."""
        if self._sketch is not None and self._row_sketch is None:
            self._row_sketch = RowSketch.of(self._sketch, device, slice(first_id, first_id + num_columns))
        return self._row_sketch

    def _own_logits(self, hidden_NH: Tensor) -> list[Tensor]:
        """The bits of float32 [N, vocab_size] logits by vLLM's own road alone, on ranks to which that gives them."""
        with self._as_vllm_has_them():
            logits_NV = self._model().compute_logits(hidden_NH)
        return [] if logits_NV is None else [logits_NV[:, : self._vocab_size].float().contiguous().view(torch.int32)]

    @contextmanager
    def _as_vllm_has_them(self) -> Iterator[None]:
        for processor in self._processors:
            del processor._get_logits
        try:
            yield
        finally:
            self._keep_local()

    def _keep_local(self) -> None:
        for processor in self._processors:
            processor._get_logits = functools.partial(self._local_logits, processor)

    def _local_logits(
        self,
        processor: LogitsProcessor,
        hidden_states: Tensor,
        lm_head: nn.Module,
        embedding_bias: Tensor | None = None,
        skip_gather: bool = False,
    ) -> Tensor:
        """Stands in for `LogitsProcessor._get_logits`: this rank's columns, not gathered; notes which they are."""
        self._columns = lm_head.shard_indices
        return processor._apply_head(lm_head, hidden_states, embedding_bias)


def pack_rows(request: Request) -> dict[str, bytes]:
    """What a request wants, in the form in which it travels to the workers."""
    columns = [
        request.positions.astype("<i4"),
        request.labels.astype("<i4"),
        request.uniforms.astype("<f4").view("<i4"),
    ]
    return {ROWS: np.stack(columns).tobytes()}


def _gather(columns: Tensor) -> Tensor:
    """Every rank's columns, side by side, bit by bit: vLLM's all-gather on a CPU takes no integers."""
    if columns.dtype != torch.int32:
        return tensor_model_parallel_all_gather(columns)
    return tensor_model_parallel_all_gather(columns.view(torch.float32)).view(torch.int32)


def _unit_vectors(hidden_states: Tensor, first: int, count: int) -> Tensor:
    """[count, H] like hidden states: the rows from `first` on of no vector and then UNIT times the unit vectors."""
    numbers = torch.arange(first, first + count, device=hidden_states.device)[:, None]
    columns = torch.arange(1, hidden_states.shape[1] + 1, device=hidden_states.device)
    return (numbers == columns).to(hidden_states.dtype) * UNIT


def _to_device(columns_3W: np.ndarray, device: torch.device) -> Tensor:
    """The columns on the device, by one copy for which nobody waits: from pageable memory it would, for the forward."""
    staged_3W = torch.empty(columns_3W.shape, dtype=torch.int32, pin_memory=device.type != "cpu")
    return staged_3W.copy_(torch.from_numpy(columns_3W)).to(device, non_blocking=True)


def _wanted_rows(extra: dict[str, bytes] | None, offset: int, start: int, end: int) -> tuple[np.ndarray, int]:
    """What a request wants of a step in which it has the positions `start` to `end`.

    int32 [3, W], rows of the flattened step, their labels and the bits of their uniforms, and how many rows earlier
    steps gave.
    """
    if extra is None or ROWS not in extra:  # vLLM's own profiling run: every position
        rows_W = np.arange(offset, offset + end - start, dtype=np.int32)
        return np.stack([rows_W, np.zeros_like(rows_W), np.zeros_like(rows_W)]), start
    columns_3P = np.frombuffer(extra[ROWS], "<i4").reshape(3, -1)
    first, last = np.searchsorted(columns_3P[0], (start, end))
    wanted_3W = columns_3P[:, first:last].astype(np.int32)
    wanted_3W[0] += offset - start
    return wanted_3W, int(first)
