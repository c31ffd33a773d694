"""What is wrong with an experiment is said before anything is started."""

from __future__ import annotations

from pathlib import Path

import pytest

from prfaas.model.errors import ConfigError
from prfaas_testbed.claim.runs import parts
from prfaas_testbed.experiment.before import check_before
from prfaas_testbed.experiment.machine import K_TOPOLOGIES


def test_profiles_that_disagree_on_a_requests_size_are_refused(tmp_path: Path) -> None:
    experiment = dict(parts("claim-testbed"))["paper-0.9"]
    check_before(experiment, "here")
    text = (K_TOPOLOGIES / "profiles" / "1t-hybrid-h20-half.yaml").read_text()
    other = tmp_path / "other.yaml"
    other.write_text(text.replace("170.480664062", "170.48"))
    far, near, decode = experiment.instances
    near = near.model_copy(update={"profile": str(other)})
    changed = experiment.model_copy(update={"instances": [far, near, decode]})
    with pytest.raises(ConfigError, match=r"KV of \d+ tokens is \d+ bytes by one"):
        check_before(changed, "here")
