"""The transformers engine: any causal LM that transformers loads, one process, no serving machinery.

Slower than vLLM on large models; serves architectures that vLLM does not know.
"""

import contextlib
from collections.abc import Hashable, Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from pipeline.cpu import has_products
from pipeline.errors import ConfigError, EngineError
from pipeline.hidden import ALLOWED, first_forward, mean_difference, perturbed_embeddings
from pipeline.models import text_body
from pipeline.sketch import FittedSketch
from pipeline.targets import SparseTargets
from stages.cache_logits.draws import reduce_rows
from stages.cache_logits.engine import Request, reduction_of, unpack
from stages.cache_logits.settings import TeacherConfig
from stages.cache_logits.sketching import RowSketch
from stages.cache_logits.teacher import Teacher
from stages.cache_logits.wide_products import WideProducts

PROBE_TOKENS = 8
"""Tokens on which the float32 head is compared with the model's own logits at start."""
PADDING_PROBE = 48
"""Tokens of the longer of two texts that are run alone and padded, at start."""
SORTED_BATCHES = 16
"""Batches' worth of requests that are sorted by length, so that batches hold little padding."""


class TransformersEngine:
    """A teacher in transformers, on the first CUDA device if there is one."""

    def __init__(
        self, teacher: Teacher, config: TeacherConfig, longest_request: int, sketch: FittedSketch | None = None
    ) -> None:
        if config.tensor_parallel > 1 or config.pipeline_parallel > 1 or teacher.quantization != "none":
            raise ConfigError("--engine transformers runs on one device, unquantised; take --engine vllm for more.")
        self._reduction = reduction_of(config)
        self._batch_tokens, self._row_chunk = config.batch_tokens, config.rows_at_once(teacher.vocab_size)
        self._vocab_size = teacher.vocab_size
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # The other implementations leave out the cap on attention scores, and say nothing.
        capped = teacher.model.attribute("attn_logit_softcapping")
        model = teacher.model.load(teacher.dtype, attn_implementation="eager" if capped else None)
        self._model = model.to(self._device).eval()
        widens = self._device.type == "cpu" and not has_products(teacher.dtype)
        self._products = WideProducts if widens else contextlib.nullcontext
        head = model.get_output_embeddings()
        weight_VH = head.weight[: self._vocab_size]
        # A CPU cannot write float32 from factors in bfloat16: there the head is widened once.
        self._head_VH = weight_VH.float() if self._device.type == "cpu" else weight_VH
        self._bias_V = head.bias[: self._vocab_size].float() if getattr(head, "bias", None) is not None else None
        self._sketch = None if sketch is None else RowSketch.of(sketch, self._device)
        self._scale, self._soft_cap = teacher.model.logit_scale, teacher.model.logit_softcap
        with first_forward(type(model).__name__):
            self._check_padding()
            self._check_head()

    @torch.inference_mode()
    def score(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, SparseTargets]]:
        """Targets, longest request first within a window of requests."""
        for batch in _batches(requests, self._batch_tokens):
            hidden_BSH = self._hidden([torch.tensor(request.token_ids, dtype=torch.long) for request in batch])
            starts = np.arange(len(batch)) * hidden_BSH.shape[1]
            rows, labels, uniforms = (
                torch.from_numpy(np.concatenate(parts)).to(self._device)
                for parts in (
                    [start + request.positions for start, request in zip(starts, batch)],
                    [request.labels.astype(np.int64) for request in batch],
                    [request.uniforms for request in batch],
                )
            )
            targets = self._reduce(hidden_BSH.flatten(0, 1)[rows], labels, uniforms)
            ends = np.cumsum([len(request.positions) for request in batch]).tolist()
            for request, start, end in zip(batch, [0, *ends], ends):
                yield request.key, targets[start:end]

    @torch.inference_mode()
    def hidden_states(self, requests: Iterable[Request]) -> Iterator[tuple[Hashable, np.ndarray]]:
        """float32 [N, H] of every request."""
        for batch in _batches(requests, self._batch_tokens):
            hidden_BSH = self._hidden([torch.tensor(request.token_ids, dtype=torch.long) for request in batch])
            for request, hidden_SH in zip(batch, hidden_BSH):
                yield request.key, hidden_SH[torch.from_numpy(request.positions).long()].float().cpu().numpy()

    def head(self) -> tuple[np.ndarray, np.ndarray]:
        """float32 [V, H] and [V]: weight and bias, scaled as the logits are."""
        weight_VH = self._head_VH.detach().float().cpu().numpy() * np.float32(self._scale)
        bias_V = np.zeros(len(weight_VH), np.float32) if self._bias_V is None else self._bias_V.detach().cpu().numpy()
        return weight_VH, bias_V * np.float32(self._scale)

    def close(self) -> None:
        """Let go of the model."""
        del self._model, self._head_VH

    def _hidden(self, token_ids: list[Tensor]) -> Tensor:
        """[batch, longest, H] after the final norm. Padding lies to the right, where no causal model looks."""
        padded = torch.nn.utils.rnn.pad_sequence(token_ids, batch_first=True).to(self._device)
        with self._products():
            return text_body(self._model)(input_ids=padded, use_cache=False).last_hidden_state

    def _logits(self, hidden_NH: Tensor) -> Tensor:
        """float32 [N, V], as if the hidden states and the head were float32, where products of narrower ones are exact.

        On a device narrow factors are multiplied as they are and summed in float32, so that no wide head is needed.
        """
        if hidden_NH.dtype == self._head_VH.dtype != torch.float32:
            logits_NV = torch.mm(hidden_NH, self._head_VH.t(), out_dtype=torch.float32)
            if self._bias_V is not None:
                logits_NV += self._bias_V
        else:
            logits_NV = torch.nn.functional.linear(hidden_NH.float(), self._head_VH.float(), self._bias_V)
        if self._scale != 1.0:
            logits_NV *= self._scale
        if self._soft_cap is not None:
            logits_NV = torch.tanh(logits_NV / self._soft_cap) * self._soft_cap
        return logits_NV

    def _reduce(self, hidden_NH: Tensor, labels_N: Tensor, uniforms_N: Tensor) -> SparseTargets:
        rows = []
        for hidden, labels, uniforms in zip(
            *(part.split(self._row_chunk) for part in (hidden_NH, labels_N, uniforms_N))
        ):
            logits = self._logits(hidden)
            rows.append(reduce_rows(self._reduction, logits, labels, uniforms, sketch=self._sketch, hidden_NH=hidden))
        return unpack(torch.cat(rows).cpu().numpy(), self._reduction)

    @torch.inference_mode()
    def _check_head(self) -> None:
        """Refuse a model whose logits are more than its head's weight times its last hidden state."""
        ids = torch.arange(PROBE_TOKENS, device=self._device)[None] % self._vocab_size
        with self._products():
            own = self._model(input_ids=ids, use_cache=False).logits[0, :, : self._vocab_size].float()
        difference = (self._logits(self._hidden([ids[0].cpu()])[0]) - own).abs().max().item()
        allowed = 1e-4 if self._model.dtype == torch.float32 else 2e-2
        if difference > allowed * max(1.0, own.abs().max().item()):
            raise EngineError(
                f"{type(self._model).__name__}: its logits differ by {difference:.2g} from its head times its last "
                "hidden state (a scaling that this engine does not know); take --engine vllm."
            )

    @torch.inference_mode()
    def _check_padding(self) -> None:
        """Refuse a model whose hidden states change with what follows: padding, or text as in one that looks ahead."""
        whole = torch.randint(self._vocab_size, (PADDING_PROBE,), generator=torch.Generator().manual_seed(0))
        short = whole[: PADDING_PROBE // 2]
        alone, short_alone = self._hidden([whole])[0], self._hidden([short])[0]
        with perturbed_embeddings(self._model):
            allowed = ALLOWED * mean_difference(self._hidden([whole])[0], alone)
        together, padded = self._hidden([whole, short])
        pairs = [(together, alone), (padded[: len(short)], short_alone), (short_alone, alone[: len(short)])]
        difference = max(mean_difference(*pair) for pair in pairs)
        if not difference <= allowed:
            raise EngineError(
                f"{type(self._model).__name__}: the hidden states of a text differ by {difference:.2g} when other text "
                f"or padding follows it, and arithmetic explains {allowed:.2g}; take another teacher."
            )


def _batches(requests: Iterable[Request], budget_tokens: int) -> Iterator[list[Request]]:
    """Batches whose padded size stays within the budget: requests of like length, out of SORTED_BATCHES' worth."""
    requests = iter(requests)
    while window := _window(requests, SORTED_BATCHES * budget_tokens):
        window.sort(key=lambda request: -len(request.token_ids))
        while window:
            size = max(1, budget_tokens // len(window[0].token_ids))
            yield window[:size]
            del window[:size]


def _window(requests: Iterator[Request], num_tokens: int) -> list[Request]:
    """The next requests, of at least `num_tokens` tokens in all unless there are no more."""
    window: list[Request] = []
    while num_tokens > 0 and (request := next(requests, None)) is not None:
        window.append(request)
        num_tokens -= len(request.token_ids)
    return window
