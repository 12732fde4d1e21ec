"""Measurements, run from the repository: `make bench` on the CPU, `make gpu` on a GPU."""
