"""Schema of the file that PRFAAS_CONFIG names: what the backend inside an SGLang server needs to know."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from prfaas.config.loading import Strict, check, load, read_yaml
from prfaas.config.located import located
from prfaas.config.pump import Address, PumpConfig

K_ENVIRONMENT = "PRFAAS_CONFIG"
KvFaultKind = Literal["zero", "drop_page"]


class VerifyConfig(Strict):
    """Proof that the right bytes landed, at the cost of reading them all twice. For CPU pools; off by
    default.
    """

    directory: Path
    """Where each server writes its rows, a line of JSON a room: digests of what it sent, or of what
    landed.
    """
    poison: bool = True
    """Overwrite pages and states when they are leased, so that an old right page can't hide a missing new
    one.
    """


class BackendFaults(Strict):
    """Faults in what a prefill server sends, which no checksum on the way can see; only the testbed sets
    them.
    """

    kv: KvFaultKind | None = None
    """zero: KV is zeroed in transit; drop_page: one page of one layer of each request isn't sent."""
    rooms: dict[int, KvFaultKind] = Field(default_factory=dict)
    """The same for single requests, by their bootstrap room."""


class AdmissionConfig(Strict):
    """How a prefill server asks for a request's place on a link whose pump keeps a ledger (`links:`)."""

    within_s: float | None = Field(default=None, gt=0, le=3600)
    """How soon a request's bytes must be across, from when its pages were granted: what can't be is refused.
    Default: deadline_s.
    """
    may_queue: bool = True
    """Whether a request that must wait for others may, before its prefill; if not, it is refused at once."""


class ControlConfig(Strict):
    """SGLang's own bootstrap and control between sites by way of the pumps: encrypted and authenticated as
    the data is, by the pump's one port. Both sides need the section.
    """

    pumps: dict[str, Address] = Field(default_factory=dict)
    """On a decode server: the pump's host:port by each host under which prefill servers elsewhere are named,
    in requests (bootstrap_host) and by themselves. A prefill server learns from its peers.
    """


class NearConfig(Strict):
    """On a decode server: prefill servers of its own site, reached by SGLang's stock engine (Mooncake), as
    SGLang does alone. They run `--disaggregation-transfer-backend mooncake` or `mooncake_tcp`. All others are
    reached by ours.
    """

    hosts: tuple[str, ...] = Field(min_length=1)
    """The site's own: addresses, networks ("10.2.0.0/16") or names, as requests say them (bootstrap_host)."""
    transport: Literal["rdma", "tcp"] = "rdma"
    """Mooncake's, as on those servers: rdma by --disaggregation-ib-device, tcp where there is none."""

    @field_validator("hosts")
    @classmethod
    def _are_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for host in value:
            if "/" in host:
                ipaddress.ip_network(host)
            elif not host or any(c in host for c in " []") or (":" in host and _ip_address(host) is None):
                raise ValueError(
                    f"{host!r} is not an address, a network or a name; without port and brackets"
                )
        return value

    def holds(self, host: str) -> bool:
        """Whether a prefill server is of this site, by the host it is named by. Names aren't resolved."""
        address = _ip_address(host)
        return any(
            (address is not None and address in ipaddress.ip_network(one))
            if "/" in one
            else host == one or (address is not None and address == _ip_address(one))
            for one in self.hosts
        )


class PrefixesConfig(Strict):
    """On a prefill server: what its prefix cache takes in is kept in host memory too, given to servers of
    other sites, and what they have is taken. It goes with SGLang's flags for an external cache.
    """

    listen: Address
    """host:port where the router and other sites' servers ask; of several ranks the first one, each other one
    port further. Plain HTTP: a private address, or loopback with `control`.
    """
    store_bytes: int = Field(ge=1 << 20)
    """Host memory of each rank for it, pinned where CUDA is."""


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


class BackendConfig(Strict):
    """One SGLang server's side of the backend."""

    pump: PumpConfig = Field(default_factory=lambda: PumpConfig.model_validate({"site": "local"}))
    """The node's pump, and this node's site. Without a file: loopback only, started when none is found."""
    pump_file: Path | None = None
    """The pump's own file instead of `pump`; relative to this one."""
    deadline_s: float = Field(default=300.0, gt=0, le=3600)
    """How long a request's pages are leased at most, from allocation to the last byte."""
    overlap: Literal["layer", "chunk", "end"] = "chunk"
    """When a prefill server sends a request's KV. layer: each layer's part of a chunk as soon as it is
    written, so that what is left after prefill is the last layer's; chunk: each chunk when all its layers are
    done, as SGLang does; end: all of it after prefill. Recurrent state and windows go at the end in any case.
    """
    staging: Literal["auto", "always"] = "auto"
    """auto: pages in GPU memory are copied by way of host memory; always: pages in host memory too."""
    staging_bytes: int = Field(default=2 << 30, ge=1 << 20)
    """Host memory for that, pinned where CUDA is: on a decode server it holds all requests that are
    crossing.
    """
    control: ControlConfig | None = None
    """Without it SGLang's endpoints are dialled as they are, in plaintext."""
    near: NearConfig | None = None
    """Without it every prefill server is reached by our engine."""
    admission: AdmissionConfig = Field(default_factory=AdmissionConfig)
    prefixes: PrefixesConfig | None = None
    """Without it prefixes stay in the servers that computed them."""
    verify: VerifyConfig | None = None
    faults: BackendFaults | None = None

    @model_validator(mode="after")
    def _one_way_to_each(self) -> BackendConfig:
        if self.near is not None and self.control is not None:
            for host in self.control.pumps:
                if self.near.holds(host):
                    raise ValueError(f"{host} is of this site by near.hosts, and elsewhere by control.pumps")
        return self


def load_backend_config(path: Path | str | None) -> BackendConfig:
    """The file's configuration, or the loopback default without one; relative paths are taken from their
    file's folder. Raises UsageError or ConfigError.
    """
    if not path:
        return BackendConfig.model_validate({})
    config = load(path, BackendConfig)
    if config.pump_file is None:
        return config.model_copy(update={"pump": located(config.pump, path)})
    pump_path = Path(path).parent / config.pump_file
    pump = located(load(pump_path, PumpConfig), pump_path)
    return config.model_copy(update={"pump": pump, "pump_file": pump_path})


def load_pump_config(path: Path | str) -> PumpConfig:
    """A pump's configuration, from a file of its own or from the one that the servers beside it read;
    relative paths are taken from the file's folder. Raises UsageError or ConfigError.
    """
    data = read_yaml(path)
    if isinstance(data, dict) and not data.keys().isdisjoint(("pump", "pump_file")):
        return load_backend_config(path).pump
    return located(check(data, PumpConfig, str(path)), path)
