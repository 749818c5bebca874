"""Chunks between nodes: the server, the client, and how they know each other."""
