"""The guard against network use works, or the suite could not claim to run offline."""

import socket

import pytest


def test_nothing_leaves_the_machine():
    with socket.socket() as outside, pytest.raises(RuntimeError, match="offline"):
        outside.connect(("192.0.2.1", 80))


def test_the_machine_itself_is_reachable():
    with socket.socket() as server, socket.socket() as client:
        server.bind(("127.0.0.1", 0))
        server.listen()
        client.connect(server.getsockname())
