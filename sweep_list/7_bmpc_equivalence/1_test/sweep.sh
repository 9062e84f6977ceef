# shellcheck shell=bash
# The baseline: every flag has its default. All other sweeps are compared with it.
question "What does the baseline reach?"

run bmpc.py baseline
