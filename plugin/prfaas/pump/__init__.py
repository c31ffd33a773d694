"""The process that moves the bytes: sockets, TLS, memory, TCP_INFO, the ledger's host."""

from prfaas.pump.server import Pump

__all__ = ["Pump"]
