# shellcheck shell=bash
# The baseline at a small size, on five tasks: about 17 decisions a second on one core.
question "What does the small baseline learn?"
flags --steps 12500 --eval-freq 2500 --eval-episodes 5                            # 25 000 env steps, six evaluations
flags --enc-dim 128 --mlp-dim 128 --latent-dim 128                                # narrow layers
flags --num-samples 128 --num-elites 16 --num-pi-trajs 8 --batch-size 128         # a quarter of the candidates
flags --reanalyze-batch-size 10                                                   # the same share of a batch

for task in cartpole-swingup walker-walk reacher-easy finger-spin cheetah-run; do
  run bmpc.py baseline --task "$task"
done
