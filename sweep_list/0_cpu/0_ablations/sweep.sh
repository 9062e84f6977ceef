# shellcheck shell=bash
# The whole plan, baseline included, at the small size: the plan's own folders under these settings.
seeds 1 2
flags --task cartpole-swingup

include 7_bmpc_equivalence
