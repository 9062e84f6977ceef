# shellcheck shell=bash
# Estimates what each departure of the defaults from the authors' hyperparameters changes: ten departures in twelve runs
# a task. A Plackett-Burman design (Biometrika 33, 1946) sets each departure to the default in six runs and to the
# official number in the other six, so every run informs on every departure. A configuration is named by the letters
# of the departures that are at their default. The eleventh column, K, changes nothing and estimates the noise. Each
# row has a seed of its own. effects.py computes the effects.
question "What does each departure from the official numbers cost?"
flags --steps 7500 --eval-freq 1500 --eval-episodes 4 # the area under the curve decides

official=(
  "--num-envs 1"                                                                  # A
  "--reanalyze-batch-size 20"                                                     # B
  "--consistency-coef 20 --no-normalize-rho-weights"                              # C
  "--enc-lr-scale 0.3"                                                            # D
  "--log-std-min -3 --reanalyze-log-std-min -2 --reanalyze-log-std-max 1"         # E
  "--min-std 0.05"                                                                # F
  "--expert-std-scale 1 --expert-std-min 0"                                       # G
  "--no-chosen-action-noise"                                                      # H
  "--entropy-coef 1e-4"                                                           # I
  "--eval-sample-elite"                                                           # J
)
letters=ABCDEFGHIJK
generator=11011100010 # its eleven rotations, and a row without any 1

for task in cheetah-run cartpole-swingup; do
  for ((row = 1; row <= 12; row++)); do
    levels=${generator:row-1}${generator:0:row-1} name="" changed=()
    ((row < 12)) || levels=00000000000
    for ((i = 0; i < 11; i++)); do
      if ((${levels:i:1})); then name+=${letters:i:1}; else read -ra words <<<"${official[i]-}"; changed+=("${words[@]}"); fi
    done
    seeds "$row"
    run bmpc.py "${name:-official}" --task "$task" "${changed[@]}"
  done
done
