"""A profiled instance against the real server that it was profiled from, six prompts of mixed length at once.

Both are measured side by side, in turns; what is held is the ratio of quantiles.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from prfaas.config.loading import check
from prfaas.config.profile import ProfileConfig
from prfaas_testbed.experiment.likeness import K_ROUNDS
from prfaas_testbed.experiment.profiling import measure
from prfaas_testbed.instances.models import K_MODELS

K_WITHIN = 0.10


@pytest.mark.timeout(600)
@pytest.mark.skipif(
    not os.environ.get("PRFAAS_LONG_TESTS"), reason="measures a server for minutes: set PRFAAS_LONG_TESTS=1"
)
def test_first_tokens_come_when_the_real_server_s_do(tmp_path: Path) -> None:
    found = measure(K_MODELS["dense"], "measured", tmp_path / "server.log", sys.stderr.write)
    check(found.profile, ProfileConfig, "measured")
    assert found.likeness is not None
    assert len(found.likeness.real_ttft_s) == K_ROUNDS
    for what, ratio in found.likeness.ratios().items():
        assert 1 - K_WITHIN <= ratio <= 1 + K_WITHIN, (what, found.likeness)
