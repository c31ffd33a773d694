"""The protocol between sites without I/O: frames, leases, windows, blocks, order of sending, resending."""

from prfaas.transfer.order import SendOrder

__all__ = ["SendOrder"]
