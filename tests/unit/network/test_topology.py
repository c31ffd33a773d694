from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prfaas.config.loading import check
from prfaas.config.topology import (
    Impairments,
    LinkChange,
    Topology,
    load_topology,
    network_names,
)
from prfaas.model.errors import ConfigError, UsageError


def topology(**changes: object) -> Topology:
    data: dict[str, object] = {
        "name": "try",
        "text": "two sites",
        "sites": {"a": {}, "b": {}},
        "links": [{"between": ["a", "b"], "delay_ms": 20, "rate_mbps": 200}],
    }
    return check({**data, **changes}, Topology, "try.yaml")


def test_the_networks_that_come_with_the_project_load_and_are_the_promised_ones() -> None:
    assert {"hello", "metro", "two-sites", "transpacific", "three-sites", "hub"} <= set(network_names())
    for name in network_names():
        assert load_topology(name).name == name


def test_two_sites_is_40_ms_200_mbit_and_a_tenth_of_a_percent_each_way() -> None:
    links = load_topology("two-sites").emulated()
    assert {(s.delay_ms, s.rate_mbps, s.loss_percent) for s in links.values()} == {(20, 200, 0.1)}
    assert set(links) == {"east->west", "west->east"}


def test_transpacific_differs_by_direction_and_sums_to_150_ms() -> None:
    links = load_topology("transpacific").directed()
    there, back = links["east->west"], links["west->east"]
    assert there.delay_ms + back.delay_ms == 150
    assert there.rate_mbps != back.rate_mbps


def test_hub_shares_one_link_between_two_paths() -> None:
    hub = load_topology("hub")
    shared = set(hub.path("one", "local")) & set(hub.path("two", "local"))
    assert "outer->inner" in shared


def test_scale_divides_rate_and_queue_but_not_delay_or_loss() -> None:
    scaled = topology(
        links=[
            {
                "between": ["a", "b"],
                "delay_ms": 20,
                "rate_mbps": 1000,
                "loss_percent": 1,
                "queue_bytes": 900_000,
            }
        ],
        scale={"factor": 100, "text": "loss recovery is not preserved at all"},
    )
    state = scaled.emulated()["a->b"]
    assert (state.rate_mbps, state.queue_bytes, state.delay_ms, state.loss_percent) == (10, 9000, 20, 1)


def test_sites_do_not_pass_traffic_on() -> None:
    chain = {
        "sites": {"a": {}, "b": {}, "c": {}},
        "links": [{"between": ["a", "b"]}, {"between": ["b", "c"]}],
    }
    with pytest.raises(ConfigError, match="no way from a to c"):
        topology(**chain)


def test_hubs_pass_traffic_on_by_the_least_delay() -> None:
    net = topology(
        hubs=["far", "near"],
        links=[
            {"between": ["a", "far"], "delay_ms": 30},
            {"between": ["far", "b"], "delay_ms": 30},
            {"between": ["a", "near"], "delay_ms": 10},
            {"between": ["near", "b"], "delay_ms": 10},
        ],
    )
    assert net.path("a", "b") == ["a->near", "near->b"]


