from __future__ import annotations

from pathlib import Path

import pytest

from prfaas.config.case import CaseConfig, load_case
from prfaas.config.lengths import lengths_of
from prfaas.planner.build import system_of
from prfaas.planner.system import System

K_CASES = Path(__file__).parents[3] / "topologies" / "cases"


@pytest.fixture(scope="session")
def case() -> CaseConfig:
    """The report's 1T case, as shipped."""
    loaded = load_case(K_CASES / "case_1t_hybrid.yaml")
    assert isinstance(loaded, CaseConfig)
    return loaded


@pytest.fixture(scope="session")
def system(case: CaseConfig) -> System:
    config = case.workload.input_tokens
    assert not isinstance(config, int)
    assert config.distribution != "trace"
    return system_of(case, lengths_of(config))
