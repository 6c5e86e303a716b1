"""The oracle: the whole algorithm of the contract (spec sections 2 to 7, E1, E3, E4) in plain float64 loops.

Nothing here is fast and nothing here is clever. One position at a time, one subcomponent at a time, one file, in the
order of the contract, and nothing imported from the package. Autograd of these loops is the reference gradient.

Layouts
    site      dict: kind ("linear" | "conv1d" | "embedding" | "identity"), W (d_out, d_in), b (d_out) or None,
              V (d_in, C), U (C, d_out). `make_site` turns a weight as its module stores it into this layout.
    target    dict: sites {name: site}, layers ["name", "relu", ...] in the order they run.
    batch     float [*leading, d_in], or token ids [*leading] when the first layer is an embedding.
    ci_fn     dict: kind, and `sites` {name: layers} for the per-site kinds or `layers` for global_mlp. `layers` is a
              list of (weight, bias), any depth: (out, in), (out) for shared_mlp and global_mlp; one network per
              subcomponent, (C, out, in), (C, out), for scalar_mlp (first in = last out = 1) and vector_mlp (last
              out = 1).
              For sequences: global_transformer and chunkwise_transformer have `transformers`, a list of dicts: reads
              and writes (site names), read (weight, bias), blocks, head (weight, bias). reverse_residual has `stages`,
              from the last group to the first: sites, read, block, head. A block is a dict: attention (None, or a dict
              of direction, n_heads, rope_base and q, k, v, out (weight, bias)) and mlp (None, or layers).
    per site  dicts {name: tensor}: ci, masks, sources [*leading, C]; delta masks, delta sources, routes [*leading];
              no delta is {}, and routes None routes every masked site.
              A source axis of size n serves position i with its row i mod n, so size 1 is shared by all positions.
    loss      a pair (sum, count) of 0-d tensor and int; the value is sum / count (R4).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import permutations, product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

Site = dict[str, Any]
Target = dict[str, Any]
CiFn = dict[str, Any]
PerSite = dict[str, Tensor]
Config = dict[str, Any]
Pair = tuple[Tensor, int]
Position = tuple[int, ...]


# ---- plain helpers ---------------------------------------------------------------------------------------------------


def positions(leading: Sequence[int]) -> list[Position]:
    """Every index of the leading axes, last axis fastest."""
    return list(product(*(range(n) for n in leading)))


def leading_axes(batch: Tensor) -> tuple[int, ...]:
    """The leading axes of a batch: all axes of token ids, all but the last of vectors."""
    return tuple(batch.shape[:-1]) if batch.is_floating_point() else tuple(batch.shape)


def assemble(rows: list[Tensor], leading: Sequence[int]) -> Tensor:
    """One tensor per position, in the order of `positions`, to `[*leading, ...]`."""
    return torch.stack(rows).reshape(*leading, *rows[0].shape)


def add(values: Iterable[Tensor]) -> Tensor:
    return torch.stack(list(values)).sum()


def add_pairs(pairs: Iterable[Pair]) -> Pair:
    """R4: sums add and counts add."""
    pairs = list(pairs)
    return add(s for s, _ in pairs), sum(n for _, n in pairs)


def times(matrix: Float[Tensor, "out in"], x: Tensor) -> Float[Tensor, " out"]:
    """matrix @ x one row at a time; a token id x picks its column."""
    if not x.is_floating_point():
        return matrix[:, int(x)]
    return torch.stack([torch.dot(matrix[o], x) for o in range(matrix.shape[0])])


def at(tensor: Tensor, position: Position) -> Tensor:
    """The entry of a position; an axis of size n is reused modulo n."""
    return tensor[tuple(i % n for i, n in zip(position, tensor.shape, strict=False))]


# ---- D2: randomness by key -------------------------------------------------------------------------------------------

M1, M2, GOLDEN, WORD = 0x7FEB352D, 0x846CA68B, 0x9E3779B9, 0xFFFFFFFF


def mix(x: int) -> int:
    x ^= x >> 16
    x = x * M1 & WORD
    x ^= x >> 15
    x = x * M2 & WORD
    return x ^ x >> 16


def name_words(seed: int, *names: str) -> tuple[int, int]:
    digest = hashlib.blake2b("/".join([str(seed), *names]).encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def uniform_number(seed: int, step: int, names: Sequence[str], sample: int, inner: Position, column: int) -> float:
    """D2: one number of U[0, 1) as a pure function of its key."""
    t0, t1 = name_words(seed, "rows")
    a = mix(sample ^ mix(step ^ t0))
    b = mix((mix((sample + GOLDEN) & WORD) + mix((step + t1) & WORD)) & WORD)
    for i in inner:
        a = mix((a + i * GOLDEN) & WORD)
        b = mix(b ^ i)
    k0, k1 = name_words(seed, *names)
    h = ((a ^ mix((mix(column ^ k0) + k1) & WORD)) * M1 + b) & WORD
    h ^= h >> 15
    h = h * M2 & WORD
    return (h >> 8) / 2**24


@dataclass(frozen=True)
class Draws:
    """The keyed numbers of a batch at a step: `samples` are its global indices, `inner` its further leading axes."""

    seed: int
    step: int
    samples: tuple[int, ...]
    inner: tuple[int, ...] = ()

    @property
    def leading(self) -> tuple[int, ...]:
        return (len(self.samples), *self.inner)

    @property
    def shared(self) -> Draws:
        """One row for all positions: sample 0 at inner position 0."""
        return Draws(self.seed, self.step, (0,), (1,) * len(self.inner))

    def uniform(self, size: int, *names: str) -> Float[Tensor, "*leading size"]:
        numbers = [
            uniform_number(self.seed, self.step, names, self.samples[b], tuple(inner), c)
            for b, *inner in positions(self.leading)
            for c in range(size)
        ]
        return torch.tensor(numbers, dtype=torch.float64).reshape(*self.leading, size)


# ---- section 2: components -------------------------------------------------------------------------------------------


def make_site(kind: str, weight: Tensor | None, bias: Tensor | None, V: Tensor, U: Tensor) -> Site:
    """C1: a site from the weight as its module stores it (Conv1D and Embedding store (d_in, d_out))."""
    if kind == "identity":
        W = torch.eye(V.shape[0], dtype=torch.float64)
    elif weight is None or kind not in ("linear", "conv1d", "embedding"):
        raise ValueError(f"a site is linear, conv1d, embedding (with a weight) or identity, got {kind!r}, {weight}")
    else:
        W = (weight if kind == "linear" else weight.T).detach().double()
    b = None if bias is None else bias.detach().double()
    return {"kind": kind, "W": W, "b": b, "V": V.double(), "U": U.double()}


def weight_delta(site: Site) -> Float[Tensor, "d_out d_in"]:
    """Section 1: D = W - (V U)^T, one rank-one matrix at a time."""
    delta = site["W"]
    for c in range(site["U"].shape[0]):
        delta = delta - torch.outer(site["U"][c], site["V"][:, c])
    return delta


def component_activations(site: Site, x: Tensor) -> Float[Tensor, " C"]:
    """x V of one position; the row V[x] of a token."""
    return times(site["V"].T, x)


def add_bias(site: Site, y: Tensor) -> Tensor:
    """C2: the bias is neither decomposed nor masked."""
    return y if site["b"] is None else y + site["b"]


def target_site(site: Site, x: Tensor) -> Float[Tensor, " d_out"]:
    """The target's own map at one position."""
    return add_bias(site, times(site["W"], x))


