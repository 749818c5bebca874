"""The test bed itself: links have their speed, a cut is a cut, the origin's counter counts, nothing stays behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from support.command import wait_until
from support.namespaces import Network, Node, Rate, sweep
from support.origin import Origin

pytestmark = [pytest.mark.root, pytest.mark.service]

_PORT = 9000


def _connected(sender: Node, receiver: Node, timeout: float = 10) -> tuple[socket.socket, socket.socket]:
    with receiver.inside(), socket.create_server((receiver.address, _PORT)) as server:
        with sender.inside():
            one = socket.create_connection((receiver.address, _PORT), timeout=timeout)
        other, _ = server.accept()
    return one, other


def _megabits(sender: Node, receiver: Node, seconds: float) -> float:
    """What a plain copy brings, Mbit/s."""
    one, other = _connected(sender, receiver)
    received = 0

    def receive() -> None:
        nonlocal received
        buffer = bytearray(1 << 18)
        while count := other.recv_into(buffer):
            received += count

    thread = threading.Thread(target=receive)
    start = time.monotonic()
    with one, other:
        thread.start()
        while time.monotonic() < start + seconds:
            one.sendall(bytes(1 << 16))
        one.shutdown(socket.SHUT_WR)
        thread.join()
        return received * 8 / 1e6 / (time.monotonic() - start)


def _reaches(sender: Node, receiver: Node) -> bool:
    try:
        one, other = _connected(sender, receiver, timeout=0.3)
    except TimeoutError:
        return False
    one.close()
    other.close()
    return True


def test_a_link_is_no_faster_than_its_rate_either_way_and_may_change(network: Network) -> None:
    slow, fast = network.add("slow", Rate(up=80, down=40)), network.add("fast")
    # A quarter of a megabyte may pass at once.
    assert 0 < _megabits(slow, fast, 0.5) < 80 * 1.1
    assert 0 < _megabits(fast, slow, 0.5) < 40 * 1.2
    network.shape(slow, Rate(up=20, down=40))
    assert 0 < _megabits(slow, fast, 0.5) < 20 * 1.4


def test_a_cut_parts_two_groups_and_heals(network: Network) -> None:
    a, b, c, d = (network.add(name) for name in "abcd")
    network.cut([a, b], [c, d])
    assert _reaches(a, b)
    assert _reaches(d, c)
    assert not _reaches(a, c)
    assert not _reaches(d, b)
    network.heal()
    assert _reaches(a, c)


def test_what_a_killed_run_left_is_removed_and_what_a_living_one_has_is_kept(network: Network) -> None:
    network.add("mine")
    program = """
import subprocess, sys, time
from support.namespaces import Network
network = Network().start()
node = network.add("lost")
inside = subprocess.Popen(node.command("sleep", "600"))
print(node.name, inside.pid, flush=True)
time.sleep(600)
"""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=env) as run:
        assert run.stdout is not None
        name, inside = run.stdout.readline().split()
        assert name not in sweep()
        run.kill()
    assert name in sweep()
    assert not Path("/run/netns", name).exists()
    wait_until(lambda: not Path(f"/proc/{inside}").exists())
    assert network.nodes["mine"].path.exists()


def test_the_origin_counts_what_each_client_got(network: Network, origin: Origin) -> None:
    node, other = network.add("node"), network.add("other")
    origin.put({"weights": bytes(3_000_000)}, "model")
    origin.reads()
    # Everybody may read only what is signed: the counter sees the refusal, too.
    for client in (node, other):
        with client.inside(), pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
                f"{origin.url}/models/model/weights"
            )
        length = len(refused.value.read())
        refused.value.close()
        reads = origin.reads()
        assert [(r.client, r.kind, r.status, r.body) for r in reads.all] == [
            (client.address, "GET", 403, length)
        ]
    fetch = """
import boto3, sys
client = boto3.client("s3")
print(len(client.get_object(Bucket="models", Key="model/weights", Range="bytes=1000-")["Body"].read()))
client.head_object(Bucket="models", Key="model/weights")
client.list_objects_v2(Bucket="models", Prefix="model/")
"""
    env = {"PATH": os.environ["PATH"], **origin.environ}
    done = subprocess.run(
        node.command(sys.executable, "-c", fetch), capture_output=True, text=True, env=env, check=True
    )
    reads = origin.reads()
    assert reads.by_client() == {node.address: int(done.stdout)}
    assert reads.body() == 3_000_000 - 1000
    assert (reads.count("HEAD"), reads.count("LIST"), reads.count("GET")) == (1, 1, 1)
    assert reads.by_path("HEAD") == {"/models/model/weights": 1}
    assert origin.reads().all == ()
