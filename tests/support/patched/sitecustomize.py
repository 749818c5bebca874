"""First on a node's path, this makes it another node: with a wrong clock, or of another version. Python imports it at
the start of every process of the node's agent.
"""

from __future__ import annotations

import os
import time

skew = float(os.environ.get("NODE_CLOCK_SKEW", "0"))
if skew:
    right = time.time
    time.time = lambda: right() + skew

version = os.environ.get("NODE_PEER_VERSION")
if version:
    from headrace.cache.peers import protocol

    major, _, minor = version.partition(".")
    protocol.MAJOR, protocol.MINOR, protocol.VERSION = int(major), int(minor), version
