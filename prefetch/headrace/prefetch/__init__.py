"""The node's agent: stages for others on this node, serves other nodes, and watches over its processes."""
