# shellcheck shell=bash
# Sweeps for two CPU cores. Their numbers compare with each other, not with full-size runs. Each sweep states its size.
seeds 1 2 3
flags --preset small
