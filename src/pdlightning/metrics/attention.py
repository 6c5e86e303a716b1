"""Comparison of attention patterns, computed from what the query and key sites put out (spec R3 `attention`)."""

from __future__ import annotations

from torch import Tensor

from pdlightning.functional.attention import pattern_kl_pair, rotate, split_heads
from pdlightning.functional.losses import Pair
from pdlightning.metrics.comparisons import Comparison
from pdlightning.metrics.evaluation import matching_sites
from pdlightning.modules.component_model import ComponentModel, Run
from pdlightning.observation import Observation


class AttentionPatternKL(Comparison):
    """KL(clean pattern || masked pattern) summed over keys, per batch element, head and query: `attention`.

    A pattern is softmax(q k^T * scale). q and k are the outputs of sites, so that what lies between them and the scores
    must be said here; a norm of q or k, or padded positions, cannot be. Values and counts of the layers add up.

    Args:
        n_heads: heads of queries.
        rope_base: of RoPE in Llama's layout, which turns the pair (x_i, x_{i + d/2}); None where there is no RoPE.
        q, k: fnmatch patterns of the sites of queries and of keys, one of each in every layer.
        qkv: in place of q and k, a pattern of the sites whose output is queries, keys and values, one after the other
            (GPT-2's `c_attn`).
        n_kv_heads: heads of keys, each for n_heads / n_kv_heads heads of queries (GQA); by default n_heads.
        causal: whether a query sees no later key.
        scale: of the scores; by default 1 / sqrt(d_head).
    """

    needs_outputs = True

    def __init__(
        self,
        *,
        n_heads: int,
        rope_base: float | None,
        q: str | None = None,
        k: str | None = None,
        qkv: str | None = None,
        n_kv_heads: int | None = None,
        causal: bool = True,
        scale: float | None = None,
    ):
        if (q is None, k is None, qkv is None) not in ((False, False, True), (True, True, False)):
            raise ValueError(f"AttentionPatternKL: expected q and k, or qkv alone, got q={q!r}, k={k!r}, qkv={qkv!r}.")
        self.n_heads, self.n_kv_heads = n_heads, n_heads if n_kv_heads is None else n_kv_heads
        if self.n_kv_heads < 1 or n_heads < 1 or n_heads % self.n_kv_heads:
            raise ValueError(
                f"AttentionPatternKL: n_heads must be a multiple of n_kv_heads, got {n_heads} and {self.n_kv_heads}."
            )
        self.patterns = [pattern for pattern in (q, k, qkv) if pattern is not None]
        self.rope_base, self.causal, self.scale = rope_base, causal, scale
        self.layers: list[tuple[str, ...]] = []

    def prepare(self, model: ComponentModel) -> None:
        """Find the sites of every layer: (q, k), or (qkv,)."""
        found = [matching_sites(model, pattern) for pattern in self.patterns]
        self.layers = paired(*found) if len(found) == 2 else [(site,) for site in found[0]]
        for sites in self.layers:
            self.head_width({site: model.components[site].d_out for site in sites})

    def head_width(self, widths: dict[str, int]) -> int:
        """d_head of a layer, from the widths of what its sites put out."""
        parts = [self.n_heads, self.n_kv_heads] if len(widths) == 2 else [self.n_heads + 2 * self.n_kv_heads]
        d_head = next(iter(widths.values())) // parts[0]
        if [d_head * n for n in parts] != list(widths.values()) or (self.rope_base is not None and d_head % 2):
            raise ValueError(
                f"AttentionPatternKL: with n_heads={self.n_heads} and n_kv_heads={self.n_kv_heads} the outputs of"
                f" {', '.join(f'{site!r} ({width} wide)' for site, width in widths.items())} do not split into heads of"
                f" one {'width' if self.rope_base is None else 'even width'}."
            )
        return d_head

    def check(self, observation: Observation) -> None:
        self(observation.clean, observation.clean)

    def __call__(self, clean: Run, masked: Run) -> Pair:
        if not self.layers:
            raise RuntimeError("AttentionPatternKL has not seen the model: call prepare(model) first.")
        pairs = [self.of_layer(clean.outputs, masked.outputs, sites) for sites in self.layers]
        return sum(total for total, _ in pairs), sum(count for _, count in pairs)  # type: ignore[return-value]

    def of_layer(self, clean: dict[str, Tensor], masked: dict[str, Tensor], sites: tuple[str, ...]) -> Pair:
        if masked[sites[0]].ndim < 3:
            raise ValueError(
                f"AttentionPatternKL needs sequences: expected an output [*leading, batch, sequence, width] of site"
                f" {sites[0]!r}, got {tuple(masked[sites[0]].shape)}."
            )
        clean_heads, heads = (self.by_head([run[site] for site in sites]) for run in (clean, masked))
        scale = heads[0].shape[-1] ** -0.5 if self.scale is None else self.scale
        return pattern_kl_pair(clean_heads, heads, scale=scale, causal=self.causal)

    def by_head(self, outputs: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Queries and keys of one layer, `[*leading, head, sequence, d_head]`, with their positions in them."""
        if len(outputs) == 1:
            d_head = outputs[0].shape[-1] // (self.n_heads + 2 * self.n_kv_heads)
            q, k, _ = outputs[0].split([d_head * n for n in (self.n_heads, self.n_kv_heads, self.n_kv_heads)], dim=-1)
        else:
            q, k = outputs
        q, k = split_heads(q, self.n_heads), split_heads(k, self.n_kv_heads)
        return (q, k) if self.rope_base is None else (rotate(q, base=self.rope_base), rotate(k, base=self.rope_base))


def paired(q_sites: list[str], k_sites: list[str]) -> list[tuple[str, str]]:
    """The sites of queries and keys, layer by layer: the paths of a pair differ in one part (q_proj, k_proj)."""
    pairs = list(zip(q_sites, k_sites, strict=False))
    parts = [list(zip(q.split("."), k.split("."), strict=False)) for q, k in pairs]
    belong = [
        q.count(".") == k.count(".") and sum(a != b for a, b in part) == 1
        for (q, k), part in zip(pairs, parts, strict=True)
    ]
    if len(q_sites) != len(k_sites) or not all(belong):
        raise ValueError(
            "AttentionPatternKL: every layer needs its site of queries and its site of keys, whose paths differ in one"
            f" part. q matches {', '.join(q_sites)}; k matches {', '.join(k_sites)}."
        )
    return pairs
