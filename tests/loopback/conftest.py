"""What several packages' tests hold pages to."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable

import pytest

K_SHORT_UNITS = frozenset(["s", "ms", "us", "ns", "sec", "h", "b", "kb", "mb", "gb", "tb", "pb"])
"""Of promlint's list of abbreviations, those that can end a name of ours."""


def _faults(page: str) -> list[str]:
    """What `promtool check metrics` would say of it, and two things of our own: each help text is a sentence,
    and no two metrics have the same.
    """
    kinds = dict(re.findall(r"^# TYPE (\S+) (\S+)$", page, re.M))
    helps = dict(re.findall(r"^# HELP (\S+) (.*)$", page, re.M))
    found = [f"{name}: no help" for name in kinds if not helps.get(name)]
    # The client library's own, beside each counter and histogram.
    ours = {name: kind for name, kind in kinds.items() if not name.endswith("_created")}
    for name, kind in ours.items():
        if (kind == "counter") is not name.endswith("_total"):
            found.append(f"{name}: a {kind}")
        if set(name.split("_")) & K_SHORT_UNITS:
            found.append(f"{name}: a unit abbreviated")
        if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or kind in name.split("_"):
            found.append(f"{name}: not a name of a metric's")
        if not helps[name].rstrip().endswith("."):
            found.append(f"{name}: help without an end: {helps[name]!r}")
    said = collections.Counter(helps[name] for name in ours)
    found += [f"said of {n} metrics: {text!r}" for text, n in said.items() if n > 1]
    series = [line.rpartition(" ")[0] for line in page.splitlines() if line and line[0] != "#"]
    found += [f"twice: {name}" for name, n in collections.Counter(series).items() if n > 1]
    return found


@pytest.fixture
def metric_faults() -> Callable[[str], list[str]]:
    return _faults
