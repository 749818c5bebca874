"""Several processes of one node load together, and the bytes come off the disk once. See `session`."""
