"""Read paths: how the bytes of one file come to where its tensors are. See `reader.FileReader`."""
