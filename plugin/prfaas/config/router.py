"""The file of `prfaas router --config F`: listeners, keys, models, sites and their servers, links, limits."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, model_validator

from prfaas.config.addresses import HostName, HttpPage, HttpServer, ZmqEndpoint
from prfaas.config.loading import Strict, load
from prfaas.config.located import FileName, located
from prfaas.config.policy import PolicyConfig, SlowLoopConfig
from prfaas.config.pump import OptionalAddress, is_loopback

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=64)]
Port = Annotated[int, Field(ge=1, le=65535)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class Tls(Strict):
    """Serve HTTPS; the files are read again at every reload."""

    certificate: FileName
    """PEM, the server's own first."""
    key: FileName
    """PEM, without a passphrase."""
    client_ca: FileName | None = None
    """Demand a client certificate signed by this authority."""


class Listen(Strict):
    """Where clients connect. A reload reads certificates again; changing anything else needs a restart."""

    host: HostName = "127.0.0.1"
    """An address of this machine; 0.0.0.0 is all of them."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """0: any free port, told on stderr."""
    tls: Tls | None = None
    backlog: Annotated[int, Field(ge=1)] = 1024
    """Connections that the kernel keeps until they are accepted."""
    reuse_port: bool = False
    """Several router processes on one port of one machine (SO_REUSEPORT)."""


class ApiKey(Strict):
    """One client. A file of the key's SHA-256 in hex keeps the key itself out of the configuration."""

    tenant: Name
    """Who is told apart by it, in shares, logs and /decisions; several keys may have the same."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """printf %s KEY | sha256sum"""
    slo_class: str = ""
    """Class of its requests that name none; empty: the policy's default."""
    classes: tuple[str, ...] = ()
    """Classes it may ask for by the x-prfaas-class header; empty: any."""
    max_in_flight: Annotated[int, Field(ge=1)] | None = None
    """Requests of this key being served; beyond, 429. None: limits.max_in_flight alone."""
    admin: bool = False
    """May read /decisions and /roles, and post /reload."""


class CostFile(Strict):
    """What a site's instance takes for a prompt: a profile file, or two straight lines."""

    profile: FileName | None = None
    """A profile file (`prfaas-testbed profile` writes one); then the rest is unused."""
    base_s: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.02
    """Seconds any prompt takes."""
    prefill_tokens_per_s: Positive = 5000.0
    """Beyond base_s."""
    kv_bytes_per_token: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 32768.0
    """What crosses a link for each token that decode lacks (plugin/prfaas/sglang has a table)."""
    state_bytes: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Recurrent or window state, whatever the length."""


class Model(Strict):
    """One served model."""

    name: str = Field(min_length=1, max_length=256)
    """As clients name it and as the servers serve it."""
    aliases: tuple[str, ...] = ()
    """Other names that clients may use."""
    tokenizer: FileName | None = None
    """Folder with tokenizer.json (and tokenizer_config.json, chat_template.jinja), as for the servers.
    None: only prompts given as token ids are known exactly, others are estimated from their size."""
    chat_template: FileName | None = None
    """A file that replaces the folder's template, as SGLang's --chat-template."""
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Defaults of the template's variables, as the servers are started with."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longer prompts are refused at the door."""
    layers: Literal["dense", "hybrid"] = "dense"
    """hybrid: recurrent or window state beside full attention; reuse only where a state was saved."""
    page_tokens: Annotated[int, Field(ge=1)] = 1
    """The servers' --page-size, which is the size of a block in their KV events."""


class KvEvents(Strict):
    """The server's --kv-events-config, seen from the router."""

    endpoint: ZmqEndpoint
    """tcp://HOST:PORT, as the router reaches it."""
    replay_endpoint: ZmqEndpoint | None = None
    """The same for what was missed; None: a gap empties what is known of the server."""
    topic: str = ""
    """As the server's; empty: all."""


