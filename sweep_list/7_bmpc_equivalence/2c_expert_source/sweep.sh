# shellcheck shell=bash
# Where the expert's mean and a row's first expert come from. Both on is the baseline once more: it is run all the same,
# and the report checks that the curves coincide.
question "Which source of expert targets is best?"

for chosen in on off; do
  for behavior in on off; do
    run bmpc.py "chosen_action_${chosen}__from_behavior_$behavior" \
      "$(switch reanalyze-use-chosen-action "$chosen")" "$(switch initial-expert-from-behavior "$behavior")"
  done
done