def component_forward(
    site: Site, x: Tensor, mask: Float[Tensor, " C"], delta_mask: Tensor | None = None, routed: bool = True
) -> Float[Tensor, " d_out"]:
    """C4: y = ((x V) * m) U + m_D (x D^T) + b at one position; the target's own map where it is not routed."""
    if not routed:
        return target_site(site, x)
    a = component_activations(site, x)
    y = torch.zeros(site["U"].shape[1], dtype=torch.float64)
    for c in range(a.shape[0]):
        y = y + a[c] * mask[c] * site["U"][c]
    if delta_mask is not None:
        y = y + delta_mask * times(weight_delta(site), x)
    return add_bias(site, y)


def component_forward_without_delta_matrix(
    site: Site, x: Tensor, mask: Float[Tensor, " C"], delta_mask: Tensor
) -> Float[Tensor, " d_out"]:
    """C4, second identity: y = ((m - m_D) * (x V)) U + m_D (x W^T) + b."""
    a = component_activations(site, x)
    y = delta_mask * times(site["W"], x)
    for c in range(a.shape[0]):
        y = y + (mask[c] - delta_mask) * a[c] * site["U"][c]
    return add_bias(site, y)


def forward_position(
    target: Target, x: Tensor, masks: PerSite, delta_masks: PerSite, routes: dict[str, bool]
) -> tuple[Tensor, PerSite, PerSite]:
    """C6 at one position: output, site inputs, site outputs. Sites without a mask run the target's weight."""
    inputs, outputs = {}, {}
    for layer in target["layers"]:
        if layer == "relu":
            x = torch.clamp(x, min=0)
            continue
        site, inputs[layer] = target["sites"][layer], x
        if layer in masks:
            x = component_forward(site, x, masks[layer], delta_masks.get(layer), routes[layer])
        else:
            x = target_site(site, x)
        outputs[layer] = x
    return x, inputs, outputs


def forward(
    target: Target, batch: Tensor, masks: PerSite, delta_masks: PerSite, routes: PerSite | None = None
) -> dict[str, Any]:
    """C4-C6 over a batch: {"output", "inputs": {site}, "outputs": {site}}."""
    leading, rows = leading_axes(batch), []
    for i in positions(leading):
        masks_here = {s: at(m, i) for s, m in masks.items()}
        deltas_here = {s: at(m, i) for s, m in delta_masks.items()}
        routes_here = {s: True if routes is None else bool(routes[s][i]) for s in masks}
        rows.append(forward_position(target, batch[i], masks_here, deltas_here, routes_here))
    return {
        "output": assemble([row[0] for row in rows], leading),
        "inputs": {s: assemble([row[1][s] for row in rows], leading) for s in rows[0][1]},
        "outputs": {s: assemble([row[2][s] for row in rows], leading) for s in rows[0][2]},
    }


def clean_forward(target: Target, batch: Tensor) -> dict[str, Any]:
    """Section 6, 3: the target itself, capturing site inputs and outputs."""
    return forward(target, batch, {}, {})


# ---- section 3: causal importance ------------------------------------------------------------------------------------

ALPHA = 0.01


class LowerLeakyHard(torch.autograd.Function):
    """I1 on a scalar: clamp(x, 0, 1); below, the backward passes alpha g where g pushes x upward (g < 0), else 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: float) -> Tensor:
        ctx.x, ctx.alpha = x.item(), alpha
        return torch.clamp(x, 0, 1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (g,) = grads
        if ctx.x > 1:
            return torch.zeros_like(g), None
        if ctx.x > 0:
            return g.clone(), None
        return (ctx.alpha * g if g.item() < 0 else torch.zeros_like(g)), None


def lower_leaky_hard(x: Tensor) -> Tensor:
    result = LowerLeakyHard.apply(x, ALPHA)
    assert isinstance(result, Tensor)
    return result


def hard(x: Tensor) -> Tensor:
    return torch.clamp(x, 0, 1)


def upper_leaky_hard(x: Tensor) -> Tensor:
    """I1: 1 + alpha (x - 1) above 1, else clamp(x, 0, 1), ordinary autograd."""
    return 1 + ALPHA * (x - 1) if x.item() > 1 else hard(x)


def leaky_hard(x: Tensor) -> Tensor:
    """Leaks on both sides: alpha x below 0, 1 + alpha (x - 1) above 1."""
    return ALPHA * x if x.item() < 0 else 1 + ALPHA * (x - 1) if x.item() > 1 else x


def swish_hard(x: Tensor) -> Tensor:
    """Read as the swish x sigmoid(x), clamped to [0, 1]."""
    return hard(x * torch.sigmoid(x))


SQUASHINGS: dict[str, Callable[[Tensor], Tensor]] = {
    "lower_leaky_hard": lower_leaky_hard,
    "upper_leaky_hard": upper_leaky_hard,
    "leaky_hard": leaky_hard,
    "hard": hard,
    "sigmoid": torch.sigmoid,
    "swish_hard": swish_hard,
}


def squash(kind: str, logits: Tensor) -> Tensor:
    """One of SQUASHINGS, one scalar at a time."""
    return torch.stack([SQUASHINGS[kind](x) for x in logits.reshape(-1)]).reshape(logits.shape)


def gelu(x: Tensor) -> Tensor:
    """The exact GELU, x Phi(x)."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def mlp(layers: list[tuple[Tensor, Tensor]], x: Float[Tensor, " in"]) -> Float[Tensor, " out"]:
    """I2: GELU between layers, none after the last."""
    for depth, (weight, bias) in enumerate(layers):
        x = times(weight, x) + bias
        if depth < len(layers) - 1:
            x = gelu(x)
    return x


def ci_input(site: Site, x: Tensor) -> Tensor:
    """I2: an embedding site enters as its component activations."""
    return component_activations(site, x) if site["kind"] == "embedding" else x


def site_logits(kind: str, layers: list[tuple[Tensor, Tensor]], site: Site, x: Tensor) -> Float[Tensor, " C"]:
    """I2, the per-site kinds, at one position."""
    if kind == "shared_mlp":
        return mlp(layers, ci_input(site, x))
    logits = []
    for c in range(site["U"].shape[0]):
        own = [(weight[c], bias[c]) for weight, bias in layers]
        if kind == "scalar_mlp":
            logits.append(mlp(own, component_activations(site, x)[c : c + 1])[0])
        elif kind == "vector_mlp":
            logits.append(mlp(own, ci_input(site, x))[0])
        else:
            raise ValueError(f"a ci_fn is scalar_mlp, vector_mlp, shared_mlp or global_mlp, got {kind!r}")
    return torch.stack(logits)


NORM_EPS = 1e-6
Rows = list[Tensor]  # one vector for each position of one sequence


def sequences(leading: Sequence[int]) -> list[list[Position]]:
    """I2: the positions in sequences along the last leading axis; a single leading axis has sequences of length 1."""
    if len(leading) < 2:
        return [[i] for i in positions(leading)]
    return [[(*i, t) for t in range(leading[-1])] for i in positions(leading[:-1])]


def rms_norm(x: Float[Tensor, " d"]) -> Float[Tensor, " d"]:
    """I2: x / sqrt(mean of squares + eps)."""
    return x / ((x * x).sum() / x.shape[0] + NORM_EPS).sqrt()


