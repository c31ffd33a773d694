"""A set of many parts is shown as a grid, cases by networks, with a page a cell."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from prfaas.config.experiment import Experiment, ExperimentSet, load_experiment, parts_of
from prfaas.config.run import CalibrationRow, EventRow, LinkRow, RequestRow, read_run
from prfaas.model.errors import MachineError
from prfaas_testbed.cli.run import with_parts
from prfaas_testbed.experiment.machine import K_TOPOLOGIES
from prfaas_testbed.experiment.runner import Results
from prfaas_testbed.experiment.sets import SetRun
from prfaas_testbed.report import cells
from prfaas_testbed.report.cells import is_grid, trouble
from prfaas_testbed.report.page import draw_run

K_CELLS = "metro-cut,metro-flap,two-sites-cut"


def conduct(name: str, experiment: Experiment, results: Results) -> None:
    """A small made-up run: one cell answers wrongly, one the machine stops."""
    if name == "metro-flap":
        raise MachineError("machine too busy: <void> each time")
    repetition = results.repetition(0)
    for i in range(20):
        row = {
            "id": f"r{i}",
            "model": "toy", "prompt_tokens": 100, "sent_s": 0.3 * i, "ttft_s": 0.2, "e2e_s": 0.3,
            "kv_bytes": 100_000, "output_ids": [i], "source_digest": "d", "landed_digest": "d",
            "transfer": "wan",
            "transfer_start_s": 0.3 * i, "transfer_end_s": 0.3 * i + 0.1,
        }  # fmt: skip
        results.baseline.append(RequestRow.model_validate(row))
        if name == "metro-cut" and i == 3:
            row["output_ids"] = [99]
        repetition.requests.append(RequestRow.model_validate(row))
    for i in range(70):
        link = {"at_s": 0.1 * i, "link": "east->west", "direction": "east->west", "bytes": 1000 * (i % 9),
                "drops": 0, "backlog_bytes": 0, "model": "toy"}  # fmt: skip
        repetition.links.append(LinkRow.model_validate(link))
    for fields in (
        {"at_s": 0.0, "event": "load", "requests": 20},
        {"at_s": 2.0, "event": "cut_stream", "model": "toy"},
    ):
        repetition.events.append(EventRow.model_validate(fields))
    results.calibration.append(
        CalibrationRow(
            link="a", direction="east->west", wanted_rtt_ms=5, measured_rtt_ms=5, wanted_rate_mbps=1,
            measured_rate_mbps=1, wanted_loss=0, measured_loss=0, inside=True,
        )
    )  # fmt: skip


class Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [str(value) for name, value in attrs if name in ("href", "src")]


def links_of(page: str) -> list[str]:
    parser = Links()
    parser.feed(page)
    return parser.found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    matrix = load_experiment("matrix", K_TOPOLOGIES)
    assert isinstance(matrix, ExperimentSet)
    chosen = with_parts(matrix, K_CELLS)
    place = tmp_path_factory.mktemp("grid")
    whole = SetRun(chosen, list(parts_of(chosen, K_TOPOLOGIES)), place, lambda line: None)
    whole.go(conduct)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cells, "K_GRID_PARTS", 2)
        draw_run(place)
    return place


def test_the_page_links_every_cell_and_every_link_leads_somewhere(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    found = [link for link in links_of(page) if link.startswith("cells/")]
    assert len(found) == 3
    for link in found:
        assert (folder / link).is_file()
        for inner in links_of((folder / link).read_text()):
            assert (folder / "cells" / inner).is_file()


def test_a_cell_says_how_it_ended_and_why(folder: Path) -> None:
    page = (folder / "index.html").read_text()
    assert "1 passed, 2 failed of 3 cells" in page
    assert "wrong_answers: 1, wanted &lt;= 0" in page
    assert "ran: machine too busy: &lt;void&gt; each time" in page, "what a run holds is text, not HTML"


def test_a_cell_s_page_is_titled_by_case_and_network_and_holds_its_own_rows(folder: Path) -> None:
    page = (folder / "cells" / "metro-cut.html").read_text()
    assert "<title>matrix: cut over metro" in page
    assert "two-sites" not in page
    assert "scale 200" in page
    assert "scale 1 " in (folder / "cells" / "two-sites-cut.html").read_text()


def test_the_picture_is_of_a_size_that_can_be_looked_at(folder: Path) -> None:
    with Image.open(folder / "page.png") as image:
        assert 600 < image.width < 2000
        assert 200 < image.height < 2500


def test_trouble_is_told_in_words() -> None:
    matrix = load_experiment("matrix", K_TOPOLOGIES)
    assert isinstance(matrix, ExperimentSet)
    told = {
        name: trouble(experiment.model_dump(mode="json", exclude_defaults=True))
        for name, experiment in parts_of(matrix, K_TOPOLOGIES)
    }
    assert told["two-sites-narrow"] == ["set link at 2 s for 4 s: link east<->west, rate mbps 40"]
    assert told["metro-transfer"] == ["nothing: the load alone"]
    assert told["metro-pump-killed"] == ["kill at 3 s: instance decode, what pump, restart after s 0.5"]


def test_only_a_set_of_many_parts_is_a_grid(folder: Path) -> None:
    run = read_run(folder)
    assert not is_grid(run)
    run.model_extra["parts_planned"] = [f"part{i}" for i in range(7)]  # type: ignore[index]
    assert is_grid(run)
