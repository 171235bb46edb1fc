"""The kernels. Nothing here allocates or launches."""