def rope(x: Float[Tensor, " d_head"], t: int, base: float) -> Float[Tensor, " d_head"]:
    """I2: the pair (x_i, x_{i + d/2}) as a complex number, times exp(i t base^(-2i/d))."""
    half = x.shape[0] // 2
    turned = []
    for i in range(half):
        angle = t * base ** (-2 * i / x.shape[0])
        c, s = math.cos(angle), math.sin(angle)
        turned.append((c * x[i] - s * x[i + half], s * x[i] + c * x[i + half]))
    return torch.stack([real for real, _ in turned] + [imaginary for _, imaginary in turned])


def attend(attention: Config, rows: Rows) -> Rows:
    """I2: multi-head self-attention with RoPE over one sequence, one query of one head at a time."""
    q, k, v = ([mlp([attention[part]], x) for x in rows] for part in ("q", "k", "v"))
    d_head = rows[0].shape[0] // attention["n_heads"]
    out = []
    for t in range(len(rows)):
        heads = []
        for h in range(attention["n_heads"]):
            own = slice(h * d_head, (h + 1) * d_head)
            seen = range(t + 1) if attention["direction"] == "causal" else range(len(rows))
            query = rope(q[t][own], t, attention["rope_base"])
            keys = [rope(k[s][own], s, attention["rope_base"]) for s in seen]
            weights = [(torch.dot(query, key) / math.sqrt(d_head)).exp() for key in keys]
            heads.append(sum(w * v[s][own] for w, s in zip(weights, seen, strict=True)) / add(weights))
        out.append(mlp([attention["out"]], torch.cat(heads)))
    return out


def run_block(block: Config, rows: Rows) -> Rows:
    """I2: pre-norm residual attention, then pre-norm residual MLP."""
    if block["attention"] is not None:
        mixed = attend(block["attention"], [rms_norm(x) for x in rows])
        rows = [x + y for x, y in zip(rows, mixed, strict=True)]
    if block["mlp"] is not None:
        rows = [x + mlp(block["mlp"], rms_norm(x)) for x in rows]
    return rows


def normed_inputs(names: list[str], inputs: dict[str, Rows]) -> Rows:
    """I2: each input normed on its own, concatenated."""
    return [torch.cat([rms_norm(inputs[s][t]) for s in names]) for t in range(len(inputs[names[0]]))]


def split_logits(names: list[str], sites: dict[str, Site], rows: Rows) -> dict[str, Rows]:
    logits: dict[str, Rows] = {s: [] for s in names}
    for row in rows:
        start = 0
        for s in names:
            logits[s].append(row[start : start + sites[s]["U"].shape[0]])
            start += sites[s]["U"].shape[0]
    return logits


def transformer_logits(ci_fn: CiFn, sites: dict[str, Site], inputs: dict[str, Rows]) -> dict[str, Rows]:
    """I2, global_transformer and chunkwise_transformer over one sequence."""
    logits: dict[str, Rows] = {}
    for transformer in ci_fn["transformers"]:
        rows = [mlp([transformer["read"]], x) for x in normed_inputs(transformer["reads"], inputs)]
        for block in transformer["blocks"]:
            rows = run_block(block, rows)
        logits |= split_logits(transformer["writes"], sites, [mlp([transformer["head"]], x) for x in rows])
    return logits


def reverse_residual_logits(ci_fn: CiFn, sites: dict[str, Site], inputs: dict[str, Rows]) -> dict[str, Rows]:
    """I2, reverse_residual over one sequence: r += read(inputs), r = block(r), logits = head(norm(r))."""
    logits: dict[str, Rows] = {}
    stream = [torch.zeros((), dtype=torch.float64)] * len(next(iter(inputs.values())))
    for stage in ci_fn["stages"]:
        read = [mlp([stage["read"]], x) for x in normed_inputs(stage["sites"], inputs)]
        stream = run_block(stage["block"], [r + x for r, x in zip(stream, read, strict=True)])
        logits |= split_logits(stage["sites"], sites, [mlp([stage["head"]], rms_norm(r)) for r in stream])
    return logits


SEQUENCE_KINDS = {
    "global_transformer": transformer_logits,
    "chunkwise_transformer": transformer_logits,
    "reverse_residual": reverse_residual_logits,
}


def sequence_ci_logits(ci_fn: CiFn, sites: dict[str, Site], inputs: PerSite) -> PerSite:
    """I2, the kinds that look along the sequence: one sequence at a time."""
    leading = leading_axes(next(iter(inputs.values())))
    rows: dict[str, Rows] = {s: [] for s in sites}
    for where in sequences(leading):
        here = {s: [ci_input(site, inputs[s][i]) for i in where] for s, site in sites.items()}
        for s, logits in SEQUENCE_KINDS[ci_fn["kind"]](ci_fn, sites, here).items():
            rows[s].extend(logits)
    return {s: assemble(rows[s], leading) for s in sites}


def ci_logits(ci_fn: CiFn, sites: dict[str, Site], inputs: PerSite) -> PerSite:
    """I1: logits [*leading, C] of every site from the clean site inputs. Nothing is detached."""
    if ci_fn["kind"] in SEQUENCE_KINDS:
        return sequence_ci_logits(ci_fn, sites, inputs)
    leading = leading_axes(next(iter(inputs.values())))
    rows: dict[str, list[Tensor]] = {s: [] for s in sites}
    for i in positions(leading):
        if ci_fn["kind"] == "global_mlp":
            whole = mlp(ci_fn["layers"], torch.cat([ci_input(site, inputs[s][i]) for s, site in sites.items()]))
            start = 0
            for s, site in sites.items():
                rows[s].append(whole[start : start + site["U"].shape[0]])
                start += site["U"].shape[0]
        else:
            for s, site in sites.items():
                rows[s].append(site_logits(ci_fn["kind"], ci_fn["sites"][s], site, inputs[s][i]))
    return {s: assemble(rows[s], leading) for s in sites}


def init_ci_fn(kind: str, sites: dict[str, Site], hidden: list[int], generator: torch.Generator) -> CiFn:
    """I2: weights N(0, sqrt(2 / fan_in)) before a GELU, N(0, sqrt(1 / fan_in)) in the last layer, biases 0."""

    def layers(copies: list[int], sizes: list[int]) -> list[tuple[Tensor, Tensor]]:
        pairs = []
        for depth, (n_in, n_out) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
            gain = 1.0 if depth == len(hidden) else 2.0
            normal = torch.randn(*copies, n_out, n_in, generator=generator, dtype=torch.float64)
            pairs.append((normal * math.sqrt(gain / n_in), torch.zeros(*copies, n_out, dtype=torch.float64)))
        return pairs

    C = {s: site["U"].shape[0] for s, site in sites.items()}
    widths = {s: C[s] if site["kind"] == "embedding" else site["V"].shape[0] for s, site in sites.items()}
    if kind == "global_mlp":
        return {"kind": kind, "layers": layers([], [sum(widths.values()), *hidden, sum(C.values())])}
    if kind == "shared_mlp":
        return {"kind": kind, "sites": {s: layers([], [widths[s], *hidden, C[s]]) for s in sites}}
    first = {s: 1 if kind == "scalar_mlp" else widths[s] for s in sites}
    return {"kind": kind, "sites": {s: layers([C[s]], [first[s], *hidden, 1]) for s in sites}}


