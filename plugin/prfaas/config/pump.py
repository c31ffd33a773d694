"""Schema of a pump's configuration: where it listens, whom it trusts, how much it may hold."""

from __future__ import annotations

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, model_validator

from prfaas.config.addresses import host_name
from prfaas.config.loading import Strict
from prfaas.config.located import FilePath
from prfaas.config.policy import LinkAdmission

K_LOOPBACK_NAMES = ("localhost", "localhost.localdomain", "ip6-localhost")
"""Names that never leave the machine (RFC 6761). Any other name may, whatever it begins with."""

K_EVERY_ADDRESS = ("0.0.0.0", "::")


def split_address(address: str) -> tuple[str, int]:
    """host and port of "host:port" or "[v6]:port". Raises ValueError."""
    match = re.fullmatch(r"\[([0-9A-Fa-f:.%]+)\]:(\d{1,5})|([^:\[\]\s]+):(\d{1,5})", address)
    if match is None:
        raise ValueError(f"{address!r} is not host:port")
    port = int(match[2] or match[4])
    if port > 65535:
        raise ValueError(f"{address!r}: a port is at most 65535")
    return match[1] or match[3], port


def is_loopback(host: str) -> bool:
    """Whether what goes to `host`, an address or a name, can't leave this machine."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host.lower() in K_LOOPBACK_NAMES
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def _sound_address(value: str) -> str:
    """Raises ValueError for what is no host:port, or whose host no socket would take."""
    host, _ = split_address(value)
    host_name(host)
    return value


def _sound_host(value: str) -> str:
    """A host with or without a port, or nothing. Raises ValueError."""
    if not value:
        return value
    return _sound_address(value) if ":" in value else host_name(value)


Address = Annotated[str, AfterValidator(_sound_address)]
"""host:port."""
OptionalAddress = Annotated[str, AfterValidator(lambda value: value and _sound_address(value))]
"""The same, or nothing."""


class TlsConfig(Strict):
    """Mutual TLS 1.3. Files as `prfaas keys create` writes them; read again when they change."""

    site_file: FilePath
    """This site's private key and certificate (site.pem)."""
    authorities: tuple[FilePath, ...] = Field(min_length=1)
    """Authorities of the sites that may connect, and are connected to (trusted.crt, or each authority.crt).
    """
    sites: tuple[str, ...] = ()
    """Sites that may connect; empty: every site that the authorities vouch for."""


class FaultConfig(Strict):
    """Faults that only the testbed sets, to see that they are found and mended."""

    corrupt_every_blocks: int = Field(0, ge=0)
    """Flip a byte of every n-th block after its checksum was taken; 0: never."""
    cut_every_blocks: int = Field(0, ge=0)
    """Abort the stream in the middle of every n-th block sent on it; 0: never."""
    pause_copy_s: float = Field(0.0, ge=0, le=5)
    """Pause half-way through every copy into a lease's pages."""
    drop_every_blocks: int = Field(0, ge=0)
    """Zero every n-th block before its checksum is taken (a fault no checksum of ours can see); 0: never."""


class LinkConfig(Strict):
    """One outgoing link of this site: how it is promised, and which pump keeps its ledger."""

    peer_site: str
    """The site at its other end."""
    host: OptionalAddress = ""
    """host:port of the pump that keeps the ledger, as this one dials it; empty: this one."""
    admission: LinkAdmission
    """How it is estimated and shared."""


class ForwardConfig(Strict):
    """One endpoint at another site, reached by a loopback port here and that site's pump."""

    listen: Address
    """host:port here, on loopback; port 0 takes a free one, which the log names."""
    pump: Address
    """host:port of the pump beside the endpoint."""
    to: Address
    """host:port of the endpoint, which that pump `exposes`."""
    site: str = ""
    """The site that pump must prove to be of; empty: any that is trusted."""

    @model_validator(mode="after")
    def _on_loopback(self) -> ForwardConfig:
        if not is_loopback(split_address(self.listen)[0]):
            raise ValueError(
                f"listen {self.listen}: loopback only, for it is plaintext and asks nobody who he is"
            )
        return self


