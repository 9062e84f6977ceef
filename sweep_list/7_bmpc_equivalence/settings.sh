# shellcheck shell=bash
# Settings of every sweep of the plan. A step is one decision: 200 000 steps are 400 000 env steps on dog-run.
seeds 1 2
flags --task dog-run --steps 200000
