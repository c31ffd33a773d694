"""Work spread over processes: results in order, and whatever goes wrong there as one line here."""

from __future__ import annotations

import math
import pickle
from pathlib import Path

import pytest

from prfaas.config.profile import load_profile
from prfaas.model.errors import MachineError, PrfaasError, UsageError
from prfaas.simulator.sweep import _ByFile, _Elsewhere, spread

K_TROUBLES = {"usage": UsageError, "machine": MachineError, "ours": ZeroDivisionError}


def worked(item: str) -> str:
    raise K_TROUBLES[item](f"{item} trouble")


def test_results_come_in_the_order_of_what_was_asked_up_to_what_goes_wrong() -> None:
    found = spread(math.factorial, [5, 0, 3, -1], workers=2)
    assert [next(found) for _ in range(3)] == [120, 1, 6]
    with pytest.raises(PrfaasError) as caught:
        next(found)
    assert str(caught.value).startswith("-1: a fault of ours: ValueError: ")
    assert "\n" not in str(caught.value)


def test_a_file_that_is_wrong_is_told_as_it_is_here() -> None:
    with pytest.raises(UsageError, match=r"^nowhere.yaml: no such file$"):
        list(spread(load_profile, ["nowhere.yaml", "nowhere.yaml"], workers=2))


@pytest.mark.parametrize(
    ("item", "kind", "status", "line"),
    [
        ("usage", UsageError, 2, "usage trouble"),
        ("machine", PrfaasError, 3, "machine trouble"),
        ("ours", PrfaasError, 1, "ours: a fault of ours: ZeroDivisionError: ours trouble"),
    ],
)
def test_what_goes_wrong_keeps_its_line_and_status_on_its_way(item, kind, status, line) -> None:
    error = pickle.loads(pickle.dumps(_Elsewhere(worked)(item)))
    assert isinstance(error, kind)
    assert str(error) == line
    assert error.exit_status == status
    assert ("Traceback" in "".join(getattr(error, "__notes__", []))) == (item == "ours")


def test_a_result_that_can_t_be_kept_is_told(tmp_path: Path) -> None:
    found = _ByFile(math.factorial, tmp_path / "gone")((0, 3))
    assert isinstance(found, PrfaasError)
    assert str(found) == f"{tmp_path}/gone/0: a run's result can't be kept there: No such file or directory"
