"""Groups of sites by pattern and by number of consecutive blocks."""

from __future__ import annotations

import pytest

from pdlightning.modules.site_groups import Groups, block_of, site_groups

SITES = ["wte", "h.0.pre_identity", "h.0.attn.q", "h.0.mlp", "h.1.attn.q", "h.1.mlp", "h.10.mlp", "lm_head"]


@pytest.mark.parametrize(
    ("site", "block"),
    [
        ("h.3.mlp.c_fc", "h.3"),
        ("model.layers.12.experts.4.up", "model.layers.12"),
        ("lm_head", "lm_head"),
        ("linear1", "linear1"),
        ("conv.pre_identity", "conv"),
        ("h.3.pre_identity", "h.3"),
        ("0", "0"),
    ],
)
def test_a_block_is_a_path_up_to_its_first_number(site: str, block: str) -> None:
    assert block_of(site) == block


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (1, [SITES]),
        (2, [SITES[:6], SITES[6:]]),
        (3, [SITES[:4], SITES[4:7], SITES[7:]]),
        (5, [SITES[:1], SITES[1:4], SITES[4:6], SITES[6:7], SITES[7:]]),
    ],
)
def test_a_number_gives_consecutive_blocks_the_longer_groups_first(n: int, expected: list[list[str]]) -> None:
    found = site_groups(SITES, n, name="X")
    assert list(found) == [f"group_{i}" for i in range(n)]
    assert list(found.values()) == expected


def test_patterns_give_groups_in_the_order_of_their_first_site() -> None:
    groups = {"rest": ["lm_head", "wte"], "late": ["h.10*", "h.1.*"], "early": ["h.0.*"]}
    found = site_groups(SITES, groups, name="X")
    assert list(found) == ["rest", "early", "late"]
    assert found["rest"] == ["wte", "lm_head"] and found["late"] == ["h.1.attn.q", "h.1.mlp", "h.10.mlp"]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (6, "X: 6 groups of 5 blocks .wte, h.0, h.1, h.10, lm_head.: ask for fewer"),
        ({"a": ["*"], "b": ["h.9.*"]}, r"X: groups\['b'\]: pattern 'h.9.\*' matches no site. The sites: wte, h.0"),
        ({"a": ["*"], "b": ["h.1.mlp"]}, r"X: site 'h.1.mlp' is in the groups \['a', 'b'\]: make their patterns disj"),
        ({"a": ["h.*"], "b": ["wte"]}, "X: site 'lm_head' is in no group: add a pattern"),
    ],
)
def test_what_does_not_part_the_sites_is_refused_by_name(groups: Groups, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        site_groups(SITES, groups, name="X")