class Server(Strict):
    """One SGLang server (or a profiled instance, which answers alike)."""

    name: Name
    """As logs, metrics and /decisions call it; its own in the whole file."""
    role: Literal["prefill", "decode", "collocated"]
    """Its --disaggregation-mode; collocated: a plain server that does both."""
    url: HttpServer
    """http://HOST:PORT, as the router reaches it."""
    bootstrap_host: HostName | None = None
    """What decode servers dial; None: the url's host."""
    bootstrap_port: Port | None = None
    """A prefill server's --disaggregation-bootstrap-port."""
    models: tuple[str, ...] = ()
    """Models it serves; empty: all of them."""
    kv_events: KvEvents | None = None
    states_limit: Annotated[int, Field(ge=1)] | None = None
    """Hybrid models: its slots for states (--max-mamba-cache-size), which kept ones share with requests under
    way; None: not limited."""
    max_running: Annotated[int, Field(ge=1)] | None = None
    """Batch limit of a decode server; None: what it reports."""
    key_file: FileName | None = None
    """The server's --api-key, if it has one."""
    convertible: bool = False
    """The slow loop may change its role: it was started with --enable-pd-role-switch, and with a bootstrap
    port of its own whatever its role."""
    ordered: bool = False
    """It was started with --enable-priority-scheduling, and serves what waits by the order that the router
    decided on: each request takes that along as its `priority`, a client's own being replaced."""
    prefixes: OptionalAddress = ""
    """host:port where it gives and takes prefixes, as the other sites' servers reach it: the
    `prefixes.listen` of its backend's file."""
    prefixes_url: HttpServer | None = None
    """http://HOST:PORT of the same, as the router reaches it; None: by `prefixes`."""
    admin_key_file: FileName | None = None
    """The server's --admin-api-key, if it has one: a change of role asks for it."""

    @model_validator(mode="after")
    def _prefill_has_a_bootstrap(self) -> Server:
        if self.role == "prefill" and self.bootstrap_port is None:
            raise ValueError(
                f"{self.name}: a prefill server needs bootstrap_port (--disaggregation-bootstrap-port)"
            )
        if self.convertible and (self.role == "collocated" or self.bootstrap_port is None):
            raise ValueError(
                f"{self.name}: a convertible server prefills or decodes, and needs bootstrap_port for both"
            )
        return self

    @property
    def prefixes_page(self) -> str:
        """Where the router asks it to take one."""
        return self.prefixes_url or f"http://{self.prefixes}"

    @property
    def bootstrap(self) -> tuple[str, int]:
        """Host and port that decode servers ask for this prefill server's address."""
        return self.bootstrap_host or urlsplit(self.url).hostname or "", self.bootstrap_port or 0


class Site(Strict):
    """One data centre. A site with decode servers is a local PD cluster, one without a PrfaaS cluster."""

    name: Name
    """As in certificates and pumps' files."""
    servers: tuple[Server, ...] = ()
    cost: CostFile = CostFile()
    costs: dict[str, CostFile] = Field(default_factory=dict)
    """By model, where they differ."""


class Link(Strict):
    """One direction between two sites."""

    source: Name
    """The site that prefills."""
    target: Name
    """The site that decodes."""
    rate_mbps: Positive = 1000.0
    """Believed until something better is known."""
    rtt_ms: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 40.0
    """The same: a round trip without load."""
    reserved_mbps: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Left to other traffic."""
    status_url: HttpPage | None = None
    """Page of the pump that hosts the link's ledger (http://HOST:PORT/links, its `metrics:` address);
    None: the figures above."""
    status_ca: FileName | None = None
    """Authority of that pump's certificate, where the url is https."""