@pytest.mark.parametrize(
    ("changes", "field", "said"),
    [
        ({"links": [{"between": ["a", "c"]}]}, "the file", "no site or hub 'c'"),
        ({"links": [{"between": ["a", "b"], "delay": 5}]}, "links.0.delay", "unknown field"),
        (
            {"links": [{"between": ["a", "b"], "delay_ms": -1}]},
            "links.0.delay_ms",
            "greater than or equal to 0",
        ),
        (
            {"links": [{"between": ["a", "b"], "loss_percent": 101}]},
            "links.0.loss_percent",
            "less than or equal",
        ),
        ({"links": [{"between": ["a", "a"]}]}, "links.0", "two different nodes"),
        ({"links": [{"from": "a"}]}, "links.0", "either between"),
        ({"links": [{"from": "a", "to": "b"}]}, "the file", "no way back"),
        ({"links": [{"between": ["a", "b"]}, {"between": ["b", "a"]}]}, "the file", "written twice"),
        ({"links": [{"between": ["a", "b"], "reorder_percent": 1}]}, "links.0", "needs a delay_ms"),
        ({"links": [{"between": ["a", "b"], "ecn": True}]}, "links.0", "without a rate_mbps"),
        (
            {"links": [{"between": ["a", "b"], "delay_ms": 1, "jitter_ms": 2}]},
            "links.0",
            "jitter_ms must not exceed",
        ),
        (
            {"links": [{"between": ["a", "b"], "queue_bytes": 9000, "queue_packets": 9}]},
            "links.0",
            "exclude each other",
        ),
        ({"sites": {"East": {}, "b": {}}}, "sites.East", "a letter, then up to 9"),
        ({"sites": {"a": {}}}, "sites", "at least 2"),
        ({"hubs": ["a"]}, "the file", "used twice"),
        ({"subnet": "192.0.2.0/24"}, "subnet", "prefix length 16"),
        ({"scale": {"factor": 10}}, "scale.text", "required"),
    ],
)
def test_a_faulty_file_is_named_by_field_and_reason(
    changes: dict[str, object], field: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        topology(**changes)
    assert caught.value.field == field
    assert said in str(caught.value)
    assert str(caught.value).startswith("try.yaml: ")


def test_an_unknown_topology_names_those_there_are() -> None:
    with pytest.raises(UsageError, match="two-sites"):
        load_topology("nowhere")


def test_a_file_must_carry_its_own_name(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("name: other\ntext: x\nsites: {a: {}, b: {}}\nlinks: [{between: [a, b]}]\n")
    with pytest.raises(ConfigError, match="mine"):
        load_topology(path)


def test_a_change_keeps_what_it_does_not_name() -> None:
    before = Impairments(delay_ms=20, rate_mbps=200, loss_percent=1)
    after = before.changed(LinkChange(rate_mbps=50))
    assert after == before.model_copy(update={"rate_mbps": 50})


def test_random_and_bursty_loss_replace_each_other() -> None:
    bursty = {"enter_percent": 1, "leave_percent": 25}
    state = Impairments(loss_percent=1).changed(LinkChange.model_validate({"bursty_loss": bursty}))
    assert state.loss_percent == 0
    assert state.bursty_loss is not None
    assert state.changed(LinkChange(loss_percent=2)).bursty_loss is None


def test_a_written_null_takes_the_rate_limit_away() -> None:
    state = Impairments(rate_mbps=10).changed(LinkChange.model_validate({"rate_mbps": None}))
    assert state.rate_mbps is None


@pytest.mark.parametrize(
    "data", [{}, {"delay_ms": None}, {"speed": 1}, {"loss_percent": 1, "bursty_loss": {}}]
)
def test_an_empty_or_contradictory_change_is_refused(data: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        check(data, LinkChange, "file.yaml")


def test_a_change_that_contradicts_the_link_is_refused() -> None:
    with pytest.raises(UsageError, match="be made: jitter_ms must not exceed"):
        Impairments(delay_ms=10, jitter_ms=5).changed(LinkChange(delay_ms=1))
    with pytest.raises(UsageError, match="in packets"):
        Impairments(rate_mbps=10, queue_packets=50).changed(LinkChange(queue_bytes=9000))


@given(
    st.floats(0.01, 50),
    st.floats(1, 100),
)
def test_mean_bursty_loss_is_the_time_spent_in_the_bad_state(enter: float, leave: float) -> None:
    state = Impairments.model_validate({"bursty_loss": {"enter_percent": enter, "leave_percent": leave}})
    assert state.mean_loss == pytest.approx(enter / (enter + leave))


@given(
    st.sampled_from(
        [
            {"loss_percent": 2.0}, {"bursty_loss": {"enter_percent": 0.1, "leave_percent": 10}},
            {"rate_mbps": 70.0}, {"rate_mbps": None}, {"queue_bytes": 9_000_000},
            {"down": True, "delay_ms": 30.0},
        ]
    ),
    st.sampled_from(
        [
            {"loss_percent": 0.5}, {"bursty_loss": {"enter_percent": 1, "leave_percent": 20}}, {},
            {"queue_bytes": 7_000_001},
        ]
    ),
    st.sampled_from([1.0, 3.0, 500.0]),
)  # fmt: skip
def test_a_change_for_a_while_leaves_the_link_as_it_was(
    change: dict[str, object], loss: dict[str, object], factor: float
) -> None:
    """As the timeline plays it: states are emulated ones, changes the topology's."""
    made = LinkChange.model_validate(change)
    link = Impairments.model_validate({"delay_ms": 5, "rate_mbps": 100, **loss}).divided(factor)
    there = link.changed(made.divided(factor))
    assert there != link
    back = there.changed(link.undoing(made).divided(1 / factor).divided(factor))
    assert back.rate_mbps == pytest.approx(link.rate_mbps)
    assert back.model_copy(update={"rate_mbps": link.rate_mbps}) == link
