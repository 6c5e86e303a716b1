"""Names of runs: short, telling, and safe as a folder."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pdlightning.naming import folder_name, in_short, named, run_name, short_keys


def test_a_key_is_shortened_to_the_end_that_tells_it_from_the_others():
    assert short_keys(["seed", "loss.importance_minimality.coeff"]) == {
        "seed": "seed",
        "loss.importance_minimality.coeff": "coeff",
    }
    both = short_keys(["loss.a.coeff", "loss.b.coeff", "pd.seed", "seed"])
    assert list(both.values()) == ["a.coeff", "b.coeff", "pd.seed", "seed"]
    assert short_keys(["loss.a.coeff.start"]) == {"loss.a.coeff.start": "coeff.start"}


keys = st.lists(
    st.lists(st.sampled_from("abc"), min_size=1, max_size=4).map(".".join), min_size=1, max_size=6, unique=True
)


@given(keys)
def test_short_keys_differ_and_are_ends_of_their_keys(names: list[str]):
    short = short_keys(names)
    assert len(set(short.values())) == len(names)
    assert all(f".{key}".endswith(f".{end}") for key, end in short.items())


@pytest.mark.parametrize(
    ("value", "said"),
    [(1e-3, "0.001"), (1.23456e-5, "1.235e-5"), (2.5e10, "2.5e10"), (3, "3"), (True, "true"), (None, "null"),
     ("shared_mlp", "shared_mlp"), ([50, 100], "[50,100]")],
)  # fmt: skip
def test_values_are_short(value: object, said: str):
    assert in_short(value) == said


def test_the_name_of_a_run_and_its_folder():
    swept = {"seed": 3, "loss.importance_minimality.coeff": 1e-3}
    assert run_name(swept) == "seed=3,coeff=0.001"
    assert folder_name(7, swept) == "7_seed=3_coeff=0.001"
    assert folder_name(0, {}) == "0"
    odd = folder_name(1, {"ci_fn.hidden": [50, 100], "path": "/tmp/a b,c" + "x" * 300})
    assert re.fullmatch(r"[\w.=+-]+", odd) and len(odd) <= 120


def test_what_a_run_says_of_itself_has_labels_and_what_was_swept_as_tags_once():
    logging = {"tags": ["mine"], "run_name": None, "swept": {"labels.size": "small", "seed": 1}}
    config = {"name": "tms", "logging": logging, "labels": {"size": "small", "width": 3}}
    said = named(config)
    assert said["tags"] == ["mine", "size=small", "seed=1", "width=3"] and said["name"] == "tms"
    assert named({**config, "labels": None})["labels"] == {}
