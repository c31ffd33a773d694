"""Traces and distributions to timed requests: seeded, pure."""

from prfaas.workload.generate import Workload, timed_requests
from prfaas.workload.prompts import prompt_token_ids
from prfaas.workload.rates import scaled_rate
from prfaas.workload.requests import TimedRequest
from prfaas.workload.reuse import Reuse, reuse_of, uncached_tokens

__all__ = [
    "Reuse",
    "TimedRequest",
    "Workload",
    "prompt_token_ids",
    "reuse_of",
    "scaled_rate",
    "timed_requests",
    "uncached_tokens",
]