def causal_importances(
    logits: PerSite, *, lower: str = "lower_leaky_hard", upper: str = "upper_leaky_hard", noise: PerSite | None = None
) -> tuple[PerSite, PerSite]:
    """I1: (lower, upper). With noise u (I3, sampling `binomial`) the lower branch sees 1.05 x - 0.05 u."""
    seen = logits if noise is None else {s: 1.05 * x - 0.05 * noise[s] for s, x in logits.items()}
    return {s: squash(lower, x) for s, x in seen.items()}, {s: squash(upper, x) for s, x in logits.items()}


def draw_ci_noise(draws: Draws, sites: dict[str, Site]) -> PerSite:
    """I3: u ~ U[0, 1], keyed ("ci", site, "noise")."""
    return {s: draws.uniform(site["U"].shape[0], "ci", s, "noise") for s, site in sites.items()}


# ---- section 4: sources, routing, comparison -------------------------------------------------------------------------


def masks_from_sources(ci: PerSite, sources: PerSite) -> PerSite:
    """Section 1: m = ci + (1 - ci) r."""
    masks = {}
    for s, g in ci.items():
        leading = g.shape[:-1]
        masks[s] = assemble([g[i] + (1 - g[i]) * at(sources[s], i) for i in positions(leading)], leading)
    return masks


def draw_sources(
    draws: Draws, sites: dict[str, Site], term: str, kind: str, *, value: float = 0.0, delta: bool = True
) -> tuple[PerSite, PerSite]:
    """R1: sources and delta sources; keys (term, site, "source" | "delta"). `binomial` thresholds the uniform source at
    1/2 and leaves the delta uniform; `constant` fills with `value` and has no delta."""
    if kind == "constant":
        shape = draws.leading
        return {
            s: torch.full((*shape, site["U"].shape[0]), value, dtype=torch.float64) for s, site in sites.items()
        }, {}
    sources = {s: draws.uniform(site["U"].shape[0], term, s, "source") for s, site in sites.items()}
    if kind == "binomial":
        sources = {s: (r >= 0.5).double() for s, r in sources.items()}
    elif kind != "uniform":
        raise ValueError(f"a drawn source is uniform, binomial or constant, got {kind!r}")
    return sources, {s: draws.uniform(1, term, s, "delta")[..., 0] for s in sites if delta}


def subset_routes(subset_size: int, scores: list[float]) -> list[bool]:
    """R2 at one position: the sites with the `subset_size` smallest scores, ties to the earlier site."""
    order = sorted(range(len(scores)), key=lambda i: (scores[i], i))
    return [i in order[:subset_size] for i in range(len(scores))]


def draw_routes(draws: Draws, sites: Iterable[str], term: str, kind: str, *, p: float = 0.0) -> PerSite:
    """R2: {site: bool [*leading]}; keys (term, "subset_size" | "subset" | "bernoulli"), columns in site order."""
    names, leading = list(sites), draws.leading
    n = len(names)
    if kind == "all":
        rows = [[True] * n for _ in positions(leading)]
    elif kind == "bernoulli":
        numbers = draws.uniform(n, term, "bernoulli")
        rows = [[float(u) < p for u in numbers[i]] for i in positions(leading)]
    elif kind == "uniform_subset":
        sizes, scores = draws.uniform(1, term, "subset_size"), draws.uniform(n, term, "subset")
        rows = [subset_routes(1 + math.floor(n * float(sizes[i][0])), scores[i].tolist()) for i in positions(leading)]
    else:
        raise ValueError(f"drawn routes are all, uniform_subset or bernoulli, got {kind!r}")
    return {s: torch.tensor([row[j] for row in rows]).reshape(leading) for j, s in enumerate(names)}


def mse(clean: Float[Tensor, "*leading d"], masked: Float[Tensor, "*leading d"]) -> Pair:
    """R3: squared error over the number of elements."""
    return add((masked[i] - clean[i]).pow(2).sum() for i in positions(clean.shape[:-1])), clean.numel()


def kl(clean: Float[Tensor, "*leading vocab"], masked: Float[Tensor, "*leading vocab"]) -> Pair:
    """R3: KL(softmax(clean) || softmax(masked)) over the number of positions."""
    terms = []
    for i in positions(clean.shape[:-1]):
        log_p, log_q = clean[i] - clean[i].logsumexp(0), masked[i] - masked[i].logsumexp(0)
        terms.append((log_p.exp() * (log_p - log_q)).sum())
    return add(terms), len(terms)


def attention_row(q: Tensor, keys: Rows, scale: float) -> Tensor:
    """The log probabilities of one query over the keys it sees."""
    scores = torch.stack([scale * torch.dot(q, key) for key in keys])
    return scores - scores.logsumexp(0)


def attention_kl(clean: tuple[Tensor, Tensor], masked: tuple[Tensor, Tensor], settings: Config) -> Pair:
    """R3 `attention` of one layer, over (batch, head, query): `clean` and `masked` are the outputs of its query and key
    sites, [*batch, sequence, width]. settings: n_heads, n_kv_heads, rope_base (or None), causal, scale."""
    n, n_kv, base = settings["n_heads"], settings["n_kv_heads"], settings["rope_base"]
    d_head = masked[0].shape[-1] // n

    def head(x: Tensor, h: int, t: int) -> Tensor:
        part = x[t][h * d_head : (h + 1) * d_head]
        return part if base is None else rope(part, t, base)

    terms = []
    for where in positions(masked[0].shape[:-2]):
        q_clean, k_clean, q, k = (x[where] for x in (clean[0].detach(), clean[1].detach(), *masked))
        for h, t in positions((n, q.shape[0])):
            seen, own = range(t + 1 if settings["causal"] else k.shape[0]), h // (n // n_kv)
            log_p = attention_row(head(q_clean, h, t), [head(k_clean, own, s) for s in seen], settings["scale"])
            log_q = attention_row(head(q, h, t), [head(k, own, s) for s in seen], settings["scale"])
            terms.append((log_p.exp() * (log_p - log_q)).sum())
    return add(terms), len(terms)


def compare(kind: str, clean: dict[str, Any], masked: dict[str, Any]) -> Pair:
    """R3: mse or kl of the outputs, or `hidden`: squared error of all site outputs over all their elements."""
    if kind == "hidden":
        return add_pairs(mse(clean["outputs"][s].detach(), masked["outputs"][s]) for s in clean["outputs"])
    return {"mse": mse, "kl": kl}[kind](clean["output"].detach(), masked["output"])


def reconstruction(
    target: Target,
    batch: Tensor,
    ci: PerSite,
    sources: PerSite,
    delta_sources: PerSite,
    routes: PerSite | str | None,
    comparison: str,
) -> Pair:
    """R1-R5: one reconstruction loss. `ci` is the lower one; `routes` per site, or "each_site": one forward per site
    with only that site replaced, pairs added. C5: the delta mask is the raw delta source."""
    clean, masks = clean_forward(target, batch), masks_from_sources(ci, sources)
    if not isinstance(routes, str):
        return compare(comparison, clean, forward(target, batch, masks, delta_sources, routes))
    if routes != "each_site":
        raise ValueError(f'routes are a dictionary per site or "each_site", got {routes!r}')
    pairs = []
    for s in masks:
        own_delta = {name: m for name, m in delta_sources.items() if name == s}
        pairs.append(compare(comparison, clean, forward(target, batch, {s: masks[s]}, own_delta)))
    return add_pairs(pairs)


