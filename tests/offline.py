"""A pytest plugin that keeps tests off the network: sockets reach this machine only, and hubs are not asked."""

import os
import socket

import pytest

OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE")
LOOPBACK = ("127.", "::1", "localhost", "0.0.0.0")

# For libraries that are yet to be imported and for processes that tests start; the guard below stops all others.
os.environ.update(dict.fromkeys(OFFLINE, "1"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True, scope="session")
def no_network():
    """Refuse every connection that leaves the machine."""
    connect = socket.socket.connect

    def guarded(self, address):
        if self.family != socket.AF_UNIX and not str(address[0]).startswith(LOOPBACK):
            raise RuntimeError(f"tests run offline; something tried to reach {address}")
        return connect(self, address)

    socket.socket.connect = guarded
    yield
    socket.socket.connect = connect
