"""The servers of one model: a pump a site, prefill and decode instances, the plain server beside them."""

from __future__ import annotations

import datetime
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prfaas.config.experiment import Experiment, Instance, ModelChoice
from prfaas.model.errors import UsageError
from prfaas.pump import keys
from prfaas_testbed.experiment.door import (
    K_EVENTS_OFFSET,
    K_PREFIXES_OFFSET,
    K_ROUTER_PORT,
    K_STATUS_PORT,
    keeps_prefixes,
    plain_tokenizer,
    router_file,
)
from prfaas_testbed.experiment.inputs import seen_profile
from prfaas_testbed.experiment.machine import K_CHECKOUT
from prfaas_testbed.experiment.servers import Process, Program, Progress, Real, Server
from prfaas_testbed.experiment.sites import write_json
from prfaas_testbed.experiment.upset import Clocks
from prfaas_testbed.experiment.ways import Endpoint, Ways
from prfaas_testbed.instances.models import K_MODELS, TinyModel
from prfaas_testbed.instances.sglang_server import (
    K_BY_PRIORITY,
    K_SAME_CHUNKS,
    ServerSpec,
    SglangServer,
    events_words,
    prefixes_section,
    prefixes_words,
)

if TYPE_CHECKING:
    from prfaas_testbed.network import Network, Site


K_PUMP_PORT = 7600
K_FIRST_PORT = 30000
K_PLAIN_PORT = 29000
K_BOOTSTRAP_OFFSET = 1000
K_CERTIFICATE_DAYS, K_AUTHORITY_DAYS = 2.0, 4.0  # no certificate outlives its authority
K_MODELS_DIR = K_CHECKOUT / ".cache" / "models"