# ---- section 5: losses -----------------------------------------------------------------------------------------------


def faithfulness(sites: dict[str, Site], form: str) -> Pair:
    """L2: `mean_squared` = sum ||D||^2 / sum numel(W), `relative` = mean over sites of ||D||^2 / ||W||^2."""
    squares = {s: weight_delta(site).pow(2).sum() for s, site in sites.items()}
    if form == "mean_squared":
        return add(squares.values()), sum(site["W"].numel() for site in sites.values())
    if form == "relative":
        return add(squares[s] / site["W"].pow(2).sum() for s, site in sites.items()), len(sites)
    raise ValueError(f"faithfulness is mean_squared or relative, got {form!r}")


def lp(u: Tensor, *, p: float, eps: float = 1e-12) -> Tensor:
    """L3: (u + eps)^p."""
    return (u + eps) ** p


def smooth_l0(u: Tensor, *, gamma: float, scaled: bool = False) -> Tensor:
    """L3: u^2 / (u^2 + gamma^2), with the optional factor 1 + gamma^2 that makes phi(1) = 1."""
    return u**2 / (u**2 + gamma**2) * (1 + gamma**2 if scaled else 1.0)


def importance_minimality(
    ci_upper: PerSite, phi: Callable[[Tensor], Tensor], *, beta: float = 0.0, reference_count: float | None = None
) -> Pair:
    """L3: sum_s sum_c f_c + beta f_c log2(1 + a f_c), f_c = mean of phi(upper), a = N positions or reference count."""
    total = []
    for u in ci_upper.values():
        where = positions(u.shape[:-1])
        a = len(where) if reference_count is None else reference_count
        for c in range(u.shape[-1]):
            f = add(phi(u[i][c]) for i in where) / len(where)
            total.append(f + beta * f * torch.log2(1 + a * f))
    return add(total), 1


def value(pair: Pair) -> Tensor:
    """R4: the value is taken at the very end."""
    return pair[0] / pair[1]


def pgd_init(
    draws: Draws, sites: dict[str, Site], term: str, *, init: str, scope: str, delta: bool = True
) -> tuple[PerSite, PerSite]:
    """L5: `random` takes the numbers of the uniform source; scope `shared` has leading axes of size 1."""
    rows = {"per_position": draws, "shared": draws.shared}[scope]
    sources, deltas = draw_sources(rows, sites, term, "uniform", delta=delta)
    if init == "random":
        return sources, deltas
    fill = {"ones": torch.ones_like, "zeros": torch.zeros_like}[init]
    return {s: fill(r) for s, r in sources.items()}, {s: fill(r) for s, r in deltas.items()}


Objective = Callable[[PerSite, PerSite], Pair]
Move = Callable[[list[Tensor], list[Tensor]], list[Tensor]]


def ascend(objective: Objective, sources: PerSite, deltas: PerSite, move: Move) -> tuple[PerSite, PerSite]:
    """One ascent of all sources and delta sources on the objective's value; a never routed site has gradient zero."""

    def named(tensors: list[Tensor]) -> tuple[PerSite, PerSite]:
        n = len(sources)
        return dict(zip(sources, tensors[:n], strict=True)), dict(zip(deltas, tensors[n:], strict=True))

    leaves = [r.detach().clone().requires_grad_() for r in [*sources.values(), *deltas.values()]]
    loss = value(objective(*named(leaves)))
    return named(move(leaves, list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))))


def pgd(
    objective: Objective, sources: PerSite, deltas: PerSite, *, n_steps: int, step_size: float
) -> tuple[PerSite, PerSite]:
    """L5: n_steps of r += step_size sign(grad), clamped to [0, 1] each time."""
    move = Adversary(optimizer="sign", lr=step_size)
    for _ in range(n_steps):
        sources, deltas = ascend(objective, sources, deltas, move)
    return sources, deltas


