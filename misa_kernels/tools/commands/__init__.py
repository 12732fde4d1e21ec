"""The commands of `python -m misa_kernels`, a module each: what its arguments are, and what it prints."""
