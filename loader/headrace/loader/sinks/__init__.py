"""Where tensors end up when that is not host memory. See `device.Device`."""
