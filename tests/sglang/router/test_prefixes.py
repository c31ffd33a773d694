"""What the prefix index promises, beside what prefill servers then reuse, while their caches overflow."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from prfaas_testbed.experiment import prefixes
from prfaas_testbed.instances.models import K_MODELS


@pytest.mark.timeout(900)
@pytest.mark.skipif(not os.environ.get("PRFAAS_LONG_TESTS"), reason="minutes: set PRFAAS_LONG_TESTS=1")
@pytest.mark.parametrize("model", ["dense", "hybrid"])
def test_predictions_hold_over_conversations_that_overflow_the_cache(model: str, tmp_path: Path) -> None:
    found = prefixes.measure(K_MODELS[model], tmp_path, logging.getLogger(__name__).info)
    judged = prefixes.checks([found])
    wrong = [row for row in found.rows if row["predicted"] != row["actual"]]
    assert all(row["outcome"] == "passed" for row in judged), (judged, wrong)
