"""What depends on the machine: BLAS, the device, files that are kept."""