class PumpConfig(Strict):
    """One pump: a process that owns a node's sockets to other sites."""

    site: str = Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")
    """This site's name, as its certificate has it."""
    listen: Address = "127.0.0.1:0"
    """host:port to bind; port 0 takes a free one."""
    advertise: Annotated[str, AfterValidator(_sound_host)] = ""
    """host:port that peers dial, if it isn't the bound one: behind NAT, and where `listen` is every address
    of the node (0.0.0.0). "host" alone keeps the bound port.
    """
    control_socket: FilePath | None = None
    """Unix socket for the node's servers; default: $XDG_RUNTIME_DIR or /tmp, by user and site."""
    tls: TlsConfig | None = None
    allow_plaintext: bool = False
    """Let peers that aren't on loopback talk without TLS; logged as a warning."""
    block_bytes: int = Field(2 << 20, ge=4096, le=4 << 20)
    """Most payload in one block."""
    min_streams: int = Field(2, ge=1, le=64)
    """TCP connections that are kept to each peer."""
    max_streams: int = Field(64, ge=1, le=256)
    """TCP connections to one peer: opened at first use, and more while loss asks for it."""
    congestion_control: Literal["auto", "bbr", "cubic", "reno"] = "auto"
    """auto: bbr where the kernel allows it, else its default."""
    window_bytes: int = Field(64 << 20, ge=4096, le=1 << 40)
    """Most bytes in flight on one lease; what a lease first gets is this too, if staging allows."""
    staging_bytes: int = Field(256 << 20, ge=1 << 20, le=1 << 40)
    """Memory for blocks that an owner must copy itself (device memory), over all leases."""
    stall_s: float = Field(1.5, gt=0, le=60)
    """A stream that delivers nothing for this long (or 8 RTT, if longer) is replaced."""
    nice: int = Field(-10, ge=-20, le=19)
    """Scheduling priority asked for; below 0 it takes a privilege, without which it stays as it is."""
    started_by: Literal["servers", "operator"] = "servers"
    """servers: one that finds no pump starts it, and it ends after them. operator: it is a service (`prfaas
    pump`); servers wait for it and start none, which would take its place while it is started again."""
    idle_exit_s: float = Field(60.0, gt=0, allow_inf_nan=False)
    """A pump that a server started ends after so long without clients."""
    max_transfers: int = Field(65536, ge=1, le=1 << 24)
    """Transfers that may come in at once; beyond, they are refused."""
    metrics: OptionalAddress = ""
    """host:port of /metrics, /links and /stats over HTTP; empty: none."""
    links: tuple[LinkConfig, ...] = ()
    """Outgoing links whose rate is promised and shared; others are used as they come, which the log says once
    a site where any is named here."""
    forwards: tuple[ForwardConfig, ...] = ()
    """Endpoints at other sites for programs of this node, encrypted and authenticated on the way."""
    exposes: tuple[Address, ...] = ()
    """host:port of endpoints of this node that other sites may forward to; servers add their own."""
    protocol_versions: tuple[int, int] = (1, 3)
    """Oldest and newest protocol version spoken."""
    faults: FaultConfig | None = None

    @model_validator(mode="after")
    def _consistent(self) -> PumpConfig:
        if split_address(self.listen)[0] in K_EVERY_ADDRESS and not self.advertise:
            raise ValueError(
                f"listen {self.listen} is every address of this node; peers dial one: say which by "
                "`advertise: HOST:PORT`"
            )
        oldest, newest = self.protocol_versions
        if not 1 <= oldest <= newest:
            raise ValueError(
                f"protocol_versions: the oldest, {oldest}, is above the newest, {newest}, or below 1"
            )
        if self.max_streams < self.min_streams:
            raise ValueError(f"max_streams {self.max_streams} is below min_streams {self.min_streams}")
        listens = [forward.listen for forward in self.forwards if split_address(forward.listen)[1]]
        if twice := next((listen for listen in listens if listens.count(listen) > 1), None):
            raise ValueError(f"forwards: two of them listen on {twice}")
        peers = [link.peer_site for link in self.links]
        if twice := next((peer for peer in peers if peers.count(peer) > 1), None):
            raise ValueError(f"links: two of them lead to {twice}")
        return self

    @property
    def control_path(self) -> Path:
        """Where the node's servers find the pump."""
        if self.control_socket is not None:
            return self.control_socket
        base = os.environ.get("XDG_RUNTIME_DIR") or "/tmp"
        return Path(base) / f"prfaas-{os.getuid()}-{self.site}.sock"
