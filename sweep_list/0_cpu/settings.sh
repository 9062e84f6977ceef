# shellcheck shell=bash
# What two CPU cores can carry. The numbers compare with each other, not with full-size runs. Each sweep says how small.
seeds 1 2 3
flags --preset small
