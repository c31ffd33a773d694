from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from prfaas.config.case import CaseConfig, SitesCaseConfig, TableCaseConfig, load_case
from prfaas.model.errors import ConfigError, UsageError

K_CASES = Path(__file__).parents[3] / "topologies" / "cases"


def changed(tmp_path: Path, name: str, *edits: tuple[str, Any]) -> Path:
    """A shipped case with some fields changed; `~` as the value leaves the field out."""
    data = yaml.safe_load((K_CASES / f"{name}.yaml").read_text())
    for field, value in edits:
        here: Any = data
        *path, last = field.split("/")
        for part in path:
            here = here[int(part) if part.isdecimal() else part]
        if value == "~":
            del here[last]
        else:
            here[last] = value
    file = tmp_path / "case.yaml"
    file.write_text(yaml.safe_dump(data))
    return file


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("case_1t_hybrid", CaseConfig),
        ("conversation_trace", CaseConfig),
        ("three_sites", SitesCaseConfig),
        ("kv_throughput", TableCaseConfig),
    ],
)
def test_every_shipped_case_loads_in_its_form(name: str, form: type) -> None:
    assert type(load_case(K_CASES / f"{name}.yaml")) is form


def test_homogeneous_instances_and_published_are_optional(tmp_path: Path) -> None:
    file = changed(tmp_path, "case_1t_hybrid", ("homogeneous_instances", "~"), ("published", "~"))
    case = load_case(file)
    assert isinstance(case, CaseConfig)
    assert case.homogeneous_instances is None
    assert case.published is None


@pytest.mark.parametrize(
    ("field", "value", "where", "problem"),
    [
        ("prfaas/profile/prefill_s", [0.44, 0.72, 0.5, 7.4], "prfaas.profile.prefill_s", "falls from 0.72"),
        ("prfaas/profile/kv_mib", [1, 2, 3, -4], "prfaas.profile.kv_mib.3", "greater than 0"),
        ("prfaas/profile/kv_mib", "~", "prfaas", "its KV is what is sent"),
        ("prfaas/instances", -4, "prfaas.instances", "greater than or equal to 0"),
        ("prfaas/egress_gbps", "fast", "prfaas.egress_gbps", "a number alone"),
        ("prfaas/egress", 3, "prfaas.egress", "known here: chunk_tokens, egress_gbps"),
        ("local/instances", 1, "local.instances", "greater than or equal to 2"),
        ("decode/max_batch", 0, "decode.max_batch", "greater than or equal to 1"),
        ("workload/output_tokens", 0, "workload.output_tokens", "greater than or equal to 1"),
        ("workload/input_tokens", {"distribution": "pareto"}, "workload.input_tokens", "empirical or trace"),
        ("workload/input_tokens/sigma", -1, "workload.input_tokens.sigma", "greater than 0"),
        ("published/naive/throughput", 3, "published.naive.throughput", "unknown field"),
        ("solved_back", ["luck"], "solved_back", "not one of"),
        ("slo", {"rate_rps": 1, "ttft_s": 1, "quantile": 1.5}, "slo.quantile", "less than 1"),
    ],
)
def test_a_wrong_case_is_refused_by_field(
    tmp_path: Path, field: str, value: object, where: str, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        load_case(changed(tmp_path, "case_1t_hybrid", (field, value)))
    assert caught.value.field == where


@pytest.mark.parametrize(
    ("name", "field", "value", "problem"),
    [
        ("three_sites", "links/0/source", "nowhere", "'nowhere' is no PrfaaS cluster"),
        ("three_sites", "links/0/target", "north", "'north' is no local cluster"),
        ("three_sites", "links/0/source", "south", "two links lead from south to east"),
        ("three_sites", "local/0/name", "north", "two clusters are named north"),
        ("three_sites", "local/0/prefill", 8, "leaves none of 8 instances"),
        ("kv_throughput", "models/ring-2.5-1t/gbps", [1, 2], "2 values for 4 lengths"),
        ("kv_throughput", "tokens", [1, 5, 3, 7], "3 follows 5"),
        ("kv_throughput", "published_egress/0/model", "gpt", "names 'gpt'"),
        ("kv_throughput", "published_egress/0/tokens", 1e6, "outside the table"),
    ],
)
def test_names_and_shapes_must_fit(
    tmp_path: Path, name: str, field: str, value: object, problem: str
) -> None:
    with pytest.raises(ConfigError, match=problem):
        load_case(changed(tmp_path, name, (field, value)))


def test_reuse_needs_a_trace_that_tells_prefixes(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="reuse must be none"):
        load_case(changed(tmp_path, "conversation_trace", ("workload/input_tokens/format", "azure")))


def test_no_file_and_no_mapping(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such file"):
        load_case(tmp_path / "none.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_case(tmp_path / "list.yaml")
