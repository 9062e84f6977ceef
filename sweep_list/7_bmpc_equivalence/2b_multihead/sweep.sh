# shellcheck shell=bash
# Two dynamics heads. How large should the bonus for their disagreement be in planning, and should each value head learn
# from its own target or all from a shared one?
question "How should the ensemble's uncertainty be used?"

for coef in 0 0.3 1; do
  for bootstrap in off on; do
    run bmpc_multihead.py "std_coef_${coef}__local_bootstrap_$bootstrap" \
      --planner-num-dynamics-heads 2 --ensemble-lr-scaling \
      --planner-value-std-coef-train "$coef" "$(switch local-td-bootstrap "$bootstrap")"
  done
done
