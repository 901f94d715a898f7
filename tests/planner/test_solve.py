"""The knapsack against brute force over every combination of options."""

import ctypes
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitplan.planner import solve as module
from bitplan.planner import states
from bitplan.planner.quiet import quiet_stdout
from bitplan.planner.solve import Menu, dominated, solve, split


def random_menu(rng: np.random.Generator, sizes: list[int], budgets: int, *, ties: bool) -> Menu:
    cell = np.repeat(np.arange(len(sizes)), sizes)

    def draw(*shape: int) -> np.ndarray:
        return rng.integers(0, 4, shape).astype(float) if ties else rng.random(shape)

    return Menu(
        cell=cell, objective=draw(len(cell)), costs=draw(budgets, len(cell)), tie=draw(len(cell))
    )


def brute_force(menu: Menu, limits: np.ndarray) -> float | None:
    options = [np.flatnonzero(menu.cell == c) for c in np.unique(menu.cell)]
    values = [
        menu.objective[list(combination)].sum()
        for combination in itertools.product(*options)
        if (menu.costs[:, list(combination)].sum(axis=1) <= limits * (1 + 1e-9)).all()
    ]
    return min(values, default=None)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6),
    budgets=st.integers(0, 3),
    tightness=st.floats(0.0, 1.2),
    ties=st.booleans(),
    path=st.sampled_from(["as it comes", "by core", "by states"]),
)
def test_equals_brute_force(
    seed: int, sizes: list[int], budgets: int, tightness: float, ties: bool, path: str
) -> None:
    rng = np.random.default_rng(seed)
    menu = random_menu(rng, sizes, budgets, ties=ties)
    limits = tightness * menu.costs.sum(axis=1) / np.mean(sizes)
    with pytest.MonkeyPatch.context() as patch:
        if path != "as it comes":
            patch.setattr(module, "SMALL", 0)
            patch.setattr(module, "CORE", 1)
        if path == "by core":
            patch.setattr(states, "MOST_STATES", 0)
        found = solve(menu, limits)
    best = brute_force(menu, limits)
    assert (found is None) == (best is None)
    if found is not None and best is not None:
        assert menu.cell[found.options].tolist() == list(range(len(sizes)))
        assert (menu.costs[:, found.options].sum(axis=1) <= limits * (1 + 3e-9)).all()
        assert found.value == pytest.approx(best, rel=1e-9, abs=1e-9)
        assert found.gap == 0.0


def test_large_instances_by_core_and_whole_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(1)
    menu = random_menu(rng, [4] * 200, 2, ties=False)
    limits = np.array([60.0, 70.0])
    by_core = solve(menu, limits)
    monkeypatch.setattr(module, "SMALL", 10**9)
    whole = solve(menu, limits)
    assert by_core is not None
    assert whole is not None
    assert by_core.value == pytest.approx(whole.value, rel=1e-9)
    assert by_core.gap == 0.0


def test_states_and_solver_agree_on_one_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(4)
    for lattice in (False, True):
        menu = random_menu(rng, [4] * 200, 1, ties=lattice)
        limits = np.array([120.0 if lattice else 50.0])
        by_states = solve(menu, limits)
        with monkeypatch.context() as patch:
            patch.setattr(module, "CORE", 10**6)
            patch.setattr(states, "MOST_STATES", 0)
            whole = solve(menu, limits)
        assert by_states is not None
        assert whole is not None
        assert by_states.value == pytest.approx(whole.value, rel=1e-9)


def test_too_many_states_fall_back_to_the_solver(monkeypatch: pytest.MonkeyPatch) -> None:
    menu = random_menu(np.random.default_rng(5), [4] * 200, 1, ties=False)
    expected = solve(menu, np.array([50.0]))
    monkeypatch.setattr(states, "MOST_STATES", 1)
    found = solve(menu, np.array([50.0]))
    assert expected is not None
    assert found is not None
    assert found.value == pytest.approx(expected.value, rel=1e-9)


def test_parts_share_no_limit() -> None:
    menu = Menu(
        cell=np.array([0, 0, 1, 1, 2, 2, 3, 3]),
        objective=np.zeros(8),
        # Limits 0 and 2 meet in cell 1; limit 1 has cell 2 to itself; cell 3 has no limit.
        costs=np.array(
            [[1, 2, 1, 2, 0, 0, 5, 5], [0, 0, 0, 0, 1, 2, 0, 0], [0, 0, 3, 1, 0, 0, 0, 0]], float
        ),
        tie=np.zeros(8),
    )
    parts = [(index.tolist(), rows.tolist()) for index, rows in split(menu)]
    assert parts == [([0, 1, 2, 3, 6, 7], [0, 2]), ([4, 5], [1])]


def test_the_solver_keeps_stdout_clean(capfd: pytest.CaptureFixture[str]) -> None:
    libc = ctypes.CDLL(None)
    libc.puts(b"before")
    libc.fflush(None)
    with quiet_stdout():
        libc.puts(b"noise")
    libc.puts(b"after")
    libc.fflush(None)
    assert capfd.readouterr().out == "before\nafter\n"


def test_infeasible_large_instances_are_told() -> None:
    rng = np.random.default_rng(2)
    menu = random_menu(rng, [4] * 200, 2, ties=False)
    cheapest = [np.minimum.reduceat(row, np.arange(0, 800, 4)).sum() for row in menu.costs]
    # Each limit can be met alone; together they cannot.
    assert solve(menu, np.array([cheapest[0] * 1.01, 1e9])) is not None
    assert solve(menu, np.array(cheapest) * 1.01) is None


@pytest.mark.parametrize("scale", [1e-9, 1.0, 1e12])
def test_units_do_not_matter(scale: float) -> None:
    rng = np.random.default_rng(3)
    menu = random_menu(rng, [3] * 6, 2, ties=False)
    limits = np.array([3.0, 3.0])
    scaled = Menu(
        cell=menu.cell, objective=menu.objective * scale, costs=menu.costs / scale, tie=menu.tie
    )
    best = brute_force(menu, limits)
    found = solve(scaled, limits / scale)
    assert best is not None
    assert found is not None
    assert found.value == pytest.approx(best * scale, rel=1e-9)


def test_among_equals_the_tie_break_decides() -> None:
    menu = Menu(
        cell=np.array([0, 0, 0]),
        objective=np.zeros(3),
        costs=np.zeros((1, 3)),
        tie=np.array([2.0, 1.0, 1.0]),
    )
    found = solve(menu, np.array([1.0]))
    assert found is not None
    assert found.options.tolist() == [1]


@given(seed=st.integers(0, 10**6), sizes=st.lists(st.integers(1, 5), min_size=1, max_size=4))
def test_dominated_agrees_with_the_definition(seed: int, sizes: list[int]) -> None:
    menu = random_menu(np.random.default_rng(seed), sizes, 2, ties=True)
    scores = np.vstack([menu.objective, menu.tie, menu.costs])
    order = [(menu.objective[i], menu.tie[i], i) for i in range(len(menu.cell))]
    expected = [
        any(
            menu.cell[i] == menu.cell[j]
            and (scores[:, j] <= scores[:, i]).all()
            and order[j] < order[i]
            for j in range(len(menu.cell))
        )
        for i in range(len(menu.cell))
    ]
    assert dominated(menu.cell, menu.objective, menu.costs, menu.tie).tolist() == expected