class Limits(Strict):
    """What one client, or all together, may take."""

    max_body_bytes: Annotated[int, Field(ge=1024)] = 16 << 20
    """Unpacked; beyond, 413."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] = 1 << 20
    """Beyond, 400."""
    max_in_flight: Annotated[int, Field(ge=1)] = 4096
    """Requests being served; beyond, 429."""
    max_held: Annotated[int, Field(ge=0)] = 1024
    """Requests that the policy keeps waiting at the door; beyond, 429."""
    max_connections: Annotated[int, Field(ge=1)] = 8192
    """Beyond, a connection is closed at once."""
    max_header_bytes: Annotated[int, Field(ge=1024)] = 16384
    """Of one header or the request line."""
    body_timeout_s: Positive = 30.0
    """A request's body must have arrived by then."""
    client_stall_s: Positive = 60.0
    """A client that takes nothing of its stream for this long is cut off."""
    idle_timeout_s: Positive = 75.0
    """Connections without a (complete) request are closed after this."""
    retry_after_s: Positive = 1.0
    """Told to clients when nothing better is known."""
    inline_bytes: Annotated[int, Field(ge=0)] = 8192
    """Bodies up to this size are read and tokenised on the event loop, longer ones off it."""
    tokenise_threads: Annotated[int, Field(ge=1, le=64)] = 2
    """For those off it."""


class Retry(Strict):
    """What happens before the first token when a path fails."""

    attempts: Annotated[int, Field(ge=1, le=32)] = 6
    """Tries of one request, waits for a path included."""
    total_s: Positive = 120.0
    """All attempts together; then the client is told."""
    first_token_min_s: Positive = 10.0
    """An attempt has at least this long for its first token …"""
    first_token_factor: Positive = 4.0
    """… or this many times the predicted time, if longer."""
    answer_s: Positive = 600.0
    """Without streaming the first token can't be seen: after prefill, the whole answer has this long."""
    backoff_s: Positive = 0.1
    """Pause after every path has failed once; doubled each time."""
    stall_s: Positive = 120.0
    """After the first token: silence of a decode server for this long is an error."""
    cool_down_s: Positive = 5.0
    """A server that refused a connection or answered three requests in a row with errors of its own is left
    alone for this long, and a link that failed a transfer (each time twice as long)."""


class Loads(Strict):
    """How servers are asked for their load (/v1/loads)."""

    interval_s: Positive = 0.5
    """Between two questions, give or take a quarter."""
    timeout_s: Positive = 2.0
    """Three answers in a row later than this, or none: the server isn't used until it answers."""
    max_age_s: Positive = 5.0
    """An older figure counts as none."""


class Logs(Strict):
    """What is kept of decisions."""

    events: FileName | None = None
    """JSON lines, one a decision and one an outcome; None: none."""
    max_bytes: Annotated[int, Field(ge=1 << 16)] = 256 << 20
    """The file is turned over at this size; one former file is kept."""
    decisions: Annotated[int, Field(ge=0)] = 2000
    """Last ones that /decisions shows."""


class SlowLoop(SlowLoopConfig):
    """The slow loop of each site that decodes; without this section there is none.

    It plans from the traffic of late and, unless dry_run, sets the `paper` policy's threshold and converts
    servers that are `convertible`. Where several routers serve the same servers, let one of them do it: the
    others learn of changed roles from the servers' loads.
    """

    least_requests: Annotated[int, Field(ge=1)] = 100
    """Requests of the last `window_s` without which nothing is planned."""
    window_s: Positive = 600.0
    """How far back the traffic counts that is planned for."""
    decode_cuda_graph_memory_gb: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """GPU memory that a server must have free to capture decode graphs when it turns to decode."""
    switch_timeout_s: Positive = 120.0
    """A server that hasn't answered by then is asked what it has become."""


