"""The command line: one verb per file, and the place where the parts are put together."""
