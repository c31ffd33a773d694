"""The claim put to the test: pieces that measure, and the report that is written from what they measured."""

from prfaas_testbed.claim.pieces import PIECES, measure
from prfaas_testbed.claim.report import write_report

__all__ = ["PIECES", "measure", "write_report"]
