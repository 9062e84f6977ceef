# shellcheck shell=bash
# What every sweep of the plan shares. One decision is one step: 200 000 steps are 400 000 env steps on dog-run.
seeds 1 2
flags --task dog-run --steps 200000
