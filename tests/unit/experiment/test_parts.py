"""Some parts of a set, chosen by name."""

from __future__ import annotations

import pytest

from prfaas.config.experiment import load_experiment
from prfaas.model.errors import UsageError
from prfaas_testbed.cli.run import with_parts
from prfaas_testbed.experiment.machine import K_TOPOLOGIES


def test_parts_are_chosen_by_globs_in_the_file_s_order() -> None:
    matrix = load_experiment("matrix", K_TOPOLOGIES)
    chosen = with_parts(matrix, "transpacific-cut,metro-*")
    names = [part.name for part in chosen.parts]
    assert names[-1] == "transpacific-cut"
    assert len(names) == 13
    assert all(name.startswith("metro-") for name in names[:-1])


def test_a_glob_that_matches_nothing_is_an_error_that_names_the_parts() -> None:
    matrix = load_experiment("matrix", K_TOPOLOGIES)
    with pytest.raises(UsageError, match=r"--parts mars-.*no part of matrix matches.*metro-cut"):
        with_parts(matrix, "metro-*,mars-*")


def test_a_single_experiment_has_no_parts() -> None:
    with pytest.raises(UsageError, match="hello is a single experiment"):
        with_parts(load_experiment("hello", K_TOPOLOGIES), "x")
