"""What a newcomer reads after a mistake: one sentence on stderr, exit code 1, and no target trained in vain."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from pdlightning.__main__ import main

FAST = ("experiment=tms_5-2", "debug=fast")
Refused = Callable[..., str]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """The message of a command that must end with exit code 1, leave no run and train no target."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PDLIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")

    def message(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["pdlightning", *words])
        with pytest.raises(SystemExit) as end:
            main()
        assert isinstance(end.value.code, str)  # Python prints it on stderr and exits with 1
        assert not list(tmp_path.rglob("target.json")) and not list(tmp_path.rglob("config.yaml"))
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + end.value.code
        return end.value.code

    return message


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "Choose an experiment, such as experiment=tms_5-2 (there are: gpt2, induction, llama3_8b-l18,"),
        (("experiment=tms_52",), "experiment=tms_52: there is no such experiment; did you mean 'tms_5-2'?"),
        ((*FAST, "seeed=3"), "there is no 'seeed' at the top level; did you mean 'seed'?"),
        ((*FAST, "ci_fn=shared_mpl"), "there is no such ci_fn; did you mean 'shared_mlp'?"),
        (
            (*FAST, "loss.importance_minimality.coef=1"),
            "no 'coef' in 'loss.importance_minimality'; did you mean 'coeff'?",
        ),
        ((*FAST, "pd.sites={linearx: 3}"), "pd.sites.linearx: there is no 'linearx' in 'pd.sites'"),
        ((*FAST, "data.labls=1"), "there is no 'labls' in 'data'"),
        ((*FAST, "data.zzz=1"), "; +data.zzz=... adds it"),
        ((*FAST, "metric=none", "~metric.slow.zzz"), "so ~metric.slow.zzz has nothing to delete"),
        (
            (*FAST, "+data.zzz=1"),
            "data.zzz: pdlightning.data.SparseFeatures has no argument 'zzz' (it takes: n_features,",
        ),
        ((*FAST, "+extra=1"), "extra: pdlightning.schema.Run has no argument 'extra'"),
        ((*FAST, "steps=abc"), "steps: expected int, got 'abc'"),
        ((*FAST, "steps=0"), "steps must be at least 1, got 0"),
        ((*FAST, "seed=1.5"), "seed: expected int, got 1.5"),
        ((*FAST, "logging.progress=5"), "logging.progress: expected bool, got 5"),
        (
            (*FAST, "pd.sites.linear1=10000000000"),
            "cannot fit: it needs at least 1.12 TB (V, U, their gradients and optimizer 1.12 TB), activations not",
        ),
        ((*FAST, "objective=eval/loss/totl"), "is not measured by this run; did you mean 'eval/loss/total'?"),
        (
            (*FAST, "loss=[faithfulness,importance_minimality,stochastic_recon]"),
            "loss.stochastic_recon_layerwise: settings (source) of a loss that is not among those chosen",
        ),
        ((*FAST, "pd.squash=leaky"), "squash='leaky' lets ci fall below 0"),
        ((*FAST, "logging.eval_every=0"), "logging.eval_every must be at least 1, got 0"),
        ((*FAST, "logging.checkpoints_kept=1"), "logging.checkpoints_kept must be at least 2, or null for all, got 1"),
        ((*FAST, "logging.slow_eval_every=4"), "must be a multiple of eval_every, got 4 and 3: 3 would fit"),
        ((*FAST, "logging.loggers=5"), "logging.loggers: expected dict"),
        ((*FAST, "runtime.precision=32"), "runtime.precision: expected one of '64-true', '32-true'"),
        ((*FAST, "+goal.x.least=1"), "goal.x: expected min, max or both, got {'least': 1}"),
        (
            (*FAST, "loss.importance_minimality.coeff=-1"),
            "expected a number >= 0 or a schedule, got -1.\nwhile building",
        ),
        ((*FAST, "loss.importance_minimality.coeff=abc"), "expected a number >= 0 or a schedule, got 'abc'"),
        (
            ("experiment=tms_5-2", "loss.importance_minimality.p=???"),
            "loss.importance_minimality.p: a value is required",
        ),
        ((*FAST, "data.probability=1.5"), "needs a probability in [0, 1], got 1.5"),
        ((*FAST, "target.data.probability=-1"), "needs a probability in [0, 1], got -1"),
        (
            (*FAST, "+pd.components_optimizer.lr.warmup_frac=2"),
            "must lie in [0, 1], got 2.\nwhile building the config's pd.components_optimizer.lr",
        ),
        (
            (*FAST, "pd.sites.linear1=0"),
            "sites['linear1']: C, the number of subcomponents, must be an integer >= 1, got 0",
        ),
        (
            (*FAST, "~pd.sites.linear1", "+pd.sites.linearx=3"),
            "Pattern 'linearx' matches no module. The modules that can be decomposed: linear1, linear2.",
        ),
        ((*FAST, "+pd.sites.linear?=3"), "Hydra cannot read +pd.sites.linear?=3"),
        (
            ("experiment=resid_mlp1", "debug=fast", "~pd.sites", "+pd.sites={layers.0: 3}"),
            "'layers.0', a MLPBlock, which cannot be decomposed. The kinds that work: nn.Linear",
        ),
        (
            (*FAST, "metric.fast.identity_linear1.sites=lin"),
            "Pattern 'lin' matches no site. The sites: linear1, linear2.",
        ),
        ((*FAST, "metric=none"), "metric.slow.pgd_ladder: expected a metric with its _target_, got {'rungs': [1, 2]}"),
        ((*FAST, "metric=[vectors,tms,examples]"), "metric.slow.examples: TopExamples shows text, so a batch must be"),
        ((*FAST, "metric=[language,tms]"), "metric.fast.ce_kl: CEandKL predicts tokens, so a batch must be"),
        (
            ("experiment=induction", "debug=fast", "comparison._target_=pdlightning.metrics.OutputMSE"),
            "loss.stochastic_recon: OutputMSE compares vectors, but the batch is of tokens",
        ),
        ((*FAST, "data.n_features=7"), "data: the target cannot take a batch of pdlightning.data.SparseFeatures"),
        (
            (*FAST, "target=tms_5-2-id", "metric=[vectors,tms,tms_id]", "+pd.sites={hidden_layers.0: 1}"),
            "k must be between 0 and the number of columns 1, got 2.\nwhile trying out metric.fast.dense_hidden",
        ),
        ((*FAST, "target=induction"), "metric.fast.identity_linear1.n_features: Interpolation key"),
        ((*FAST, "pd._target_=torch.nn.Linearr"), "'torch.nn' has no 'Linearr'; did you mean 'Linear'?"),
        (("name=x",), "target: a value is required; choose target=..."),
        (("-m", "experiment=tms_5-2,tms_40-10"), "say where it goes with hydra.sweep.dir"),
        (("resume=elsewhere",), "is not the folder of a run or of a sweep (it has no config.yaml and no sweep.yaml)"),
        (("resume=elsewhere", "steps=3"), "takes nothing else but runtime.<setting>=...: drop steps=3"),
    ],
)
def test_a_mistake_ends_in_a_sentence_before_the_target_is_trained(
    refused: Refused, words: tuple[str, ...], expected: str
):
    assert expected in refused(*words)
