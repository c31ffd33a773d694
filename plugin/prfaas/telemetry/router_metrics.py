"""The router's figures for Prometheus. Names are an interface: they don't change."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from prfaas.telemetry.package import K_PACKAGE_VERSION

K_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
K_MILLIS = (0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
K_TOKENS = (64, 256, 512, 1024, 4096, 16384, 65536, 262144, 1048576)


class RouterMetrics:
    """One registry a router, so that several can live in one process."""

    content_type = CONTENT_TYPE_LATEST

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        about = Gauge("prfaas_router_info", "Which router this is; always 1.", ["version"], registry=registry)
        about.labels(K_PACKAGE_VERSION).set(1)
        self.requests = Counter(
            "prfaas_router_requests",
            "Requests answered, by endpoint and HTTP status (499: the client left).",
            ["endpoint", "status"],
            registry=registry,
        )
        self.decisions = Counter(
            "prfaas_router_decisions",
            "Decisions, by policy, action and prefill site.",
            ["policy", "action", "site"],
            registry=registry,
        )
        self.attempts_failed = Counter(
            "prfaas_router_attempts_failed",
            "Attempts without a token, by site, side and kind.",
            ["site", "side", "kind"],
            registry=registry,
        )
        self.broken_streams = Counter(
            "prfaas_router_broken_streams",
            "Streams that ended after their first token with an error event, by cause.",
            ["cause"],
            registry=registry,
        )
        self.refused_input = Counter(
            "prfaas_router_refused_input",
            "Input refused without harm: bodies of clients, loads and KV events of servers, link status.",
            ["source", "cause"],
            registry=registry,
        )
        self.in_flight = Gauge("prfaas_router_in_flight", "Requests being served.", registry=registry)
        self.held = Gauge("prfaas_router_held", "Requests that the policy keeps waiting.", registry=registry)
        self.ttft = Histogram(
            "prfaas_router_ttft_seconds",
            "From the request's arrival to its first token, by prefill site.",
            ["site"],
            buckets=K_SECONDS,
            registry=registry,
        )
        self.e2e = Histogram(
            "prfaas_router_e2e_seconds",
            "From the request's arrival to the end of its answer.",
            ["site"],
            buckets=K_SECONDS,
            registry=registry,
        )
        self.overhead = Histogram(
            "prfaas_router_overhead_seconds",
            "From the body's arrival to its dispatch, less what it was held: reading, tokenising, deciding.",
            buckets=K_MILLIS,
            registry=registry,
        )
        self.held_s = Histogram(
            "prfaas_router_held_seconds",
            "What the policy kept a request at the door for before it was first sent, of those that it kept.",
            buckets=K_SECONDS,
            registry=registry,
        )
        self.decide = Histogram(
            "prfaas_router_decide_seconds",
            "Time of one decision, its snapshot included.",
            buckets=K_MILLIS,
            registry=registry,
        )
        self.prompt_tokens = Histogram(
            "prfaas_router_prompt_tokens", "Prompt lengths.", buckets=K_TOKENS, registry=registry
        )
        self.cached_prediction = Counter(
            "prfaas_router_cached_tokens_predictions",
            "Prefix predictions compared with what prefill reported: equal or not.",
            ["outcome"],
            registry=registry,
        )
        self.cache_moves = Counter(
            "prfaas_router_cache_moves",
            "Prefixes brought from one site's prefill cache to another's before a prompt, by outcome.",
            ["source", "target", "outcome"],
            registry=registry,
        )
        self.cache_move_seconds = Histogram(
            "prfaas_router_cache_move_seconds",
            "Time that bringing a prefix took before its prompt was sent.",
            buckets=K_SECONDS,
            registry=registry,
        )
        self.server_up = Gauge(
            "prfaas_router_server_up",
            "1 while a server is used.",
            ["server", "site", "role"],
            registry=registry,
        )
        self.server_in_flight = Gauge(
            "prfaas_router_server_in_flight",
            "This router's unanswered requests on a server.",
            ["server"],
            registry=registry,
        )
        self.link_up = Gauge(
            "prfaas_router_link_up", "1 while a link is believed up.", ["link"], registry=registry
        )
        self.link_rate = Gauge(
            "prfaas_router_link_rate_bps", "Believed rate of a link.", ["link"], registry=registry
        )
        self.policy_figures = Gauge(
            "prfaas_router_policy",
            "The policy's inner figures, as its own page names them.",
            ["figure"],
            registry=registry,
        )
        self.reloads = Counter(
            "prfaas_router_reloads", "Configuration reloads, by outcome.", ["outcome"], registry=registry
        )
        self.kv_gaps = Counter(
            "prfaas_router_kv_event_gaps",
            "Gaps in KV event streams, by how they were closed.",
            ["server", "closed_by"],
            registry=registry,
        )
        self.kv_events = Counter(
            "prfaas_router_kv_event_batches", "KV event batches taken in.", ["server"], registry=registry
        )
        self.conversions = Counter(
            "prfaas_router_conversions",
            "Changes of a server's role, by site, new role and outcome.",
            ["site", "role", "outcome"],
            registry=registry,
        )
        self.conversion_seconds = Gauge(
            "prfaas_router_conversion_seconds",
            "The last change of a role, from its drain to its end.",
            registry=registry,
        )
        self.planned_threshold = Gauge(
            "prfaas_router_planned_threshold_tokens",
            "The slow loop's threshold for the roles of now, by site that decodes.",
            ["site"],
            registry=registry,
        )
        self.stage_utilisation = Gauge(
            "prfaas_router_stage_utilisation",
            "Use of a stage up to the slow loop's last look, 0 to 1.",
            ["site", "stage"],
            registry=registry,
        )
        self.log_dropped = Counter(
            "prfaas_router_log_lines_dropped",
            "Event log lines lost to a full disk or buffer.",
            registry=registry,
        )

    def dispatched(self, elapsed_s: float, held_s: float) -> None:
        """A request was sent for the first time, so long after it came."""
        self.overhead.observe(elapsed_s - held_s)
        if held_s:
            self.held_s.observe(held_s)

    def page(self) -> bytes:
        return generate_latest(self.registry)
