"""The bench's cells, layouts and links: pure."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.model.errors import UsageError
from prfaas_testbed.bench.cell import NAMED_CELLS, Cell, Loss, choose, full_matrix
from prfaas_testbed.bench.latency import ideal_s
from prfaas_testbed.bench.layout import Layout
from prfaas_testbed.bench.places import change_for, gilbert_elliott, topology_for


@pytest.mark.parametrize(
    ("text", "fraction", "burst"),
    [("0", 0, 1), ("0.5%", 0.005, 1), ("0.005", 0.005, 1), ("1%:burst=8", 0.01, 8), (" 1e-3 ", 0.001, 1)],
)
def test_loss_is_read_as_people_write_it(text: str, fraction: float, burst: float) -> None:
    loss = Loss.parse(text)
    assert loss.fraction == pytest.approx(fraction)
    assert loss.burst_packets == burst


@pytest.mark.parametrize("text", ["", "x", "-1%", "40%", "1%:burst=0", "1%:burst=", "nan"])
def test_loss_that_means_nothing_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="loss"):
        Loss.parse(text)


@given(st.floats(1e-5, 0.3), st.floats(1.01, 1000))
def test_a_bursty_chain_loses_the_share_asked_for_in_the_mean(fraction: float, burst: float) -> None:
    chain = gilbert_elliott(Loss(fraction, burst))
    bad = chain.enter_percent / (chain.enter_percent + chain.leave_percent)
    assert bad == pytest.approx(fraction, rel=1e-6)
    assert 100 / chain.leave_percent == pytest.approx(burst, rel=1e-6)


@pytest.mark.parametrize(
    "fields",
    [
        {"rtt_ms": -1},
        {"rate_mbps": 0},
        {"segment_bytes": 0},
        {"streams": 0},
        {"streams": 129},
        {"congestion_control": "vegas"},
        {"segment_bytes": 4096, "total_bytes": 100},
    ],
)
def test_a_cell_that_cannot_be_is_refused(fields: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Cell(**fields)  # type: ignore[arg-type]


def test_eight_cells_have_names_and_the_matrix_covers_every_combination_once() -> None:
    assert len(NAMED_CELLS) == 8
    cells = full_matrix()
    seen = {(c.rtt_ms, c.rate_mbps, c.loss, c.congestion_control) for c in cells}
    assert len(cells) == len(seen) == 4 * 4 * 2 * 2


@pytest.mark.parametrize("cell", list(NAMED_CELLS.values()), ids=list(NAMED_CELLS))
def test_the_network_of_a_cell_is_the_cells_both_ways(cell: Cell) -> None:
    for state in topology_for(cell).directed().values():
        assert state.delay_ms * 2 == cell.rtt_ms
        assert state.rate_mbps == cell.rate_mbps
        assert state.mean_loss == pytest.approx(cell.loss.fraction)


def test_any_cell_can_follow_any_other_on_the_same_link() -> None:
    cells = list(NAMED_CELLS.values())
    state = next(iter(topology_for(cells[0]).directed().values()))
    for cell in [*cells, *reversed(cells)]:
        state = state.changed(change_for(cell))
        assert state.mean_loss == pytest.approx(cell.loss.fraction)
        assert state.rate_mbps == cell.rate_mbps


@given(st.integers(512, 1 << 20), st.integers(1, 256), st.booleans())
def test_segments_never_overlap_and_stay_in_the_pool(size: int, count: int, contiguous: bool) -> None:
    layout = Layout.of(Cell(segment_bytes=size, total_bytes=size * count, contiguous=contiguous))
    places = sorted(layout.offsets)
    assert len(places) == count
    assert all(b - a >= size for a, b in itertools.pairwise(places))
    assert places[-1] + size <= layout.pool_bytes


def test_a_pool_is_bounded_but_one_call_gets_all_its_segments() -> None:
    large = Cell(segment_bytes=4096, total_bytes=1 << 40)
    assert Layout.of(large).pool_bytes <= 512 << 20
    many = Cell(segment_bytes=4096, total_bytes=4096 * 100_000, one_call=True)
    assert Layout.of(many).segments == 100_000


def test_the_ideal_time_is_a_round_trip_and_the_bytes_own() -> None:
    cell = Cell(rtt_ms=40, rate_mbps=200)
    # 200 Mbit/s of frames carry 200 x 1448/1514 of payload; 1 MB takes 41.8 ms of that.
    assert ideal_s(1_000_000, cell) == pytest.approx(0.040 + 8 / (200 * 1448 / 1514), rel=1e-9)


def test_cells_are_chosen_by_name_by_pattern_and_all_together_and_unknown_ones_are_refused() -> None:
    assert choose("wan-loss") == [NAMED_CELLS["wan-loss"]]
    assert len(choose("named")) == 8
    assert len(choose("matrix")) == 64
    some = choose("150ms-*-1%-*,wan-clean")
    assert [cell.label() for cell in some[:-1]] == [
        f"150ms-{rate}mbit-1%-{control}" for rate in (100, 200) for control in ("cubic", "bbr")
    ]
    assert some[-1].name == "wan-clean"
    with pytest.raises(UsageError, match="wam"):
        choose("wan-clean,wam")


@pytest.mark.parametrize("field", ["streams", "segment_bytes", "total_bytes"])
def test_a_number_beyond_any_float_is_refused_like_any_other_that_is_too_large(field: str) -> None:
    with pytest.raises(UsageError, match=rf"{field.replace('_', '-')}: found 9+; .* are allowed"):
        Cell(**{field: int("9" * 400)})
