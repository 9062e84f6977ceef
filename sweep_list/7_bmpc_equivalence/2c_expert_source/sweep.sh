# shellcheck shell=bash
# Where the mean of the expert and the first expert of a row in the replay buffer come from. The configuration with both
# flags on equals the baseline. It is run nevertheless: the report checks that the curves of the two are identical.
question "Which source of expert targets is best?"

for chosen in on off; do
  for behavior in on off; do
    run bmpc.py "chosen_action_${chosen}__from_behavior_$behavior" \
      "$(switch reanalyze-use-chosen-action "$chosen")" "$(switch initial-expert-from-behavior "$behavior")"
  done
done
