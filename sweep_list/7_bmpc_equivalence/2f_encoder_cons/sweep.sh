# shellcheck shell=bash
# The consistency loss once more, with its gradient into the encoder. The baseline has none of it.
question "Does reverse consistency help the encoder?"

for coef in 0.1 1; do
  run bmpc.py "coef_$coef" --encoder-consistency-coef "$coef"
done
