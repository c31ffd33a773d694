"""Corruption, cuts, killed pumps, stopped servers, pages taken back: a transfer completes, or fails with a
reason.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from prfaas.config.pump import split_address
from prfaas.model.errors import MachineError
from prfaas.model.transfer import FailureReason, LeaseGrant, TransferKind
from prfaas.pump_client import launch

K_WAIT_S = 40
K_SLICE_BYTES = 64

K_SERVER = """
import sys, numpy as np
from prfaas.config.pump import PumpConfig
from prfaas.pump_client import LocalPumpClient
client = LocalPumpClient.open(PumpConfig.model_validate_json(sys.argv[1]), start=False)
pages = np.zeros(int(sys.argv[2]), np.uint8)
client.register([(pages.ctypes.data, len(pages))])
lease = client.grant_lease(1, 0, [(pages.ctypes.data, len(pages))], 60)
print(pages.ctypes.data, lease.grant.to_text(), flush=True)
sys.stdin.readline()
print(lease.wait(20), int(pages.astype(np.uint64).sum()), flush=True)
client.close()
"""


def send_all(client, grant, src, dst, *, deadline_s=30.0):
    """All of src to dst, in two segments so that a copy has a middle."""
    half = len(src) // 2
    return client.submit(
        grant, [src.ctypes.data, src.ctypes.data + half], [dst.ctypes.data + half, dst.ctypes.data],
        [half, half], kind=TransferKind.KV, deadline_s=deadline_s, last=True,
    )  # fmt: skip


def send_slices(client, grant, src, dst, *, deadline_s=30.0):
    """All of src, a slice at the beginning of each place of two."""
    at = np.arange(len(src) // K_SLICE_BYTES, dtype=np.uint64) * np.uint64(K_SLICE_BYTES)
    return client.submit(
        grant, at + np.uint64(src.ctypes.data), at * np.uint64(2) + np.uint64(dst.ctypes.data),
        np.full(len(at), K_SLICE_BYTES), kind=TransferKind.KV, deadline_s=deadline_s, last=True,
    )  # fmt: skip


def landed(src, dst):
    half = len(src) // 2
    return np.array_equal(src[:half], dst[half:]) and np.array_equal(src[half:], dst[:half])


def lease_on(client, array, deadline_s=60.0, room=1):
    return client.grant_lease(room, 0, [(array.ctypes.data, len(array))], deadline_s)


@pytest.mark.parametrize(
    "faults",
    [
        {"corrupt_every_blocks": 5},
        {"cut_every_blocks": 9},
        {"corrupt_every_blocks": 7, "cut_every_blocks": 13},
    ],
)
def test_corrupt_blocks_and_cut_streams_are_mended(pumps, faults):
    # Faults count a stream's own blocks: two streams for 128 of them, so that each comes to a fault.
    east = pumps.client(pumps.start("east", faults=faults, block_bytes=65536, max_streams=2))
    west = pumps.client(pumps.start("west"))
    src, dst = pumps.memory(east, 1 << 23), pumps.memory(west, 1 << 23, fill=0)
    lease = lease_on(west, dst)
    outcome = send_all(east, lease.grant, src, dst).wait(K_WAIT_S)
    assert outcome.ok, outcome
    assert outcome.resent_blocks > 0
    assert landed(src, dst)
    inbound = west.stats()["inbound"]
    if "corrupt_every_blocks" in faults:
        assert inbound["corrupt_blocks"] > 0
    if "cut_every_blocks" in faults:
        pumps.until(lambda: west.stats()["inbound"]["streams_lost"] > 0)


def test_what_is_corrupt_every_time_fails_with_that_reason(pumps):
    east = pumps.client(pumps.start("east", faults={"corrupt_every_blocks": 1}))
    west = pumps.client(pumps.start("west"))
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=7)
    outcome = send_all(east, lease_on(west, dst).grant, src, dst).wait(K_WAIT_S)
    assert outcome.reason is FailureReason.CORRUPT
    assert (dst == 7).all()


def test_no_byte_is_written_after_a_revocation_that_came_in_the_middle_of_a_copy(pumps):
    east = pumps.client(pumps.start("east", block_bytes=65536))
    west = pumps.client(pumps.start("west", faults={"pause_copy_s": 0.3}))
    src, dst = pumps.memory(east, 1 << 17), pumps.memory(west, 1 << 17, fill=0)
    src[:] = 1
    lease = lease_on(west, dst)
    # 1,024-byte pieces in reverse, so that each block has many pieces and its copy pauses half-way.
    offsets = np.arange(0, len(src), 1024, dtype=np.uint64)
    transfer = east.submit(
        lease.grant, src.ctypes.data + offsets, dst.ctypes.data + offsets[::-1], np.full(len(offsets), 1024),
        kind=TransferKind.KV, deadline_s=20, last=True,
    )  # fmt: skip
    while not dst.any():
        time.sleep(0.002)
    assert not dst.all(), "the copy wasn't paused"
    started = time.monotonic()
    lease.revoke()
    took_s = time.monotonic() - started
    canary = dst.copy()
    # Whole blocks only: revoking waited for the copy that was running.
    assert canary.sum() % 65536 == 0
    assert took_s < 10
    assert transfer.wait(K_WAIT_S).reason is FailureReason.LEASE_ENDED
    time.sleep(0.5)
    assert np.array_equal(canary, dst)
    assert not lease.complete


def test_revoking_needs_neither_pump_nor_peer(pumps):
    config = pumps.start("west")
    west = pumps.client(config)
    dst = pumps.memory(west, 4096, fill=0)
    lease = lease_on(west, dst)
    os.kill(pumps.pid("west"), signal.SIGSTOP)
    done = threading.Event()
    threading.Thread(target=lambda: (lease.revoke(), done.set()), daemon=True).start()
    assert done.wait(10)
    os.kill(pumps.pid("west"), signal.SIGCONT)


@pytest.mark.parametrize("killed", ["east", "west"])
def test_a_pump_killed_in_the_middle_is_replaced_and_the_transfer_completes(pumps, killed):
    port = {"east": "127.0.0.1:0", "west": "127.0.0.1:0"}
    east = pumps.client(pumps.start("east", block_bytes=16384))
    config = pumps.start("west", faults={"pause_copy_s": 0.01})
    west = pumps.client(config)
    port["west"] = west.address
    port["east"] = east.address
    src, dst = pumps.memory(east, 1 << 22), pumps.memory(west, 1 << 22, fill=0)
    lease = lease_on(west, dst)
    offsets = np.arange(0, len(src), 1024, dtype=np.uint64)
    transfer = east.submit(
        lease.grant, src.ctypes.data + offsets, dst.ctypes.data + offsets[::-1], np.full(len(offsets), 1024),
        kind=TransferKind.KV, deadline_s=30, last=True,
    )  # fmt: skip
    while not dst.any():
        time.sleep(0.002)
    assert transfer.outcome is None
    pumps.kill(killed)
    pumps.start(killed, listen=port[killed], block_bytes=16384)
    outcome = transfer.wait(K_WAIT_S)
    assert outcome is not None
    assert outcome.ok, outcome
    assert lease.wait(K_WAIT_S)
    assert np.array_equal(dst.reshape(-1, 1024)[::-1], src.reshape(-1, 1024))
    # The client found the new pump by itself, and goes on with it.
    again = lease_on(west, dst)
    assert send_all(east, again.grant, src, dst).wait(K_WAIT_S).ok


@pytest.mark.parametrize("killed", ["east", "west"])
def test_what_is_granted_and_submitted_while_a_pump_is_away_is_told_to_the_next_one_once(pumps, killed):
    size, n_each = 1 << 18, 4
    started = {
        "east": pumps.start("east", block_bytes=16384),
        "west": pumps.start("west", faults={"pause_copy_s": 0.01}),
    }
    clients = {name: pumps.client(config) for name, config in started.items()}
    east, west = clients["east"], clients["west"]
    rooms = iter(range(1, 1000))

    def send_some():
        begun = []
        for _ in range(n_each):
            room = next(rooms)
            src, dst = pumps.memory(east, size + room * 16), pumps.memory(west, size + room * 16, fill=0)
            lease = lease_on(west, dst, room=room)
            begun.append((lease, send_all(east, lease.grant, src, dst), src, dst))
        return begun

    before = send_some()
    pumps.until(lambda: any(dst.any() for *_, dst in before))
    assert any(sent.outcome is None for _, sent, _, _ in before)
    lost_pid = clients[killed].pump_pid
    pumps.kill(killed)
    just_after = send_some()
    # The client tries to join again for as long as the pump is away: it has noticed, and goes on asking.
    pumps.until(lambda: clients[killed]._alone)
    away = send_some()
    pumps.start(killed, listen=clients[killed].address, block_bytes=16384)
    back = send_some()
    pumps.until(lambda: clients[killed].pump_pid != lost_pid)
    joined = send_some()
    for lease, sent, src, dst in before + just_after + away + back + joined:
        outcome = sent.wait(K_WAIT_S)
        assert outcome is not None
        assert outcome.ok, outcome
        assert lease.wait(K_WAIT_S), lease.failure and lease.failure.detail
        assert lease.failure is None
        assert landed(src, dst)
    assert "refused" not in pumps.log(killed)


def test_a_callback_that_fails_costs_no_other_its_word_be_the_pump_there_or_not(pumps, caplog):
    east = pumps.client(pumps.start("east"))
    west = pumps.client(pumps.start("west", faults={"pause_copy_s": 0.3}))
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=0)

    def fail(transfer):
        raise ValueError("not what the user wanted")

    sent = send_all(east, lease_on(west, dst).grant, src, dst)
    sent.add_done_callback(fail)
    assert sent.wait(K_WAIT_S).ok
    lease = lease_on(west, dst, room=2)
    pumps.kill("east")
    late = send_all(east, lease.grant, src, dst, deadline_s=0.3)
    late.add_done_callback(fail)
    assert late.wait(K_WAIT_S).reason is FailureReason.PUMP_LOST
    pumps.start("east")
    assert send_all(east, lease.grant, src, dst).wait(K_WAIT_S).ok
    assert landed(src, dst)
    assert caplog.text.count("a callback failed") == 2


def test_a_disk_that_is_full_when_a_pump_is_to_be_started_again_costs_time_alone(pumps, monkeypatch, caplog):
    west = pumps.client(pumps.start("west"))
    east = pumps.client(pumps.config("east", idle_exit_s=1), start=True)
    src, dst = pumps.memory(east, 4096), pumps.memory(west, 4096, fill=0)
    full = threading.Event()
    write = launch._write_private

    def write_if_there_is_room(*arguments):
        if full.is_set():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(*arguments)

    monkeypatch.setattr(launch, "_write_private", write_if_there_is_room)
    full.set()
    with pytest.raises(MachineError, match=r"none\.sock: no pump can be reached or started: .*No space left"):
        pumps.client(pumps.config("none"), start=True)
    os.kill(east.pump_pid, signal.SIGKILL)
    sent = send_all(east, lease_on(west, dst).grant, src, dst)
    pumps.until(lambda: "no pump: " in caplog.text)
    full.clear()
    assert sent.wait(K_WAIT_S).ok
    assert landed(src, dst)


def test_a_pump_that_stays_dead_fails_the_transfers_to_it_with_a_reason(pumps):
    east = pumps.client(pumps.start("east"))
    west = pumps.client(pumps.start("west"))
    other = pumps.client(pumps.start("other"))
    src = pumps.memory(east, 1 << 20)
    dst, elsewhere = pumps.memory(west, 1 << 20, fill=0), pumps.memory(other, 1 << 20, fill=0)
    lease = lease_on(west, dst)
    pumps.kill("west")
    lost = send_all(east, lease.grant, src, dst, deadline_s=2.0)
    assert send_all(east, lease_on(other, elsewhere).grant, src, elsewhere).wait(K_WAIT_S).ok
    outcome = lost.wait(K_WAIT_S)
    assert outcome.reason in (FailureReason.DEADLINE, FailureReason.PEER_UNREACHABLE)


@contextlib.contextmanager
def server(config, size_bytes):
    """A server's process that grants one lease: (process, address of its pages, the grant)."""
    command = [sys.executable, "-c", K_SERVER, config.model_dump_json(exclude_none=True), str(size_bytes)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            address, _, text = process.stdout.readline().partition(" ")
            yield process, int(address), LeaseGrant.from_text(text)
        finally:
            process.kill()  # even while it is stopped


def test_a_stopped_server_costs_another_behind_the_same_pump_nothing_and_its_own_pages_fill(pumps):
    """Bytes to both go side by side over the same streams, none of which is lost; even when the stopped one's
    control socket is full of news that it doesn't read.
    """
    east = pumps.client(pumps.start("east", stall_s=30))
    config = pumps.start("west")
    small, n_small, size, n_large = 256, 500, 1 << 20, 5
    with server(config, small * n_small) as (frozen, address, grant):
        west = pumps.client(config)
        src, source = pumps.memory(east, small * n_small), pumps.memory(east, size)
        ended, to_frozen, to_other = [], [], []
        os.kill(frozen.pid, signal.SIGSTOP)
        for i in range(n_small):
            at = i * small
            to_frozen.append(
                east.submit(
                    grant, [src.ctypes.data + at], [address + at], [small],
                    kind=TransferKind.KV, deadline_s=30, last=i == n_small - 1,
                )
            )  # fmt: skip
            to_frozen[-1].add_done_callback(lambda _: ended.append("frozen"))
            if i % (n_small // n_large) == 0:
                dst = pumps.memory(west, size + len(to_other), fill=0)[:size]
                sent = send_all(east, lease_on(west, dst, room=2 + len(to_other)).grant, source, dst)
                sent.add_done_callback(lambda _: ended.append("other"))
                to_other.append((sent, dst))
        for sent in [*to_frozen, *(sent for sent, _ in to_other)]:
            outcome = sent.wait(K_WAIT_S)
            assert outcome is not None
            assert outcome.ok, outcome
        assert all(landed(source, dst) for _, dst in to_other)
        # Neither waited for the other's last.
        last = {name: len(ended) - 1 - ended[::-1].index(name) for name in ("frozen", "other")}
        assert ended.index("other") < last["frozen"]
        assert ended.index("frozen") < last["other"]
        inbound = west.stats()["inbound"]
        assert inbound["streams_lost"] == inbound["corrupt_blocks"] == 0
        os.kill(frozen.pid, signal.SIGCONT)
        said, _ = frozen.communicate("\n", timeout=K_WAIT_S)
        assert said.split() == ["True", str(int(src.astype(np.uint64).sum()))]


def test_a_server_that_dies_ends_its_leases(pumps):
    east = pumps.client(pumps.start("east"))
    config = pumps.start("west")
    with server(config, 4096) as (dying, address, grant):
        dying.kill()
        dying.wait()
    src = pumps.memory(east, 4096)
    outcome = east.submit(
        grant, [src.ctypes.data], [address], [4096],
        kind=TransferKind.KV, deadline_s=30, last=True,
    ).wait(K_WAIT_S)  # fmt: skip
    assert outcome.reason in (FailureReason.LEASE_ENDED, FailureReason.OWNER_GONE)


def test_a_stopped_peer_costs_its_own_transfers_only(pumps):
    east = pumps.client(pumps.start("east", stall_s=0.3))
    west, other = pumps.client(pumps.start("west")), pumps.client(pumps.start("other"))
    src = pumps.memory(east, 1 << 20)
    dst, elsewhere = pumps.memory(west, 1 << 20, fill=0), pumps.memory(other, 1 << 20, fill=0)
    warm = lease_on(west, dst)
    assert send_all(east, warm.grant, src, dst).wait(K_WAIT_S).ok
    os.kill(pumps.pid("west"), signal.SIGSTOP)
    waiting = send_all(east, lease_on(west, dst).grant, src, dst)
    assert send_all(east, lease_on(other, elsewhere).grant, src, elsewhere).wait(K_WAIT_S).ok
    time.sleep(1.0)
    assert waiting.outcome is None
    os.kill(pumps.pid("west"), signal.SIGCONT)
    assert waiting.wait(K_WAIT_S).ok
    assert landed(src, dst)


def test_connections_that_are_reset_before_a_busy_pump_comes_to_them_do_it_no_harm(pumps):
    east, config = pumps.client(pumps.start("east")), pumps.start("west")
    west = pumps.client(config)
    os.kill(pumps.pid("west"), signal.SIGSTOP)
    for _ in range(20):
        with socket.create_connection(split_address(west.address)) as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    os.kill(pumps.pid("west"), signal.SIGCONT)
    src, dst = pumps.memory(east, 1 << 16), pumps.memory(west, 1 << 16, fill=0)
    assert send_all(east, lease_on(west, dst).grant, src, dst).wait(K_WAIT_S).ok
    assert landed(src, dst)
    assert west.pump_pid == pumps.pid("west")
    assert "Traceback" not in pumps.log("west")


def test_versions_n_and_n_minus_1_interoperate(pumps):
    old = pumps.client(pumps.start("old", protocol_versions=(1, 1)))
    new = pumps.client(pumps.start("new"))
    for a, b in ((old, new), (new, old)):
        src, dst = pumps.memory(a, 1 << 20), pumps.memory(b, 1 << 20, fill=0)
        assert send_all(a, lease_on(b, dst).grant, src, dst).wait(K_WAIT_S).ok
        assert landed(src, dst)
    before = pumps.client(pumps.start("before", protocol_versions=(1, 2)))
    for a, b in ((before, new), (new, before), (new, old)):
        src, dst = pumps.memory(a, 1 << 20), pumps.memory(b, 2 << 20, fill=0)
        assert send_slices(a, lease_on(b, dst).grant, src, dst).wait(K_WAIT_S).ok
        assert np.array_equal(dst.reshape(-1, 2, K_SLICE_BYTES)[:, 0].reshape(-1), src)
    future = pumps.client(pumps.start("future", protocol_versions=(4, 5)))
    dst = pumps.memory(future, 1 << 20, fill=0)
    src = pumps.memory(new, 1 << 20)
    assert not send_all(new, lease_on(future, dst).grant, src, dst, deadline_s=1.0).wait(K_WAIT_S).ok


@pytest.mark.parametrize("block_bytes", [64 << 10, 2 << 20])
def test_slices_that_an_older_pump_goes_on_with_arrive_or_fail_for_its_version(pumps, block_bytes):
    """It takes the place of a newer one; and it can't take blocks of so many pieces."""
    east = pumps.client(pumps.start("east", block_bytes=block_bytes))
    config = pumps.start("west", block_bytes=block_bytes)
    west = pumps.client(config, start=False)
    src, dst = pumps.memory(east, 1 << 20), pumps.memory(west, 2 << 20, fill=0)
    lease = lease_on(west, dst)
    assert send_slices(east, lease.grant, src, dst).wait(K_WAIT_S).ok  # the newer one's version is known
    dst[:] = 0
    os.kill(pumps.pid("west"), signal.SIGSTOP)
    transfer = send_slices(east, lease.grant, src, dst)
    time.sleep(0.2)
    pumps.kill("west")
    pumps.start("west", listen=west.address, block_bytes=block_bytes, protocol_versions=(1, 2))
    outcome = transfer.wait(K_WAIT_S)
    if block_bytes == 64 << 10:
        assert outcome.ok
        assert np.array_equal(dst.reshape(-1, 2, K_SLICE_BYTES)[:, 0].reshape(-1), src)
    else:
        assert (outcome.ok, outcome.reason) == (False, FailureReason.VERSION)
        assert "16384 pieces" in outcome.detail
