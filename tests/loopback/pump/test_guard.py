"""Taking memory back: whoever withdraws it, and however many do at once, waits for the copy that runs."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import closing

from prfaas.pump_client.guard import K_WORD, GuardTable

K_COPYING = """
import fcntl, sys
fd, slot, size = map(int, sys.argv[1:])
fcntl.lockf(fd, fcntl.LOCK_EX, size, slot * size)
print("copying", flush=True)
sys.stdin.read()
"""


def test_a_second_thread_that_withdraws_waits_for_the_running_copy_as_the_first_does() -> None:
    with closing(GuardTable()) as guards:
        slot, word = guards.take()
        copying = subprocess.Popen(
            [sys.executable, "-c", K_COPYING, str(guards.fd), str(slot), str(K_WORD.size)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, pass_fds=[guards.fd],
        )  # fmt: skip
        with copying:
            assert copying.stdout
            assert copying.stdout.readline() == "copying\n"
            first, second = (threading.Thread(target=guards.withdraw, args=(slot, word)) for _ in range(2))
            first.start()
            while (slot, word) not in guards._ending:
                first.join(0.01)
            second.start()
            second.join(0.3)
            assert second.is_alive(), "it returned while bytes may still be written"
            assert copying.stdin
            copying.stdin.close()
            for thread in (first, second):
                thread.join(20)
                assert not thread.is_alive()
        guards.withdraw(slot, word)  # once withdrawn, nothing happens
        assert guards.take()[1] > word


def test_many_threads_withdraw_and_take_without_a_slot_lost_or_given_twice() -> None:
    with closing(GuardTable()) as guards:
        taken: list[tuple[int, int]] = []
        free_before = len(guards._free)

        def work() -> None:
            for _ in range(50):
                mark = guards.take()
                taken.append(mark)
                others = [threading.Thread(target=guards.withdraw, args=mark) for _ in range(3)]
                for thread in others:
                    thread.start()
                for thread in others:
                    thread.join()

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(taken) == len({word for _, word in taken}) == 200
        assert len(guards._free) == len(set(guards._free)) == free_before
        assert not guards._ending
