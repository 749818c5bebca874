"""Who holds which chunk, and who may read which chunk from the origin."""
