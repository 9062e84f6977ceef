# shellcheck shell=bash
# The baseline at the small size, on five tasks.
question "What does the small baseline learn?"

for task in cartpole-swingup walker-walk reacher-easy finger-spin cheetah-run; do
  run bmpc.py baseline --task "$task"
done
