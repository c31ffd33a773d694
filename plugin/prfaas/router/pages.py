"""What operators and tools read: health, last decisions, models."""

from __future__ import annotations

import time
from typing import Any

import msgspec
from aiohttp import web

from prfaas.config.router import RouterConfig
from prfaas.model.decisions import Decision, PathPrediction
from prfaas.router.errors import BadRequest
from prfaas.router.fleet import ServerPool
from prfaas.router.links import LinkBook
from prfaas.router.scheduler import Scheduler
from prfaas.router.ticket import Record

K_PAGE = 100
K_MAX_PAGE = 10_000


def as_json(value: object, status: int = 200) -> web.Response:
    return web.Response(status=status, body=msgspec.json.encode(value), content_type="application/json")


def models_page(config: RouterConfig, started_s: float) -> dict[str, object]:
    """OpenAI's list of models."""
    return {
        "object": "list",
        "data": [model_page(config, model.name, started_s) for model in config.models],
    }


def model_page(config: RouterConfig, name: str, started_s: float) -> dict[str, object]:
    """Raises BadRequest with 404."""
    for model in config.models:
        if name == model.name or name in model.aliases:
            return {
                "id": model.name,
                "object": "model",
                "created": int(started_s),
                "owned_by": "prfaas",
                "root": model.name,
                "max_model_len": model.max_prompt_tokens or config.limits.max_prompt_tokens,
            }
    raise BadRequest(f"The model {name[:128]!r} does not exist.", status=404, code="model_not_found")


def health_page(
    config: RouterConfig, servers: ServerPool, links: LinkBook, now: float
) -> tuple[bool, dict[str, Any]]:
    """Whether each model has a path, and the state of everything."""
    up = {handle.name: handle.up(now) for handle in servers}
    # Requests are tried from the first moment on; a balancer is told to send them once servers have answered.
    heard = {handle.name for handle in servers if handle.reported.at_s >= 0}
    models = {}
    for model in config.models:
        able = [one for one in servers if up[one.name] and one.name in heard and one.serves(model.name)]
        roles = {one.role.value for one in able}
        models[model.name] = "collocated" in roles or {"prefill", "decode"} <= roles
    estimates = links.estimates(now)
    healthy = all(models.values())
    return healthy, {
        "status": "ok" if healthy else "no path",
        "models": models,
        "servers": {
            handle.name: {
                "site": handle.site,
                "role": handle.role,
                "up": up[handle.name],
                "draining": handle.draining,
                "in_flight": handle.in_flight,
                "chunk_tokens": handle.chunk_tokens,
                "prefill_requests": handle.prefill_requests,
                "load_age_s": None
                if handle.reported.at_s < 0
                else round(max(0.0, now - handle.reported.at_s), 3),
            }
            for handle in servers
        },
        "links": {
            str(link): {"up": found.up, "rate_bps": found.rate_bps, "backlog_bytes": found.backlog_bytes}
            for link, found in estimates.items()
        },
    }


def path_row(path: PathPrediction) -> dict[str, object]:
    return {
        "path": path.label,
        "decode_site": path.decode_site,
        "ttft_s": path.ttft_s,
        "queue_s": path.queue_s,
        "prefill_s": path.prefill_s,
        "tail_s": path.tail_s,
        "move_s": path.move_s,
        "uncached_tokens": path.uncached_tokens,
        "transfer_bytes": path.transfer_bytes,
        "price": path.price,
        "feasible": path.feasible,
        "why_not": path.why_not,
    }


def record_row(record: Record) -> dict[str, object]:
    """One decision, flat but for its alternatives. Infinities become null: JSON has none."""
    decision: Decision = record.decision
    threshold = decision.threshold_tokens
    return {
        "event": "decision",
        "at_s": record.at_s,
        "request": record.request,
        "model": record.model,
        "tenant": record.tenant,
        "class": record.slo_class,
        "attempt": record.attempt,
        "policy": decision.policy,
        "action": decision.action,
        "site": decision.prefill_site,
        "reason": decision.reason,
        "prefill": record.prefill,
        "decode": record.decode,
        "prompt_tokens": record.prompt_tokens,
        "cached_tokens": record.cached_tokens,
        "threshold_tokens": threshold,
        "predicted_ttft_s": decision.predicted_ttft_s,
        "chosen": path_row(decision.chosen) if decision.chosen else None,
        "alternatives": [path_row(path) for path in decision.alternatives],
    }


def decisions_page(scheduler: Scheduler, query: Any) -> dict[str, object]:
    """The last decisions, newest first. Filters: site, tenant, model, request, action, policy, reason (a part
    of it), min_tokens, since (seconds of the wall clock), limit. Raises BadRequest for others."""
    text = {name: query[name] for name in query}
    known = {"site", "tenant", "model", "request", "action", "policy", "reason", "prefill", "decode"}
    numbers = {"limit": float(K_PAGE), "since": 0.0, "min_tokens": 0.0}
    for name in text.keys() & numbers.keys():
        try:
            numbers[name] = float(text.pop(name))
        except ValueError:
            raise BadRequest(f"{name}: expected a number", param=name) from None
    unknown = text.keys() - known
    if unknown:
        raise BadRequest(
            f"Unknown filter {sorted(unknown)[0]!r}; known: {', '.join(sorted(known | numbers.keys()))}"
        )
    limit = int(min(max(numbers["limit"], 0), K_MAX_PAGE)) if numbers["limit"] == numbers["limit"] else 0
    rows: list[dict[str, object]] = []
    for record in reversed(scheduler.records):
        if len(rows) >= limit:
            break
        if record.at_s < numbers["since"] or record.prompt_tokens < numbers["min_tokens"]:
            continue
        row = record_row(record)
        if all(
            wanted in str(row[name]) if name == "reason" else wanted == str(row[name])
            for name, wanted in text.items()
        ):
            rows.append(row)
    return {"decisions": rows, "kept": len(scheduler.records), "now_s": time.time()}
