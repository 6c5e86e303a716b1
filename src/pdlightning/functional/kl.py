"""KL divergence (spec R3) and cross-entropy (spec E2) of logits, a chunk of positions at a time.

Of all that is computed only the gradient is as large as the logits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from pdlightning.functional.derivatives import refuse_second_derivative
from pdlightning.functional.losses import Pair

IGNORED = -100
"""The label of a position that has none."""
CPU_CHUNK = 2**18
"""Numbers in a chunk on the CPU: 1 MB of fp32, which the cache of a core holds."""
DEVICE_CHUNK = 2**24
"""Elsewhere: 64 MB of fp32, long beside the start of a kernel."""


@contextmanager
def chunks_of_a_device() -> Iterator[None]:
    """On the CPU too: for tensors without numbers, where each chunk costs as much as the whole."""
    global CPU_CHUNK
    before, CPU_CHUNK = CPU_CHUNK, DEVICE_CHUNK
    try:
        yield
    finally:
        CPU_CHUNK = before


def row_chunks(rows: Tensor, width: int) -> list[slice]:
    """Slices of the first axis of `rows`, as many rows of `width` numbers as fill a chunk, at least one."""
    size = CPU_CHUNK if rows.device.type == "cpu" else DEVICE_CHUNK
    step = max(1, size // width)
    return [slice(start, start + step) for start in range(0, max(1, len(rows)), step)]


def sum_of_chunks(value: Callable[[slice], Float[Tensor, ""]], rows: Tensor, width: int) -> Float[Tensor, ""]:
    """The sum of `value` over the `row_chunks`."""
    chunks = row_chunks(rows, width)
    sums = rows.new_zeros(len(chunks), dtype=summing_dtype(rows))  # one block: small ones would scatter over the heap
    for n, chunk in enumerate(chunks):
        sums[n] = value(chunk)
    return sums.sum()


def summing_dtype(logits: Tensor) -> torch.dtype:
    """The dtype of sums over logits: their own, or fp32 for shorter ones."""
    return torch.promote_types(logits.dtype, torch.float32)


def log_normalizer(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows 1"]:
    """log sum exp of each row, in at least fp32."""
    rows = logits.reshape(-1, logits.shape[-1])
    chunks = [slice(None)] if torch.compiler.is_compiling() else row_chunks(rows, rows.shape[1])
    found = [rows[i].to(summing_dtype(rows)).logsumexp(-1) for i in chunks]
    return torch.cat(found).reshape(*logits.shape[:-1], 1)


def log_probabilities(
    clean: Float[Tensor, "*rows vocab"], masked: Float[Tensor, "*rows vocab"], clean_normalizer: Tensor | None
) -> tuple[Float[Tensor, "*rows vocab"], Float[Tensor, "*rows vocab"]]:
    """Of both by the same operations, so that equal logits have equal ones to the last bit."""
    return (
        clean - (log_normalizer(clean) if clean_normalizer is None else clean_normalizer),
        masked - log_normalizer(masked),
    )


def kl_of_rows(
    clean: Float[Tensor, "*rows vocab"],
    masked: Float[Tensor, "*rows vocab"],
    clean_normalizer: Float[Tensor, "*rows 1"] | None = None,
) -> Float[Tensor, ""]:
    """sum over rows of KL(softmax(clean) || softmax(masked)), every intermediate as large as the rows."""
    log_p, log_q = log_probabilities(clean, masked, clean_normalizer)
    return (log_p.exp() * log_p.sub_(log_q)).sum()


def kl_gradient_of_rows(
    clean: Float[Tensor, "*rows vocab"],
    masked: Float[Tensor, "*rows vocab"],
    clean_normalizer: Float[Tensor, "*rows 1"] | None = None,
) -> Float[Tensor, "*rows vocab"]:
    """The gradient of `kl_of_rows` by the masked logits, softmax(masked) - softmax(clean)."""
    log_p, log_q = log_probabilities(clean, masked, clean_normalizer)
    return log_q.exp_().sub_(log_p.exp_())


class ChunkedKL(torch.autograd.Function):
    """`kl_of_rows`, whose backward computes the softmaxes again: two more exponentials, and nothing to keep."""

    @staticmethod
    def forward(ctx: Any, clean: Tensor, masked: Tensor, clean_normalizer: Tensor) -> Float[Tensor, ""]:
        ctx.save_for_backward(clean, masked, clean_normalizer)
        return sum_of_chunks(lambda i: kl_of_rows(clean[i], masked[i], clean_normalizer[i]), masked, masked.shape[1])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        refuse_second_derivative("KL")
        clean, masked, clean_normalizer = ctx.saved_tensors
        gradient = torch.empty_like(masked)
        for i in row_chunks(masked, masked.shape[1]):
            gradient[i] = kl_gradient_of_rows(clean[i], masked[i], clean_normalizer[i]).mul_(gradients[0])
        return None, gradient, None


class FusedKL(torch.autograd.Function):
    """`kl_of_rows` for a compiler, in the form that it makes the fewest passes of.

    The gradient is kept instead of the logits, so that no exponential is taken again.
    """

    @staticmethod
    def forward(ctx: Any, clean: Tensor, masked: Tensor, clean_normalizer: Tensor) -> Float[Tensor, ""]:
        below = masked.to(clean_normalizer.dtype)
        below = below - below.amax(-1, keepdim=True)
        log_p, log_q = clean - clean_normalizer, below - below.exp().sum(-1, keepdim=True).log()
        p = log_p.exp()
        ctx.save_for_backward((log_q.exp() - p).to(masked.dtype))
        return (p * (log_p - log_q)).sum(-1).sum()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * gradients[0]).to(gradient.dtype), None


def kl_pair(
    clean_logits: Float[Tensor, "*leading vocab"],
    masked_logits: Float[Tensor, "*leading vocab"],
    clean_normalizer: Float[Tensor, "*leading 1"] | None = None,
) -> Pair:
    """(sum over positions of KL(softmax(clean) || softmax(masked)), number of positions) (spec R3 `kl`).

    Summed in at least fp32. The clean logits are a constant: no gradient flows into them; their `log_normalizer` may be
    given by who has it.
    """
    if clean_logits.shape != masked_logits.shape or masked_logits.ndim == 0:
        raise ValueError(
            "KL: expected clean and masked logits of one shape [*leading, vocab],"
            f" got {tuple(clean_logits.shape)} and {tuple(masked_logits.shape)}."
        )
    vocab, clean_logits = masked_logits.shape[-1], clean_logits.detach()
    if clean_normalizer is None:
        clean_normalizer = log_normalizer(clean_logits)
    kl = FusedKL if torch.compiler.is_compiling() else ChunkedKL
    masked = masked_logits.reshape(-1, vocab)
    return kl.apply(clean_logits.reshape(-1, vocab), masked, clean_normalizer.reshape(-1, 1)), len(masked)


def kl_divergence(
    clean_logits: Float[Tensor, "*leading vocab"], masked_logits: Float[Tensor, "*leading vocab"]
) -> Float[Tensor, ""]:
    """KL(softmax(clean) || softmax(masked)), summed over the vocabulary, per position (spec R3).

    The clean logits are a constant: no gradient flows into them.
    """
    total, count = kl_pair(clean_logits, masked_logits)
    return total / count


def cross_entropy_pair(
    logits: Float[Tensor, "*leading vocab"], labels: Int[Tensor, "*leading"]
) -> tuple[Float[Tensor, ""], Int[Tensor, ""]]:
    """(sum of -log softmax(logits)[label] in at least fp32, number of labels other than -100) (spec E2)."""
    rows, flat, dtype = logits.reshape(-1, logits.shape[-1]), labels.reshape(-1), summing_dtype(logits)

    def value(i: slice) -> Tensor:
        return F.cross_entropy(rows[i].to(dtype), flat[i], ignore_index=IGNORED, reduction="sum")

    return sum_of_chunks(value, rows, rows.shape[1]), (flat != IGNORED).sum()
