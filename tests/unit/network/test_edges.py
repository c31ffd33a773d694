"""The machine's end of the appliance's cables: what the kernel's tables say of it."""

from __future__ import annotations

from prfaas_testbed.network.edges import packet_sockets, sent_and_dropped

K_PACKET = """\
sk               RefCnt Type Proto  Iface R Rmem   User   Inode
00000000c4a0b0f5 3      3    0003   2     1 2304   0      81542
00000000a70b7c11 3      3    0800   2     1 0      0      81551
"""
K_DEV = """\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:       0       0    0    0    0     0          0         0        0       0    0    0    0     0       0          0
east-wan: 1234567   99999    0    5    0     0          0         0 7654321  88888    0   17    0     0       0          0
east-wan2: 1       1    0    1    0     0          0         0 1  1    0   1    0     0       0          0
"""  # noqa: E501


def test_the_socket_that_the_guest_reads_is_the_one_for_every_protocol() -> None:
    assert packet_sockets(K_PACKET) == {81542: True, 81551: False}
    assert packet_sockets("sk RefCnt\n") == {}


def test_a_frame_that_a_full_ring_refused_is_counted_at_its_sender() -> None:
    assert sent_and_dropped(K_DEV, "east-wan") == 17
    assert sent_and_dropped(K_DEV, "west-wan") == 0
