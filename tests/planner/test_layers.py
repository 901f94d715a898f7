import re

from hypothesis import given
from hypothesis import strategies as st

from bitplan.planner.layers import patterns

WORDS = st.from_regex(r"[a-z_]{1,6}|[0-9]{1,3}", fullmatch=True)
MODULES = st.lists(st.lists(WORDS, min_size=1, max_size=5).map(".".join), unique=True, max_size=12)


@given(MODULES, st.data())
def test_patterns_match_the_names_they_are_made_of_and_no_other(
    modules: list[str], data: st.DataObject
) -> None:
    mine = data.draw(st.lists(st.sampled_from(modules), unique=True)) if modules else []
    found = patterns(mine)
    near = [f"{name}{end}" for name in modules for end in ("0", "x", ".0")]
    for name in (*modules, *near):
        hits = sum(bool(re.fullmatch(pattern, name)) for pattern in found)
        assert hits == (name in mine), "each name once, whatever the order of the lines"


def test_blocks_of_one_path_share_a_pattern() -> None:
    names = [f"model.layers.{block}.mlp.down_proj" for block in (0, 3, 11)]
    assert patterns([*names, "lm_head"]) == [
        r"model\.layers\.(0|3|11)\.mlp\.down_proj",
        "lm_head",
    ]
