# shellcheck shell=bash
# A moving average of the policy acts in the value targets, and a penalty keeps the policy close to it.
question "Does KL regularisation stabilise learning?"

for coef in 0.1 1; do
  for tau in 0.003 0.01 0.03; do
    run bmpc.py "coef_${coef}__tau_$tau" \
      --td-target-use-ema-policy --policy-trust-region-coef "$coef" --policy-ema-tau "$tau"
  done
done
