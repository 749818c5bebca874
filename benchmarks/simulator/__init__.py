"""The same policy as the agents', over a model of links and nodes."""
