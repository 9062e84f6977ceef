# shellcheck shell=bash
# The baseline at a small size on five tasks, about 22 decisions a second on one core. Three seeds describe it; they are
# compared with nothing, so no power is stated.
question "What does the small baseline learn?"
seeds 1 2 3
flags --steps 12500 # 25 000 env steps

for task in cartpole-swingup walker-walk reacher-easy finger-spin cheetah-run; do
  run bmpc.py baseline --task "$task"
done
