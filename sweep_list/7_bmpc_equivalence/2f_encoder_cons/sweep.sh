# shellcheck shell=bash
# A second consistency loss, whose gradient goes into the encoder only. The baseline does not have it.
question "Does reverse consistency help the encoder?"

for coef in 0.1 1; do
  run bmpc.py "coef_$coef" --encoder-consistency-coef "$coef"
done
