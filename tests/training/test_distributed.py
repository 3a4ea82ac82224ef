"""Two processes (gloo): the same steps as one process makes with the whole batch."""

from __future__ import annotations

import socket

import pytest
from support import distributed

pytestmark = [pytest.mark.models, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.mark.parametrize("how", ["_data_parallel", "_fully_sharded"])
def test_two_processes_train_as_one(how):
    distributed.two_processes(how, free_port())
