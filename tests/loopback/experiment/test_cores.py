"""A core of its own for one thread, on real processes."""

import os
import subprocess
import sys

import pytest

from prfaas.model.errors import PrfaasError
from prfaas_testbed.experiment.cores import OwnCore, scheduler_of

K_TITLED = "import sys, time; print('up', flush=True); time.sleep(60)"
K_PARENT = """
import subprocess, sys
child = subprocess.Popen(["sglang::scheduler", "-c", sys.argv[1]], executable=sys.executable)
child.wait()
"""

needs_two_cores = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core here")


@pytest.fixture
def started():
    running = []

    def start(*words):
        process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE)
        running.append(process)
        assert process.stdout.readline() == b"up\n"
        return process

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


@needs_two_cores
def test_one_process_has_the_core_and_all_others_of_ours_the_rest_also_after_a_second_is_given_it(started):
    every = os.sched_getaffinity(0)
    first, other = started("-c", K_TITLED), started("-c", K_TITLED)
    with OwnCore() as core:
        own = core.give(first.pid)
        assert os.sched_getaffinity(first.pid) == {own}
        assert os.sched_getaffinity(other.pid) == os.sched_getaffinity(0) == every - {own}
        second = started("-c", K_TITLED)
        assert os.sched_getaffinity(second.pid) == every - {own}
        assert core.give(second.pid) == own
        assert os.sched_getaffinity(second.pid) == {own}
        assert os.sched_getaffinity(first.pid) == every - {own}
    assert os.sched_getaffinity(0) == every


def test_the_process_in_which_the_model_runs_is_found_by_its_name_and_missed_where_there_is_none(started):
    server = started("-c", K_PARENT, K_TITLED)
    scheduler = scheduler_of(server.pid)
    assert scheduler != server.pid
    os.kill(scheduler, 9)
    plain = started("-c", K_TITLED)
    with pytest.raises(PrfaasError, match="no scheduler"):
        scheduler_of(plain.pid)
