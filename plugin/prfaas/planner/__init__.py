"""Throughput model, optimum and capacity plans: pure functions of a case."""

from prfaas.planner.capacity import Impossible, Slo
from prfaas.planner.report import report, sites_report, table_report
from prfaas.planner.system import Plan, System

__all__ = ["Impossible", "Plan", "Slo", "System", "report", "sites_report", "table_report"]