@dataclass
class Adversary:
    """L5, L6: the moves of sources. For persistent ones keep one per term, and pass it as `move` of `ascend` once per
    ascent: the warmups with their own routes, then the term itself. Adam's eps stands outside the root, and its count
    is that of all ascents. `clamped` False is the sigmoid parameterisation: sources are logits, squashed by the
    objective."""

    optimizer: str
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    clamped: bool = True
    count: int = 0
    moments: list[tuple[Tensor, Tensor]] | None = None

    def __call__(self, leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
        self.count += 1
        b1, b2 = self.betas
        old = self.moments or [(torch.zeros_like(g), torch.zeros_like(g)) for g in grads]
        pairs = zip(old, grads, strict=True)
        self.moments = [(b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2) for (m, v), g in pairs]
        moved = []
        for r, g, (m, v) in zip(leaves, grads, self.moments, strict=True):
            adam = m / (1 - b1**self.count) / ((v / (1 - b2**self.count)).sqrt() + self.eps)
            ascent = {"sign": torch.sign(g), "sgd": g, "adam": adam}[self.optimizer]
            new = r.detach() + self.lr * ascent
            moved.append(torch.clamp(new, 0, 1) if self.clamped else new)
        return moved


@dataclass
class Persistent:
    """L6: what the adversary of one term keeps across steps. `sources` (n, T, C) and `deltas` (n, T) per site, with
    size 1 for what is shared; in a pool (particles, B, T, C) and (particles, B, T), and each (particle, sample) has an
    `Adversary` of its own: moments and count. `pending` is the trained forward, waiting for its ascent."""

    sources: PerSite
    deltas: PerSite
    move: Move
    own_moves: dict[tuple[int, int], Adversary]
    pending: tuple[list[Tensor], Tensor] | None = None
    particles: list[int] | None = None


def normal_numbers(draws: Draws, size: int, *names: str) -> Float[Tensor, "*leading size"]:
    """L6: N(0, 1) by Box and Muller from the keys (names, "radius") and (names, "angle")."""
    u, v = draws.uniform(size, *names, "radius"), draws.uniform(size, *names, "angle")
    return torch.sqrt(-2 * torch.log(1 - u)) * torch.cos(2 * math.pi * v)


def persistent_start(draws: Draws, sites: dict[str, Site], name: str, term: Config) -> tuple[PerSite, PerSite]:
    """L6: keys (term, site, "source" | "delta", "start") at step 0, with the particle's number after them in a pool."""
    batch, *inner = draws.leading
    rows = {"repeat": term["n_sources"], "per_sample_per_position": batch, "pool": batch}.get(term["scope"], 1)
    samples = draws.samples if term["scope"] in ("per_sample_per_position", "pool") else tuple(range(rows))
    inner = [1] * len(inner) if term["scope"] == "single" else inner
    at_start = Draws(draws.seed, 0, samples, tuple(inner))

    def numbers(size: int, *key: str) -> Tensor:
        if term["parameterisation"] == "sigmoid":
            return normal_numbers(at_start, size, *key)
        fill = {"ones": torch.ones, "zeros": torch.zeros}.get(term["init"])
        return at_start.uniform(size, *key) if fill is None else fill(*at_start.leading, size, dtype=torch.float64)

    def held(size: int, *key: str) -> Tensor:
        if term["scope"] != "pool":
            return numbers(size, *key)
        return torch.stack([numbers(size, *key, str(k)) for k in range(term["n_particles"])])

    sources = {s: held(site["U"].shape[0], name, s, "source", "start") for s, site in sites.items()}
    return sources, {s: held(1, name, s, "delta", "start")[..., 0] for s in sites if term["delta"]}


def persistent_state(draws: Draws, sites: dict[str, Site], name: str, term: Config) -> Persistent:
    def fresh() -> Adversary:
        return Adversary(
            term["optimizer"], 0.0, betas=term["betas"], eps=term["eps"], clamped=term["parameterisation"] == "clamp"
        )

    sources, deltas = persistent_start(draws, sites, name, term)
    particles = term["n_particles"] if term["scope"] == "pool" else 0
    own = {(k, b): fresh() for k in range(particles) for b in range(draws.leading[0])}
    return Persistent(sources, deltas, fresh(), own)


def in_use(state: Persistent) -> tuple[PerSite, PerSite]:
    """What the samples of this step meet: everything, or from a pool the particle that each of them has drawn."""
    if state.particles is None:
        return state.sources, state.deltas
    pick = lambda pool: torch.stack([pool[k, b] for b, k in enumerate(state.particles or [])])  # noqa: E731
    return {s: pick(r) for s, r in state.sources.items()}, {s: pick(r) for s, r in state.deltas.items()}


def persistent_ascent(state: Persistent, leaves: list[Tensor], grads: list[Tensor], lr: float) -> None:
    """L6: one ascent, kept. In a pool only the particles in use move, each with its own moments and count."""
    names = [(state.sources, s) for s in state.sources] + [(state.deltas, s) for s in state.deltas]
    if state.particles is None:
        assert isinstance(state.move, Adversary)
        state.move.lr = lr
        for (where, s), moved in zip(names, state.move(leaves, grads), strict=True):
            where[s] = moved
        return
    for b, k in enumerate(state.particles):
        own = state.own_moves[k, b]
        own.lr = lr
        for (where, s), moved in zip(names, own([r[b] for r in leaves], [g[b] for g in grads]), strict=True):
            where[s] = where[s].clone()
            where[s][k, b] = moved


def persistent_term(
    target: Target,
    batch: Tensor,
    lower: PerSite,
    name: str,
    term: Config,
    draws: Draws,
    steps: int,
    adversaries: dict[str, Persistent],
) -> Pair:
    """L6: the warmups, each kept, then the term, whose ascent waits for `persistent_last_ascent`. A merged term gives
    each sample, by the key (term, "adversarial"), the adversary with its routing, or uniform sources with theirs."""
    sites, n = target["sites"], len(draws.samples)
    if name not in adversaries:
        adversaries[name] = persistent_state(draws, sites, name, term)
    state, lr = adversaries[name], number_at(term["lr"], draws.step, steps)
    of_samples = Draws(draws.seed, draws.step, draws.samples)
    if term["scope"] == "pool":
        chances = of_samples.uniform(1, name, "particle")[:, 0]
        state.particles = [math.floor(term["n_particles"] * float(u)) for u in chances]
    merged = term["kind"] == "merged"
    attacked = [not merged or float(u) < term["p"] for u in of_samples.uniform(1, name, "adversarial")[:, 0]]
    uniform = draw_sources(draws, sites, name, "uniform", delta=term["delta"]) if merged else None

    def routes_of(key: str, routing: str) -> PerSite | str:
        return routing if routing == "each_site" else draw_routes(draws, sites, key, routing, p=term["bernoulli_p"])

    def of_one_sample(values: PerSite, b: int) -> PerSite:
        return {s: r[b % r.shape[0]][None] for s, r in values.items()}

    def pair_of(key: str, ci: PerSite, leaves: list[Tensor]) -> Pair:
        squashed = [torch.sigmoid(r) for r in leaves] if term["parameterisation"] == "sigmoid" else leaves
        sources = dict(zip(sites, squashed, strict=False))
        deltas = dict(zip(sites, squashed[len(sites) :], strict=False))
        adversarial_routes, pairs = routes_of(key, term["routing"]), []
        for b in range(n):
            which, routes = (sources, deltas), adversarial_routes
            if uniform is not None and not attacked[b]:
                which, routes = uniform, routes_of(name, term["stochastic_routing"])
            own_routes = routes if isinstance(routes, str) else of_one_sample(routes, b)
            r, d = of_one_sample(which[0], b), of_one_sample(which[1], b)
            own_ci = of_one_sample(ci, b)
            pairs.append(reconstruction(target, batch[b : b + 1], own_ci, r, d, own_routes, term["comparison"]))
        return add_pairs(pairs)

    def leaves_now() -> list[Tensor]:
        sources, deltas = in_use(state)
        return [r.detach().clone().requires_grad_() for r in [*sources.values(), *deltas.values()]]

    for i in range(term["n_warmup"]):
        leaves, frozen = leaves_now(), {s: g.detach() for s, g in lower.items()}
        grads = gradients(value(pair_of(f"{name}/warmup{i}", frozen, leaves)), leaves)
        persistent_ascent(state, leaves, grads, lr)
    leaves = leaves_now()
    pair = pair_of(name, lower, leaves)
    state.pending = (leaves, value(pair))
    return pair


def persistent_last_ascent(state: Persistent, term: Config, step: int, steps: int) -> None:
    """Section 6, 8: along the gradient of the term itself, before the parameters move; none where the term is not
    trained (coefficient 0), since no backward reaches it there."""
    assert state.pending is not None
    leaves, now = state.pending
    if number_at(term["coeff"], step, steps) != 0:
        persistent_ascent(state, leaves, gradients(now, leaves), number_at(term["lr"], step, steps))
    state.pending = None


# ---- section 6: schedules, clipping, AdamW, the step -----------------------------------------------------------------


def schedule_value(
    step: int, steps: int, start: float, kind: str, warmup_frac: float = 0.0, final_frac: float = 1.0
) -> float:
    """S1: linear warmup from 0, then constant, linear or half-period cosine, landing on final_frac start at the last
    step. Where warmup leaves a single step, that step has the start value."""
    warmup = int(steps * warmup_frac)
    if step < warmup:
        return start * step / warmup
    t = (step - warmup) / max(1, steps - 1 - warmup)
    if kind == "constant":
        return start
    if kind == "linear":
        return start * (1 + (final_frac - 1) * t)
    if kind == "cosine":
        return start * (final_frac + (1 - final_frac) * 0.5 * (1 + math.cos(math.pi * t)))
    raise ValueError(f"a schedule is constant, linear or cosine, got {kind!r}")


def annealed_p(step: int, steps: int, *, p_start: float, p_end: float, start_frac: float, end_frac: float) -> float:
    """L3: p_start until start_frac of training, p_end from end_frac on, linear between, at t = step / (steps - 1)."""
    t = step / max(1, steps - 1)
    if t <= start_frac:
        return p_start
    return p_end if t >= end_frac else p_start + (p_end - p_start) * (t - start_frac) / (end_frac - start_frac)


def number_at(number: float | Config, step: int, steps: int) -> float:
    """L1: a number, or a schedule as the keyword arguments of `schedule_value`."""
    return schedule_value(step, steps, **number) if isinstance(number, dict) else number


def clip(grads: list[Tensor], max_norm: float) -> list[Tensor]:
    """Section 6, 9: one group; g * min(1, max_norm / (norm + 1e-6))."""
    norm = add(g.pow(2).sum() for g in grads).sqrt()
    factor = min(1.0, max_norm / (float(norm) + 1e-6))
    return [g * factor for g in grads]


def adamw(
    params: list[Tensor], grads: list[Tensor], state: dict[str, Any], lr: float, weight_decay: float = 0.0
) -> None:
    """AdamW (betas 0.9, 0.999, eps 1e-8 outside the root), in place. `state` starts as {}."""
    if not state:
        state.update(count=0, m=[torch.zeros_like(p) for p in params], v=[torch.zeros_like(p) for p in params])
    state["count"] += 1
    k = state["count"]
    with torch.no_grad():
        for i, (p, g) in enumerate(zip(params, grads, strict=True)):
            state["m"][i] = 0.9 * state["m"][i] + 0.1 * g
            state["v"][i] = 0.999 * state["v"][i] + 0.001 * g**2
            m_hat, v_hat = state["m"][i] / (1 - 0.9**k), state["v"][i] / (1 - 0.999**k)
            p.copy_(p * (1 - lr * weight_decay) - lr * m_hat / (v_hat.sqrt() + 1e-8))


def component_parameters(target: Target) -> list[Tensor]:
    """C8: V and U of every site."""
    return [site[name] for site in target["sites"].values() for name in ("V", "U")]


def ci_parameters(ci_fn: Any) -> list[Tensor]:
    """All tensors in the dictionaries, lists and tuples of a ci function, in their order."""
    if isinstance(ci_fn, Tensor):
        return [ci_fn]
    parts = ci_fn.values() if isinstance(ci_fn, dict) else ci_fn if isinstance(ci_fn, (list, tuple)) else []
    return [tensor for part in parts for tensor in ci_parameters(part)]


def gradients(loss: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Zero for a parameter the loss does not see."""
    return list(torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True, materialize_grads=True))


def importance_term(upper: PerSite, term: Config, step: int, steps: int) -> Pair:
    """L3 as configured: phi "lp" with p (a number, or the arguments of `annealed_p`), or "smooth_l0" with gamma."""

    def phi(u: Tensor) -> Tensor:
        if term["phi"] == "smooth_l0":
            return smooth_l0(u, gamma=number_at(term["gamma"], step, steps), scaled=term["scaled"])
        return lp(u, p=annealed_p(step, steps, **term["p"]) if isinstance(term["p"], dict) else term["p"])

    return importance_minimality(upper, phi, beta=term["beta"], reference_count=term["reference_count"])


def reconstruction_term(target: Target, batch: Tensor, lower: PerSite, name: str, term: Config, draws: Draws) -> Pair:
    """R5: source x routing x comparison, drawn by key under the term's name. All steps of PGD share one routing."""
    sites, delta = target["sites"], term["delta"]
    if term["routing"] == "each_site":
        routes: PerSite | str = "each_site"
    else:
        p = term["p"] if term["routing"] == "bernoulli" else 0.0
        routes = draw_routes(draws, sites, name, term["routing"], p=p)
    if term["source"] == "pgd":
        sources, deltas = pgd_init(draws, sites, name, init=term["init"], scope=term["scope"], delta=delta)
        frozen = {s: g.detach() for s, g in lower.items()}

        def objective(r: PerSite, d: PerSite) -> Pair:
            return reconstruction(target, batch, frozen, r, d, routes, term["comparison"])

        sources, deltas = pgd(objective, sources, deltas, n_steps=term["n_steps"], step_size=term["step_size"])
    else:
        fill = term["value"] if term["source"] == "constant" else 0.0
        sources, deltas = draw_sources(draws, sites, name, term["source"], value=fill, delta=delta)
    return reconstruction(target, batch, lower, sources, deltas, routes, term["comparison"])


def step_losses(
    target: Target,
    ci_fn: CiFn,
    batch: Tensor,
    samples: Sequence[int],
    step: int,
    config: Config,
    adversaries: dict[str, Persistent] | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Section 6, 2 to 6: the unweighted value of every term, and the total (L1).

    config: seed, steps, lower, upper (squashings), sampling ("continuous" | "binomial"), terms {name: term}. A term
    has a coeff (number or schedule) and a kind:
        faithfulness            form
        importance_minimality   phi, p | gamma and scaled, beta, reference_count (None for N)
        reconstruction          source ("uniform" | "binomial" | "constant" with value | "pgd" with init, scope,
                                n_steps, step_size), delta (bool), routing ("all" | "uniform_subset" | "each_site" |
                                "bernoulli" with p), comparison ("mse" | "kl" | "hidden")
                                or source "persistent_pgd" with optimizer ("sign" | "adam" | "sgd"), lr (number or
                                schedule), betas, eps, scope ("single" | "per_position_shared_batch" | "repeat" with
                                n_sources | "per_sample_per_position" | "pool" with n_particles), n_warmup, init,
                                parameterisation ("clamp" | "sigmoid"), bernoulli_p; kept in `adversaries`
        merged                  the same with p, and stochastic_routing for the samples with uniform sources
    """
    sites, steps = target["sites"], config["steps"]
    draws = Draws(config["seed"], step, tuple(samples), leading_axes(batch)[1:])
    logits = ci_logits(ci_fn, sites, clean_forward(target, batch)["inputs"])
    noise = draw_ci_noise(draws, sites) if config["sampling"] == "binomial" else None
    lower, upper = causal_importances(logits, lower=config["lower"], upper=config["upper"], noise=noise)
    values = {}
    for name, term in config["terms"].items():
        if term["kind"] == "faithfulness":
            pair = faithfulness(sites, term["form"])
        elif term["kind"] == "importance_minimality":
            pair = importance_term(upper, term, step, steps)
        elif term["kind"] == "merged" or term["source"] == "persistent_pgd":
            assert adversaries is not None
            pair = persistent_term(target, batch, lower, name, term, draws, steps, adversaries)
        else:
            pair = reconstruction_term(target, batch, lower, name, term, draws)
        values[name] = value(pair)
    return values, add(number_at(term["coeff"], step, steps) * values[name] for name, term in config["terms"].items())


def faithfulness_warmup(target: Target, *, steps: int, lr: float, weight_decay: float, form: str) -> None:
    """S2: AdamW on faithfulness alone over V and U, in place; its state is dropped."""
    params, state = component_parameters(target), {}
    for _ in range(steps):
        adamw(params, gradients(value(faithfulness(target["sites"], form)), params), state, lr, weight_decay)


def trainable_copy(target: Target, ci_fn: CiFn) -> tuple[Target, CiFn]:
    """C8: copies in which V, U and the ci weights are float64 leaves, so that a run leaves its arguments alone."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().double().clone().requires_grad_()

    def copied(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: copied(inner) for key, inner in part.items()}
        if isinstance(part, (list, tuple)):
            return type(part)(copied(inner) for inner in part)
        return leaf(part) if isinstance(part, Tensor) else part

    sites = {s: {**site, "V": leaf(site["V"]), "U": leaf(site["U"])} for s, site in target["sites"].items()}
    return {**target, "sites": sites}, copied(ci_fn)


def trajectory(
    target: Target,
    ci_fn: CiFn,
    batches: Sequence[tuple[Tensor, Sequence[int]]],
    config: Config,
    adversaries: dict[str, Persistent] | None = None,
) -> tuple[list[dict[str, float]], Target, CiFn]:
    """Section 6 over `batches` [(batch, global sample indices)]: the losses of every step (with "total", before its
    update), and the final target and ci_fn. `adversaries`, given as {}, is left with the sources of the last step.

    config, beside that of `step_losses`: lr_components, lr_ci (number or schedule), clip_components, clip_ci (or None),
    faithfulness_warmup (keyword arguments of that function, or None).
    """
    target, ci_fn = trainable_copy(target, ci_fn)
    adversaries = {} if adversaries is None else adversaries
    if config["faithfulness_warmup"] is not None:
        faithfulness_warmup(target, **config["faithfulness_warmup"])
    groups = {"components": component_parameters(target), "ci": ci_parameters(ci_fn)}
    states: dict[str, dict[str, Any]] = {group: {} for group in groups}
    history = []
    for step, (batch, samples) in enumerate(batches):
        values, total = step_losses(target, ci_fn, batch, samples, step, config, adversaries)
        history.append({**{name: v.item() for name, v in values.items()}, "total": total.item()})
        grads = {group: gradients(total, params) for group, params in groups.items()}
        for name, state in adversaries.items():
            persistent_last_ascent(state, config["terms"][name], step, config["steps"])
        for group, params in groups.items():
            max_norm = config[f"clip_{group}"]
            clipped = grads[group] if max_norm is None else clip(grads[group], max_norm)
            adamw(params, clipped, states[group], number_at(config[f"lr_{group}"], step, config["steps"]))
    return history, target, ci_fn


# ---- section 8: evaluation -------------------------------------------------------------------------------------------


def ci_l0(lower: PerSite, threshold: float, groups: dict[str, list[str]]) -> dict[str, float]:
    """E1: mean over positions of #(lower > threshold), per site, per group of fnmatch patterns, and `total`."""
    l0 = {}
    for s, g in lower.items():
        where = positions(g.shape[:-1])
        l0[s] = sum(bool(x > threshold) for i in where for x in g[i]) / len(where)
    grouped = {}
    for group, patterns in groups.items():
        grouped[group] = sum(l0[s] for s in lower if any(fnmatchcase(s, pattern) for pattern in patterns))
    return {**l0, **grouped, "total": sum(l0[s] for s in lower)}


def masks_of(
    masking: str, draws: Draws, sites: dict[str, Site], term: str, lower: PerSite, threshold: float
) -> tuple[PerSite, PerSite]:
    """E2: masks and delta masks of one of the six maskings; `random` is keyed (term, site, "mask")."""
    if masking == "stochastic":
        sources, deltas = draw_sources(draws, sites, term, "uniform")
        return masks_from_sources(lower, sources), deltas
    made = {
        "ci": lambda s, g: g,
        "unmasked": lambda s, g: torch.ones_like(g),
        "random": lambda s, g: draws.uniform(g.shape[-1], term, s, "mask"),
        "rounded": lambda s, g: (g > threshold).double(),
        "zero": lambda s, g: torch.zeros_like(g),
    }[masking]
    return {s: made(s, g) for s, g in lower.items()}, {}


def next_token_ce(tokens: Tensor, logits: Float[Tensor, "*rows sequence vocab"]) -> Pair:
    """E2: -log p of the next token of the same row; the last position of a row predicts nothing."""
    terms = []
    for row in positions(tokens.shape[:-1]):
        for t in range(tokens.shape[-1] - 1):
            here = logits[row][t]
            terms.append(here.logsumexp(0) - here[int(tokens[row][t + 1])])
    return add(terms), len(terms)


def ce_and_kl(target: Target, tokens: Tensor, lower: PerSite, draws: Draws, term: str, threshold: float) -> Config:
    """E2: {"ce_target", and kl, ce, ce_difference and ce_unrecovered of each masking}."""
    clean, results = clean_forward(target, tokens)["output"], {}
    sites = {s: {**x, "V": x["V"].detach(), "U": x["U"].detach()} for s, x in target["sites"].items()}
    target = {**target, "sites": sites}
    ce_target = float(value(next_token_ce(tokens, clean)))
    for masking in ("zero", "ci", "unmasked", "stochastic", "random", "rounded"):
        masks, deltas = masks_of(masking, draws, target["sites"], term, lower, threshold)
        output = forward(target, tokens, masks, deltas)["output"]
        results[f"kl_{masking}"] = float(value(kl(clean, output)))
        results[f"ce_{masking}"] = ce = float(value(next_token_ce(tokens, output)))
        results[f"ce_difference_{masking}"] = ce - ce_target
        results[f"ce_unrecovered_{masking}"] = (ce - ce_target) / (results["ce_zero"] - ce_target)
    return {"ce_target": ce_target, **results}


def identity_ci_error(ci: Float[Tensor, "n_features C"], tolerance: float = 0.1) -> int:
    """E3 by brute force over C! / (C - n)! matchings: #(off-diagonal > tolerance) + #(diagonal < 1 - tolerance) at the
    largest diagonal sum (the fewest errors on ties). Missing columns count as zeros."""
    n, width = ci.shape[0], max(ci.shape)
    padded = torch.zeros(n, width, dtype=ci.dtype)
    padded[:, : ci.shape[1]] = ci
    above = [[bool(x > tolerance) for x in row] for row in padded]
    missing = [[bool(x < 1 - tolerance) for x in row] for row in padded]
    outcomes = []
    for columns in permutations(range(width), n):
        diagonal = list(enumerate(columns))
        off_diagonal = sum(map(sum, above)) - sum(above[i][c] for i, c in diagonal)
        errors = off_diagonal + sum(missing[i][c] for i, c in diagonal)
        outcomes.append((round(-sum(float(padded[i, c]) for i, c in diagonal), 12), errors))
    return min(outcomes)[1]


def dense_ci_error(ci: Float[Tensor, "n_features C"], k: int, tolerance: float = 0.1) -> int:
    """E3: with columns by falling mass, one error for each of the first k without an entry >= 1 - tolerance (or
    absent), and one for every entry > tolerance in the rest."""
    columns = sorted((ci[:, c] for c in range(ci.shape[1])), key=lambda column: -float(column.sum()))
    strong = sum(any(x >= 1 - tolerance for x in column) for column in columns[:k])
    return k - strong + sum(bool(x > tolerance) for column in columns[k:] for x in column)


def best_subcomponents(weight: Tensor, V: Tensor, U: Tensor) -> list[tuple[float, float]]:
    """E4: per column j of W (d_out, d_in), the largest cosine of U_c V_{c,j} with W_j, and the length ratio there."""
    best = []
    for j in range(weight.shape[1]):
        column, candidates = weight[:, j].double(), []
        for c in range(U.shape[0]):
            part = U[c].double() * V[j, c].double()
            lengths = float(part.norm()) * float(column.norm())
            cosine = float(torch.dot(part, column)) / lengths if lengths > 0 else 0.0
            candidates.append((cosine, float(part.norm()) / float(column.norm())))
        best.append(max(candidates, key=lambda candidate: candidate[0]))
    return best


def mean_max_cosine_similarity(weight: Tensor, V: Tensor, U: Tensor) -> float:
    """E4, MMCS: mean over the columns of W of the best cosine."""
    best = best_subcomponents(weight, V, U)
    return sum(cosine for cosine, _ in best) / len(best)


def mean_l2_ratio(weight: Tensor, V: Tensor, U: Tensor) -> float:
    """E4, ML2R: mean over the columns of W of ||U_c V_{c,j}|| / ||W_j|| at the best c."""
    best = best_subcomponents(weight, V, U)
    return sum(ratio for _, ratio in best) / len(best)
