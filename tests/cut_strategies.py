"""Strategies for cuts in property tests."""

from __future__ import annotations

from hypothesis import strategies as st

from sleb_serve.cut.config import Cut


@st.composite
def cuts(draw: st.DrawFn) -> Cut:
    count = draw(st.integers(2, 14))
    removed = draw(st.sets(st.integers(0, count - 1), min_size=1, max_size=count - 1))
    return Cut(count, tuple(sorted(removed)))
