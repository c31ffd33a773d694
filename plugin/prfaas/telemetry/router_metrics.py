"""The router's figures for Prometheus. Names are an interface: they don't change."""

from __future__ import annotations

from collections.abc import Sequence

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
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._of_requests()
        self._of_decisions()
        self._of_servers()
        self._of_itself()

    def _of_requests(self) -> None:
        """What clients see."""
        self.requests = self._counter(
            "prfaas_router_requests",
            "Requests answered, by endpoint and HTTP status (499: the client left).",
            "endpoint",
            "status",
        )
        self.in_flight = self._gauge("prfaas_router_in_flight", "Requests being served.")
        self.ttft = self._histogram(
            "prfaas_router_ttft_seconds",
            "From the request's arrival to its first token, by prefill site.",
            "site",
            buckets=K_SECONDS,
        )
        self.e2e = self._histogram(
            "prfaas_router_e2e_seconds",
            "From the request's arrival to the end of its answer.",
            "site",
            buckets=K_SECONDS,
        )
        self.broken_streams = self._counter(
            "prfaas_router_broken_streams",
            "Streams that ended after their first token with an error event, by cause.",
            "cause",
        )
        self.prompt_tokens = self._histogram(
            "prfaas_router_prompt_tokens", "Prompt lengths.", buckets=K_TOKENS
        )
        self.refused_input = self._counter(
            "prfaas_router_refused_input",
            "Input refused without harm: bodies of clients, loads and KV events of servers, link status.",
            "source",
            "cause",
        )

    def _of_decisions(self) -> None:
        """How they are decided on, and what that takes."""
        self.decisions = self._counter(
            "prfaas_router_decisions",
            "Decisions, by policy, action and prefill site.",
            "policy",
            "action",
            "site",
        )
        self.attempts_failed = self._counter(
            "prfaas_router_attempts_failed",
            "Attempts without a token, by site, side and kind.",
            "site",
            "side",
            "kind",
        )
        self.held = self._gauge("prfaas_router_held", "Requests that the policy keeps waiting.")
        self.held_s = self._histogram(
            "prfaas_router_held_seconds",
            "What the policy kept a request at the door for before it was first sent, of those that it kept.",
            buckets=K_SECONDS,
        )
        self.overhead = self._histogram(
            "prfaas_router_overhead_seconds",
            "From the body's arrival to its dispatch, less what it was held: reading, tokenising, deciding.",
            buckets=K_MILLIS,
        )
        self.decide = self._histogram(
            "prfaas_router_decide_seconds", "Time of one decision, its snapshot included.", buckets=K_MILLIS
        )
        self.policy_figures = self._gauge(
            "prfaas_router_policy", "The policy's inner figures, as its own page names them.", "figure"
        )
        self.cached_prediction = self._counter(
            "prfaas_router_cached_tokens_predictions",
            "Prefix predictions compared with what prefill reported: equal or not.",
            "outcome",
        )
        self.cache_moves = self._counter(
            "prfaas_router_cache_moves",
            "Prefixes brought from one site's prefill cache to another's before a prompt, by outcome.",
            "source",
            "target",
            "outcome",
        )
        self.cache_move_seconds = self._histogram(
            "prfaas_router_cache_move_seconds",
            "Time that bringing a prefix took before its prompt was sent.",
            buckets=K_SECONDS,
        )

    def _of_servers(self) -> None:
        """Servers, links and the slow loop."""
        self.server_up = self._gauge(
            "prfaas_router_server_up", "1 while a server is used.", "server", "site", "role"
        )
        self.server_in_flight = self._gauge(
            "prfaas_router_server_in_flight", "This router's unanswered requests on a server.", "server"
        )
        self.link_up = self._gauge("prfaas_router_link_up", "1 while a link is believed up.", "link")
        self.link_rate = self._gauge("prfaas_router_link_rate_bps", "Believed rate of a link.", "link")
        self.kv_gaps = self._counter(
            "prfaas_router_kv_event_gaps",
            "Gaps in KV event streams, by how they were closed.",
            "server",
            "closed_by",
        )
        self.kv_events = self._counter(
            "prfaas_router_kv_event_batches", "KV event batches taken in.", "server"
        )
        self.conversions = self._counter(
            "prfaas_router_conversions",
            "Changes of a server's role, by site, new role and outcome.",
            "site",
            "role",
            "outcome",
        )
        self.conversion_seconds = self._gauge(
            "prfaas_router_conversion_seconds", "The last change of a role, from its drain to its end."
        )
        self.planned_threshold = self._gauge(
            "prfaas_router_planned_threshold_tokens",
            "The slow loop's threshold for the roles of now, by site that decodes.",
            "site",
        )
        self.stage_utilisation = self._gauge(
            "prfaas_router_stage_utilisation",
            "Use of a stage up to the slow loop's last look, 0 to 1.",
            "site",
            "stage",
        )

    def _of_itself(self) -> None:
        """The router's own doings."""
        about = self._gauge("prfaas_router_info", "Which router this is; always 1.", "version")
        about.labels(K_PACKAGE_VERSION).set(1)
        self.reloads = self._counter("prfaas_router_reloads", "Configuration reloads, by outcome.", "outcome")
        self.log_dropped = self._counter(
            "prfaas_router_log_lines_dropped", "Event log lines lost to a full disk or buffer."
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, *labels: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(name, text, labels, buckets=buckets, registry=self.registry)

    def dispatched(self, elapsed_s: float, held_s: float) -> None:
        """A request was sent for the first time, so long after it came."""
        self.overhead.observe(elapsed_s - held_s)
        if held_s:
            self.held_s.observe(held_s)

    def page(self) -> bytes:
        return generate_latest(self.registry)
