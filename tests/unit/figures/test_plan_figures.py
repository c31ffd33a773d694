from __future__ import annotations

import csv
from pathlib import Path

import pytest

from prfaas.config.case import CaseConfig, SitesCaseConfig, TableCaseConfig, load_case
from prfaas.config.lengths import lengths_of
from prfaas.figures import new_figure, numbered, save, series, style
from prfaas.figures.plan import draw_plan
from prfaas.planner import report, sites_report, table_report

K_CASES = Path(__file__).parents[3] / "topologies" / "cases"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def is_drawn(folder: Path, names: set[str]) -> None:
    assert {path.name for path in folder.iterdir()} == {
        f"{name}.{kind}" for name in names for kind in ("png", "svg", "csv")
    }
    for name in names:
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (folder / f"{name}.svg").read_text()
        assert rows(folder / f"{name}.csv")


@pytest.fixture(autouse=True)
def _coarse(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fifth of the pixels: what is tested is that figures are drawn."""
    monkeypatch.setattr(style, "K_DPI", 60)


@pytest.mark.timeout(60)  # five figures; matplotlib is slow on a busy machine
def test_a_plan_is_drawn_with_the_numbers_beside_it(tmp_path: Path) -> None:
    case = load_case(K_CASES / "case_1t_hybrid.yaml")
    assert isinstance(case, CaseConfig)
    result = report(case, lengths_of(case.workload.input_tokens))  # type: ignore[arg-type]
    paths = draw_plan(result, tmp_path / "new")
    is_drawn(tmp_path / "new", {"optimum", "bandwidth", "baselines", "queues", "sensitivity"})
    assert set(paths) == set((tmp_path / "new").iterdir())
    bars = rows(tmp_path / "new" / "baselines.csv")
    assert [row["system"] for row in bars] == ["collocated", "homogeneous", "naive", "prfaas"]
    assert float(bars[3]["throughput_rps"]) == result["throughput_rps"]
    assert bars[3]["published_rps"] == "3.24"
    assert len(rows(tmp_path / "new" / "bandwidth.csv")) == len(result["curves"]["bandwidth"])


def test_sites_and_tables_are_drawn(tmp_path: Path) -> None:
    sites = load_case(K_CASES / "three_sites.yaml")
    assert isinstance(sites, SitesCaseConfig)
    lengths = [lengths_of(one.workload.input_tokens) for one in sites.local]  # type: ignore[arg-type]
    draw_plan(sites_report(sites, lengths), tmp_path / "sites")
    is_drawn(tmp_path / "sites", {"sites"})
    table = load_case(K_CASES / "kv_throughput.yaml")
    assert isinstance(table, TableCaseConfig)
    draw_plan(table_report(table), tmp_path / "table")
    is_drawn(tmp_path / "table", {"kv_throughput"})


def test_the_same_figure_gives_the_same_files(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        figure, (axes,) = new_figure()
        axes.plot([1, 2], [3, 4], **series("prices").kwargs())
        axes.legend()
        save(figure, tmp_path / folder, "one", ["x", "y"], [[1, 3], [2, None]])
    for kind in ("png", "svg", "csv"):
        a, b = ((tmp_path / folder / f"one.{kind}").read_bytes() for folder in ("a", "b"))
        assert a == b
    assert (tmp_path / "a" / "one.csv").read_text().splitlines() == ["x,y", "1,3", "2,"]


@pytest.mark.parametrize("name", ["collocated", "homogeneous", "naive", "paper", "prices", "mooncake"])
def test_named_series_look_alike_everywhere_and_unlike_one_another(name: str) -> None:
    assert series(name) == series(name)
    assert series(name).label != name or name == "prfaas"
    assert series(name).kwargs(markers=False, label="x")["marker"] == ""


def test_unnamed_series_get_a_look_too() -> None:
    assert series("something else").label == "something else"
    assert numbered(0, "a").colour != numbered(1, "b").colour
    assert numbered(9, "a").colour == numbered(1, "a").colour
