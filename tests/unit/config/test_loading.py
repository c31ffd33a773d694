"""Files that aren't what they should be: one clear error each, whatever is in them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from prfaas.config.loading import check, load, read_yaml
from prfaas.config.profile import ProfileConfig
from prfaas.config.router import RouterConfig
from prfaas.config.timeline import Flap
from prfaas.config.topology import Topology
from prfaas.model.errors import ConfigError, UsageError

K_BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join(['*' + before] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("models: [\n", r"line 2, column 1: found 'models: \['; no YAML: expected the node content"),
        ("home: west\nmodels: 1\nhome: east\n", "line 3, column 1: found \"'home' a second time\""),
        ("policy: {name: a, name: b}\n", "expected each field once"),
        ("home: 2026-13-45\n", "month must be in 1..12"),
        ("home: !!float\n", "the file: found .*; expected YAML"),
        ("home: !!bool x\n", "the file: found .*; expected YAML"),
        ("home: !!timestamp x\n", "the file: found .*; expected YAML"),
        ("home: " + "[" * 1500 + "]" * 1500, "nested too deeply"),
        ("home: &a [*a]\n", "models: found None; this field is required"),
        (K_BOMB + "home: *i\n", "unknown field|this field is required"),
        ("models: " + "y" * 100_000, r"models: found 'y{197}\.\.\.'"),
        ("- a\n", "found 'a list'; expected a mapping of fields"),
        ("", "expected a mapping of fields"),
    ],
)
def test_a_bad_file_is_told_in_a_short_line(text: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=says) as caught:
        load(path, RouterConfig)
    assert str(caught.value).startswith(f"{path}: ")
    assert len(str(caught.value)) < len(str(path)) + 1500


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"sites": {"a": 1}}, "sites.a: found 1; expected a mapping"),
        ({"sites": ["a"]}, r"sites: found \['a'\]; expected a mapping"),
        ({"hubs": {"h": {}}}, r"hubs: found {'h': {}}; expected a list"),
        ({"name": 1}, "name: found 1; expected text"),
        ({"sites": {"a": {}}}, r"sites: found {'a': {}}; expected at least 2"),
    ],
)
def test_a_value_of_another_kind_is_told_in_yaml_s_words(fields: dict[str, object], says: str) -> None:
    whole = {"name": "n", "text": "t", "sites": {"a": {}, "b": {}}, "links": [], **fields}
    with pytest.raises(ConfigError, match=says):
        check(whole, Topology, "f.yaml")


def test_a_field_like_no_other_is_told_without_a_guess() -> None:
    with pytest.raises(ConfigError, match="unknown field; known here"):
        check({"do": "flap", "at_s": 1, "rate_mbps": 10}, Flap, "f.yaml")


def test_an_object_that_aliases_make_huge_is_not_written_out(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(K_BOMB.replace("i: &i", "name: &i"))
    with pytest.raises(ConfigError) as caught:
        load(path, ProfileConfig)
    assert len(str(caught.value)) < len(str(path)) + 1500


def test_fields_that_replace_what_an_anchor_brought_are_no_repeats(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_text("base: &b {x: 1, y: 2}\nnext: &n {<<: *b, y: 3}\nlast: {<<: *n, x: 4}\n")
    assert read_yaml(path) == {
        "base": {"x": 1, "y": 2}, "next": {"x": 1, "y": 3}, "last": {"x": 4, "y": 3},
    }  # fmt: skip


K_NET = """
name: f
text: two sites
sites: {a: {}, b: {}}
links: [{between: [a, b], delay_ms: 1, rate_mbps: 10}]
"""


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ("delay_ms: 1", "delay: 1", "links.0.delay: found 1; unknown field, perhaps delay_ms; known here: "),
        ("rate_mbps: 10", "rate_gbps: 1", "unknown field, perhaps rate_mbps; known here: "),
        ("rate_mbps: 10", "x: 1", "unknown field; known here: between, .* from, .* to$"),
        ("rate_mbps: 10", "rate_mbps: 10Mbit", "found '10Mbit'; expected a number alone: the unit is in the"),
        ("text: two", "txt: two", "f.yaml: txt: found 'two sites'; unknown field, perhaps text; "),
        ("b: {}", "the b: {}", "sites.the b: found 'the b'; a site's or hub's name: a letter, then up to 9"),
    ],
)
def test_a_field_that_is_misspelt_is_told_with_the_one_that_was_meant(
    before: str, after: str, says: str, tmp_path: Path
) -> None:
    path = tmp_path / "f.yaml"
    path.write_text(K_NET.replace(before, after))
    with pytest.raises(ConfigError, match=says):
        load(path, Topology)


def test_a_links_name_is_told_with_its_form() -> None:
    flap = {"do": "flap", "at_s": 1, "link": "a-b", "on_s": 1, "off_s": 1, "times": 1}
    with pytest.raises(ConfigError, match=r"link: found 'a-b'; expected a->b, or a<->b for both"):
        check(flap, Flap, "f.yaml")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.one_of(st.binary(max_size=200), st.text("[]{}:&*!|>-,'\"#% \n0ax.~?", max_size=80).map(str.encode)))
def test_any_bytes_are_a_file_or_a_told_error(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(data)
    with pytest.raises(UsageError):
        load(path, RouterConfig)


def test_a_file_without_an_end_is_refused_and_a_pipe_is_read() -> None:
    with pytest.raises(UsageError, match="/dev/zero: longer than 16 MiB"):
        read_yaml("/dev/zero")
    ours, theirs = os.pipe()
    os.write(theirs, b"site: east")
    os.close(theirs)
    try:
        assert read_yaml(f"/dev/fd/{ours}") == {"site": "east"}
    finally:
        os.close(ours)