@dataclass
class Fleet:
    """Everything that serves one model. `start`, then `stop` in every case."""

    net: Network
    experiment: Experiment
    model: ModelChoice
    folder: Path
    """For logs, configurations, keys and digests; under the checkout, so that sites see it."""
    progress: Progress
    scale: float = 1.0
    servers: list[Server] = field(default_factory=list)
    plain: Server | None = None
    router: Server | None = None
    pumps: dict[str, Program] = field(default_factory=dict)
    fault: str | None = None
    """A control's, planted in the prefill servers."""
    given_up: set[str] = field(default_factory=set)
    """Sites whose pump was killed: a server of the site started another, which isn't ours to watch."""
    clocks: Clocks | None = None
    ways: Ways = field(default_factory=Ways)
    """How servers of other sites are reached."""

    @property
    def digests(self) -> Path:
        return self.folder / "digests"

    def pump_config(self, site: str) -> Path:
        return self.folder / f"pump-{site}.yaml"

    def tiny_model(self) -> TinyModel:
        """Raises UsageError for a model that set-up doesn't make."""
        if self.model.name not in K_MODELS:
            raise UsageError(f"no model {self.model.name!r} for real servers; known: {', '.join(K_MODELS)}")
        return K_MODELS[self.model.name]

    def start(self) -> None:
        """Start all at once, then wait for each: most of a start is imports. Raises PrfaasError when one
        dies."""
        self._prepare()
        for pump in self.pumps.values():
            pump.start()
        for pump in self.pumps.values():
            pump.wait_ready(self.progress)
        for server in self.everything():
            server.process.start()
        for server in self.everything():
            server.process.wait_ready(self.progress)
        if self.experiment.router is not None:
            self._start_router()

    def everything(self) -> list[Server]:
        return [*self.servers, *(server for server in (self.plain, self.router) if server is not None)]

    def _start_router(self) -> None:
        assert self.experiment.router is not None
        tokenizer = K_MODELS_DIR / self.model.name
        if not tokenizer.exists():
            tokenizer = plain_tokenizer(self.folder / "tokenizer")
        config = router_file(
            self.net,
            self.experiment,
            self.model.name,
            self.model.profile,
            self.servers,
            tokenizer,
            self.folder,
            self.ways,
        )
        site = self.net.sites[self.experiment.router.site]
        log = self.folder / "router.log"
        process = Program(
            "router", site, "prfaas.cli.main", config, log, "listening on", ["router"],
            self.environment(site.name),
        )  # fmt: skip
        process.start()
        self.router = Server("router", site.name, "router", site.address, K_ROUTER_PORT, process)
        process.wait_ready(self.progress)

    def stop(self) -> None:
        everything = self.everything()
        # Real servers take seconds to end: all are told before any is awaited.
        for server in everything:
            if server.process.pid is not None:
                with suppress(ProcessLookupError):
                    os.kill(server.process.pid, signal.SIGTERM)
        for server in everything:
            server.process.stop()
        for pump in self.pumps.values():
            pump.stop()
        # Logs stay for who wants to know; private keys don't.
        shutil.rmtree(self.folder / "keys", ignore_errors=True)

    def check_alive(self) -> None:
        for server in self.everything():
            server.process.check_alive()
        for site, pump in self.pumps.items():
            if site not in self.given_up:
                pump.check_alive()

    @property
    def client_site(self) -> str:
        """Where the users are: beside the decode servers."""
        return next(i.site for i in self.experiment.instances if i.role in ("decode", "collocated"))

    def url(self, server: Server) -> str:
        """The server's, as the users' site reaches it."""
        host, port = self.ways.to(self.client_site, server.host, server.port)
        return f"http://{host}:{port}"

    def by_role(self, *roles: str) -> list[Server]:
        return [server for server in self.servers if server.role in roles]

    def named(self, name: str) -> Server:
        """An instance, or the router."""
        return next(server for server in self.everything() if server.name == name)

    def environment(self, site: str) -> dict[str, str]:
        """What programs of the site are started with besides our own environment."""
        return self.clocks.environment(site) if self.clocks is not None else {}

    def restart_prefill(self, fault: str | None) -> None:
        """The prefill servers anew, with a control's fault or without."""
        self.fault = fault
        prefills = self.by_role("prefill")
        for server in prefills:
            server.process.stop()
            self.servers.remove(server)
        fresh = [self._server(i, name, port) for i, name, port in self._planned() if i.role == "prefill"]
        for server in fresh:
            server.process.start()
        for server in fresh:
            server.process.wait_ready(self.progress)
        self.servers += fresh

    # What is written for them.

    def _prepare(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if any(event.do == "step_clock" for event in self.experiment.events()):
            self.clocks = Clocks(self.folder / "clocks")
        moving = sorted({i.site for i in self.experiment.instances if i.role != "collocated"})
        if self.experiment.transfer.engine != "prfaas":
            moving = []  # its servers move KV themselves
        if self.experiment.transfer.tls and moving:
            self._make_keys(moving)
        if self.experiment.transfer.http_by_pump:
            self.ways = self._ways(moving)
        for site in moving:
            config = write_json(self.pump_config(site), self._pump(site))
            log = self.folder / f"pump-{site}.log"
            name = f"pump of {site}"
            self.pumps[site] = Program(
                name, self.net.sites[site], "prfaas.pump", config, log, f"pump of site {site}",
                environment=self.environment(site),
            )  # fmt: skip
        self.servers = [self._server(*planned) for planned in self._planned()]
        if self.experiment.baseline is not None:
            self.plain = self._plain(self.experiment.baseline.site)

    def _planned(self) -> list[tuple[Instance, str, int]]:
        found, port = [], K_FIRST_PORT
        for instance in self.experiment.instances:
            for name in instance.names():
                found.append((instance, name, port))
                port += 10
        return found

    def _ways(self, moving: list[str]) -> Ways:
        endpoints: dict[str, list[Endpoint]] = {site: [] for site in moving}
        for instance, _, port in self._planned():
            events, ports = port + K_EVENTS_OFFSET, [port]
            if instance.kind == "profiled" or keeps_prefixes(instance.names()[0], self.experiment):
                ports += [events, events + 1]
            if keeps_prefixes(instance.names()[0], self.experiment):
                ports.append(port + K_PREFIXES_OFFSET)
            if instance.site in endpoints:  # else it has no pump to lead there
                address = self.net.sites[instance.site].address
                endpoints[instance.site] += [(address, one) for one in ports]
        addresses = {site: self.net.sites[site].address for site in moving}
        if self.experiment.transfer.estimated:
            for site in moving:
                endpoints[site].append((addresses[site], K_STATUS_PORT))
        return Ways(endpoints, {site: f"{address}:{K_PUMP_PORT}" for site, address in addresses.items()})

    def _make_keys(self, sites: list[str]) -> None:
        now = datetime.datetime.now(datetime.UTC)
        folders = {site: self.folder / "keys" / site for site in sites}
        for site, folder in folders.items():
            if not (folder / keys.K_SITE_FILE).exists():
                keys.create_site(
                    folder, site, days=K_CERTIFICATE_DAYS, authority_days=K_AUTHORITY_DAYS, now=now
                )
        # Its own as well: a site's prefill and decode servers meet at their one pump.
        for folder in folders.values():
            for other in folders.values():
                keys.trust(folder, other / keys.K_AUTHORITY_CERTIFICATE)

    @staticmethod
    def control_socket(site: str) -> Path:
        return Path(f"/run/prfaas-{site}.sock")

    def _pump(self, site: str) -> dict[str, Any]:
        config: dict[str, Any] = {
            "site": site,
            "listen": f"{self.net.sites[site].address}:{K_PUMP_PORT}",
            "control_socket": str(self.control_socket(site)),
        }
        if self.experiment.transfer.streams is not None:
            config["min_streams"] = config["max_streams"] = self.experiment.transfer.streams
        if self.experiment.transfer.estimated:
            config["metrics"] = f"{self.net.sites[site].address}:{K_STATUS_PORT}"
            config["links"] = self._links(site)
        if self.experiment.transfer.tls:
            folder = self.folder / "keys" / site
            own = str(folder / keys.K_SITE_FILE)
            config["tls"] = {"site_file": own, "authorities": [str(folder / keys.K_TRUSTED)]}
        else:
            config["allow_plaintext"] = True
        return config | self.ways.pump_fields(site)

    def _links(self, site: str) -> list[dict[str, Any]]:
        """The site's outgoing links that have a rate, each with its ledger at the site's one pump."""
        states = self.net.topology.emulated()
        found = []
        for other in self.net.sites:
            rates = [states[link].rate_mbps for link in self.net.path(site, other)] if other != site else []
            known = [rate for rate in rates if rate is not None]
            if known:
                found.append({"peer_site": other, "admission": {"nominal_bps": min(known) * 1e6}})
        return found

    def _server(self, instance: Instance, name: str, port: int) -> Server:
        site = self.net.sites[instance.site]
        if instance.kind == "sglang":
            return self._real(instance, name, site, port)
        return self._profiled(instance, name, site, port)

    def _profiled(self, instance: Instance, name: str, site: Site, port: int) -> Server:
        self.digests.mkdir(parents=True, exist_ok=True)
        settings = {
            "name": name, "role": instance.role, "host": site.address, "port": port, "model": self.model.name,
            "profile": seen_profile(instance.profile or self.model.profile, self.folder), "scale": self.scale,
            "limits": instance.limits.model_dump(exclude_none=True),
            "pump": None if instance.role == "collocated" else str(self.pump_config(instance.site)),
            "events_port": port + K_EVENTS_OFFSET, "events_replay_port": port + K_EVENTS_OFFSET + 1,
            "transfers_log": str(self.digests / f"{name}.jsonl"),
            "transfer_timeout_s": self.experiment.request_timeout_s,
            "fault": self.fault if instance.role == "prefill" else None,
            "priority_scheduling": self.experiment.ordered(), "ways": self.ways.table(instance.site),
        }  # fmt: skip
        config = write_json(self.folder / f"{name}.yaml", settings)
        process = Program(
            name, site, "prfaas_testbed.instances.profiled", config, self.folder / f"{name}.log",
            f"profiled instance ready: {name}", environment=self.environment(site.name),
        )  # fmt: skip
        return Server(name, instance.site, instance.role, site.address, port, process, bootstrap_port=port)

    def _real(self, instance: Instance, name: str, site: Site, port: int) -> Server:
        backend: dict[str, Any] = {
            "pump_file": str(self.pump_config(instance.site)),
            "deadline_s": self.experiment.request_timeout_s,
        }
        if self.experiment.transfer.tls:
            # SGLang's own bootstrap and control are plaintext: between sites they go by the pumps.
            others = [
                site for name, site in self.net.sites.items() if name in self.pumps and name != instance.site
            ]
            backend["control"] = {"pumps": {site.address: f"{site.address}:{K_PUMP_PORT}" for site in others}}
        if self.experiment.verify:
            backend["verify"] = {"directory": str(self.digests)}
        if self.fault is not None and instance.role == "prefill":
            backend["faults"] = {"kv": {"zero_kv": "zero", "drop_page": "drop_page"}[self.fault]}
        more: list[str] = []
        if instance.role != "decode" and keeps_prefixes(name, self.experiment):
            events = port + K_EVENTS_OFFSET
            backend["prefixes"] = prefixes_section(site.address, port + K_PREFIXES_OFFSET)
            more = [*prefixes_words(), *events_words(events, events + 1)]
        engine = self.experiment.transfer.engine
        config = write_json(self.folder / f"{name}.yaml", backend) if engine == "prfaas" else None
        bootstrap = port + K_BOOTSTRAP_OFFSET
        spec = ServerSpec(
            role=instance.role if instance.role != "collocated" else "plain",
            model=self.tiny_model(), model_dir=K_MODELS_DIR / self.model.name, host=site.address, port=port,
            bootstrap_port=bootstrap, backend=engine, config_path=config,
            extra_env=self.environment(site.name),
            extra_args=(*K_SAME_CHUNKS, *(K_BY_PRIORITY if self.experiment.ordered() else ()), *more),
        )  # fmt: skip
        server = SglangServer(spec, self.folder / f"{name}.log", popen=_popen_of(site))
        return Server(name, instance.site, instance.role, site.address, port, Real(server), bootstrap)

    def _plain(self, site_name: str) -> Server:
        site = self.net.sites[site_name]
        if "sglang" in self.experiment.kinds():
            spec = ServerSpec(
                role="plain", model=self.tiny_model(), model_dir=K_MODELS_DIR / self.model.name,
                host=site.address, port=K_PLAIN_PORT, extra_args=K_SAME_CHUNKS,
            )  # fmt: skip
            process: Process = Real(SglangServer(spec, self.folder / "plain.log", popen=_popen_of(site)))
        else:
            settings = {
                "name": "plain", "role": "collocated", "host": site.address, "port": K_PLAIN_PORT,
                "model": self.model.name, "profile": seen_profile(self.model.profile, self.folder),
                "scale": self.scale,
            }  # fmt: skip
            config = write_json(self.folder / "plain.yaml", settings)
            process = Program(
                "plain", site, "prfaas_testbed.instances.profiled", config, self.folder / "plain.log",
                "profiled instance ready: plain",
            )  # fmt: skip
        return Server("plain", site_name, "plain", site.address, K_PLAIN_PORT, process)


def _popen_of(site: Site) -> Callable[..., subprocess.Popen[Any]]:
    """The site's popen with subprocess's arguments; it starts a session of its own always."""

    def popen(argv: list[str], **options: Any) -> subprocess.Popen[Any]:
        options.pop("start_new_session", None)
        return site.popen(argv, **options)

    return popen