class RouterConfig(Strict):
    """The whole file."""

    listen: Listen = Listen()
    keys: tuple[ApiKey, ...] = ()
    """None: anyone may ask (bind to a private address)."""
    models: Annotated[tuple[Model, ...], Field(min_length=1)]
    sites: Annotated[tuple[Site, ...], Field(min_length=1)]
    links: tuple[Link, ...] = ()
    home: Name | None = None
    """The site that decodes what this router takes in; None: any site that decodes."""
    policy: PolicyConfig = PolicyConfig()
    limits: Limits = Limits()
    retry: Retry = Retry()
    loads: Loads = Loads()
    logs: Logs = Logs()
    slow_loop: SlowLoop | None = None
    movable: bool = False
    """Cached prefixes can be brought to another site's prefill cache: SGLang's servers where each has
    `prefixes`; profiled instances can as they are."""
    seed: int | None = None
    """Of the rooms' random numbers; None: from the system, as it must be where several routers run, or one is
    started again: servers refuse a room that has failed before."""

    @model_validator(mode="after")
    def _consistent(self) -> RouterConfig:
        for what, names in (
            ("site", [site.name for site in self.sites]),
            ("server", [server.name for _, server in self.servers()]),
            ("tenant's key", [key.sha256 for key in self.keys]),
            ("model", [name for model in self.models for name in (model.name, *model.aliases)]),
            ("link", [f"{link.source}>{link.target}" for link in self.links]),
        ):
            twice = {name for name in names if names.count(name) > 1}
            if twice:
                raise ValueError(f"{what} named twice: {', '.join(sorted(twice))}")
        if self.policy.service == "deadline":
            plain = sorted(one.name for _, one in self.servers() if one.role != "decode" and not one.ordered)
            if plain:
                raise ValueError(
                    "policy.service: deadline is for servers that keep the router's order; start them with "
                    f"--enable-priority-scheduling and say `ordered: true`: {', '.join(plain)}"
                )
        if self.slow_loop is not None and len(self.models) > 1:
            raise ValueError("slow_loop plans for one model; a router of several can't have it")
        self._check_bootstraps()
        self._check_prefixes()
        sites = {site.name for site in self.sites}
        models = {model.name for model in self.models}
        for link in self.links:
            if {link.source, link.target} - sites:
                raise ValueError(f"link {link.source}>{link.target}: sites are {sorted(sites)}")
            if link.source == link.target:
                raise ValueError(f"link {link.source}>{link.target}: expected two sites")
        if self.home is not None and self.home not in self.local_sites:
            raise ValueError(f"home {self.home!r}: sites that decode are {sorted(self.local_sites)}")
        for _, server in self.servers():
            unknown = set(server.models) - models
            if unknown:
                raise ValueError(f"server {server.name}: unknown models {sorted(unknown)}")
        return self

    def _check_bootstraps(self) -> None:
        """Raises ValueError for one that decode servers elsewhere would look for on their own node."""
        dialled = {one.name: one.bootstrap[0] for _, one in self.servers() if one.bootstrap_port}
        here = sorted(name for name, host in dialled.items() if is_loopback(host))
        decodes = [urlsplit(one.url).hostname or "" for _, one in self.servers() if one.role == "decode"]
        if here and not all(map(is_loopback, decodes)):
            raise ValueError(
                f"{', '.join(here)}: decode servers would look for its bootstrap on their own loopback; "
                "bootstrap_host says what they reach it by"
            )

    def _check_prefixes(self) -> None:
        """Raises ValueError where some could move prefixes and others couldn't, or none are to be moved."""
        able = {one.name: bool(one.prefixes) for _, one in self.servers() if one.role != "decode"}
        if any(able.values()) and not self.movable:
            raise ValueError("servers have `prefixes`, which are moved where the file says `movable: true`")
        if any(able.values()) and (lacking := sorted(name for name, has in able.items() if not has)):
            raise ValueError(
                f"all servers that prefill have `prefixes`, or none; without: {', '.join(lacking)}"
            )

    def servers(self) -> Iterator[tuple[str, Server]]:
        """Site name and server, in the file's order."""
        for site in self.sites:
            for server in site.servers:
                yield site.name, server

    @property
    def local_sites(self) -> frozenset[str]:
        """Sites that decode."""
        return frozenset(name for name, server in self.servers() if server.role != "prefill")


def load_router_config(path: Path | str) -> RouterConfig:
    """The file, with relative paths taken from its folder. Raises UsageError or ConfigError."""
    return located(load(path, RouterConfig), path)
