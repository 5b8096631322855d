"""Published systems, each composed of kernels."""
