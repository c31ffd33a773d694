from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

TOPOLOGIES = Path(__file__).parents[3] / "topologies"


@pytest.fixture(scope="session")
def hello() -> Callable[[Path], dict[str, Any]]:
    """The first experiment as a map, for a machine that is as busy as it likes: its links carry no more than
    that can keep up with, and what the emulator held up counts. What is tested so may time nothing."""

    def make(folder: Path) -> dict[str, Any]:
        network = yaml.safe_load((TOPOLOGIES / "networks" / "hello.yaml").read_text())
        network["links"][0]["rate_mbps"] = 40
        path = folder / "hello.yaml"
        path.write_text(yaml.safe_dump(network))
        data = yaml.safe_load((TOPOLOGIES / "experiments" / "hello.yaml").read_text())
        return {**data, "network": str(path), "spoilt": "keep"}

    return make
