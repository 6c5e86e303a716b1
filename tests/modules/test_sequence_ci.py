"""The ci functions for sequences against the oracle, and what they may and may not read (spec I2)."""

from __future__ import annotations

import lightning
import naive
import pytest
import torch
from parity import (
    COMPARISONS,
    ROUTINGS,
    SEED,
    SQUASHINGS,
    TOKEN_SITES,
    assert_same,
    batch_of,
    seeded,
    source_of,
    term_of,
    tokens_chain,
)
from sequence_parity import (
    ANY_SITES,
    GROUPS,
    RECIPES,
    TOKEN_SITES_ONLY,
    alone,
    built,
    gradients_in_oracle_order,
    in_oracle,
    inputs_of,
    mixed,
    oracle_of,
    small,
)
from torch import nn
from torch.utils.data import DataLoader

from pdlightning import ParameterDecomposition
from pdlightning.metrics import FaithfulnessLoss, ImportanceMinimalityLoss, ReconstructionLoss
from pdlightning.modules import ChunkwiseTransformer, ComponentModel
from pdlightning.optimization import AdamW

CASES = [
    *[("vectors", leading, kind) for kind in ANY_SITES for leading in [(3,), (2, 1, 3)]],
    *[("tokens", (2, 3), kind) for kind in ANY_SITES],
    *[("tokens", leading, kind) for kind in TOKEN_SITES_ONLY for leading in [(3,), (2, 3)]],
]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(("data", "leading", "kind"), CASES)
def test_logits_and_their_gradients_equal_the_oracle(data: str, leading: tuple[int, ...], kind: str) -> None:
    model, batch = built(data, RECIPES[kind]()), batch_of(data, leading)
    target, ci_fn = oracle_of(model)
    ours = model.causal_importances(model.clean(batch)).logits
    theirs = naive.ci_logits(ci_fn, target["sites"], naive.clean_forward(target, batch)["inputs"])
    assert list(ours) == list(theirs) == list(model.components)
    for site in ours:
        assert_same(ours[site], theirs[site], site)
    leaves = naive.component_parameters(target) + naive.ci_parameters(ci_fn)
    expected = naive.gradients(mixed(theirs), leaves)
    for i, (gradient, e) in enumerate(zip(gradients_in_oracle_order(model, mixed(ours)), expected, strict=True)):
        assert_same(gradient, e, f"gradient {i}")


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", ["global", "chunkwise taps", "reverse both"])
def test_a_training_equals_the_oracle_step_by_step(kind: str) -> None:
    steps, leading = 3, (2, 3)
    pd = ParameterDecomposition(
        target=tokens_chain(),
        sites=TOKEN_SITES,
        ci_fn=RECIPES[kind](),
        losses={
            "faithfulness": FaithfulnessLoss(coeff=1.0),
            "importance": ImportanceMinimalityLoss(coeff=0.1, p=0.9, beta=0.3),
            "subset": ReconstructionLoss(
                coeff=0.5,
                source=source_of("uniform"),
                routing=ROUTINGS["uniform_subset"],
                comparison=COMPARISONS["kl"],
            ),
        },
        components_optimizer=AdamW(lr=1e-2, clip=0.3),
        ci_optimizer=AdamW(lr=1e-2, clip=0.05),
        seed=SEED,
    )
    oracle, start = oracle_of(pd.model), [p.detach().clone() for p in pd.model.ci_fn.parameters()]
    batches = [batch_of("tokens", leading, seed=step) for step in range(steps)]
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(pd, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    config = {
        "seed": SEED, "steps": steps, "sampling": "continuous", **SQUASHINGS["leaky_hard"], "faithfulness_warmup": None,
        "lr_components": 1e-2, "lr_ci": 1e-2, "clip_components": 0.3, "clip_ci": 0.05,
        "terms": {
            "faithfulness": {"kind": "faithfulness", "coeff": 1.0, "form": "mean_squared"},
            "importance": {
                "kind": "importance_minimality", "coeff": 0.1, "phi": "lp", "p": 0.9, "beta": 0.3,
                "reference_count": None,
            },
            "subset": term_of("uniform", "uniform_subset", "kl") | {"coeff": 0.5},
        },
    }  # fmt: skip
    rows, target, ci_fn = naive.trajectory(*oracle, [(batch, range(len(batch))) for batch in batches], config)
    last = {name.removeprefix("loss/"): float(x) for name, x in trainer.callback_metrics.items() if "loss/" in name}
    assert last == pytest.approx(rows[-1], rel=1e-10, abs=1e-10)
    for ours, theirs in zip(
        naive.ci_parameters(in_oracle(pd.model.ci_fn, lambda p: p)), naive.ci_parameters(ci_fn), strict=True
    ):
        assert_same(ours, theirs)
    assert all(not torch.equal(p, q) for p, q in zip(start, pd.model.ci_fn.parameters(), strict=True))


def changed_sites(kind: str, touched: str) -> set[str]:
    """The sites whose logits change with the input of one site."""
    ci_fn, inputs = alone(kind), inputs_of(2, 3)
    before = ci_fn(inputs)
    after = ci_fn(inputs | {touched: inputs[touched] + torch.randn(inputs[touched].shape, generator=seeded(9))})
    return {site for site in before if not torch.equal(before[site], after[site])}


@pytest.mark.parametrize(
    ("kind", "touched", "changed"),
    [
        ("global", "conv", {"embed", "conv.pre_identity", "conv", "out"}),
        ("chunkwise", "embed", {"embed", "conv.pre_identity", "conv"}),
        ("chunkwise", "out", {"out"}),
        ("chunkwise taps", "embed", {"embed", "conv.pre_identity", "conv"}),
        ("chunkwise taps", "conv", {"out"}),
        ("chunkwise taps", "conv.pre_identity", {"embed", "conv.pre_identity", "out"}),
        ("reverse three", "out", {"embed", "conv.pre_identity", "conv", "out"}),
        ("reverse three", "conv", {"embed", "conv.pre_identity", "conv"}),
        ("reverse three", "embed", {"embed", "conv.pre_identity"}),
    ],
)
def test_a_group_reads_its_taps_and_the_groups_after_it_alone(kind: str, touched: str, changed: set[str]) -> None:
    assert changed_sites(kind, touched) == changed


def reads(kind: str, *, sequence: int = 5, touched: int = 2) -> list[bool]:
    """For every position, whether its logits change with the inputs at one position."""
    ci_fn, inputs = alone(kind), inputs_of(2, sequence)
    other = {site: x.clone() for site, x in inputs.items()}
    for x in other.values():
        x[:, touched] += 1.5
    before, after = ci_fn(inputs), ci_fn(other)
    return [any(not torch.equal(before[s][:, t], after[s][:, t]) for s in before) for t in range(sequence)]


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("global", [True] * 5),
        ("chunkwise", [True] * 5),
        ("reverse attention", [True] * 5),
        ("global causal", [False, False, True, True, True]),
        ("reverse both", [False, False, True, True, True]),
        ("reverse transition", [False, False, True, False, False]),
    ],
)
def test_causal_attention_never_reads_later_positions_and_bidirectional_does(kind: str, expected: list[bool]) -> None:
    assert reads(kind) == expected


@pytest.mark.usefixtures("float64")
@pytest.mark.parametrize("kind", list(RECIPES))
def test_sequences_do_not_see_each_other_whatever_the_leading_axes(kind: str) -> None:
    ci_fn, inputs = alone(kind), inputs_of(2, 2, 4)
    whole = ci_fn(inputs)
    for i in range(2):
        part = ci_fn({site: x[i, 1:] for site, x in inputs.items()})
        for site in whole:
            assert_same(part[site][0], whole[site][i, 1], site)


def test_taps_are_checked_against_groups_and_sites_and_the_target_is_given_back() -> None:
    target = tokens_chain()
    for taps, message in (
        ({"lat": ["out"]}, r"taps name \['lat'\], but the groups are \['early', 'middle', 'late'\]"),
        ({"late": ["h.*"]}, r"taps\['late'\]: pattern 'h.\*' matches no site. The sites: embed, conv.pre_identity"),
    ):
        with pytest.raises(ValueError, match=message):
            ComponentModel(
                target=target, sites=TOKEN_SITES, ci_fn=ChunkwiseTransformer(groups=GROUPS, taps=taps, **small())
            )
    assert isinstance(target["embed"], nn.Embedding)
