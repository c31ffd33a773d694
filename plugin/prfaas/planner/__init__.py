"""Throughput model, optimum and capacity plans: pure functions of a case."""

from prfaas.planner.capacity import Impossible, Slo
from prfaas.planner.clairvoyant import Bound, Job, Resources, clairvoyant_bound
from prfaas.planner.report import report, sites_report, table_report
from prfaas.planner.system import Plan, System

__all__ = [
    "Bound",
    "Impossible",
    "Job",
    "Plan",
    "Resources",
    "Slo",
    "System",
    "clairvoyant_bound",
    "report",
    "sites_report",
    "table_report",
]
