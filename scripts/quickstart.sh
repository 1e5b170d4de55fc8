#!/usr/bin/env bash
# From nothing to zero-shot weather maps: installs, trains the demo experiment on the embedded
# sample, runs three tasks on held-out dates and scores them. Some minutes on two cores.
#
#   bash scripts/quickstart.sh [OVERRIDE ...]     overrides go to `atmossl train`
#   QUICKSTART_SMOKE=1 bash scripts/quickstart.sh     a few steps into a temporary folder, for CI
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

bash scripts/setup.sh train,report
atmossl=.venv/bin/atmossl
tasks=(forecast temporal_interpolation downscaling)

train_settings=("$@")
predict_settings=(every=16) # every 16th time of the test run: some dates four days apart
evaluate_settings=(every=4 ridge=false) # the ridge baseline would take minutes more
if [[ ${QUICKSTART_SMOKE:-0} == 1 ]]; then
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
    run="$scratch/quickstart"
    train_settings=(model=tiny optimizer.warmup_steps=1 trainer.max_steps=4
        trainer.validation_interval=4 trainer.checkpoint_interval=4 trainer.validation_batches=1 "$@")
    predict_settings=(every=1000) # the first time only
    evaluate_settings=(every=24 bootstrap=20 ridge=false)
else
    # Never write over an earlier run: quickstart, quickstart-2, quickstart-3, ...
    run=runs/quickstart
    for ((number = 2; ; number++)); do
        [[ -e $run ]] || break
        run="runs/quickstart-$number"
    done
fi

step() {
    printf '\n== %s\n' "$*"
}

step "1/3 train -> $run"
"$atmossl" train experiment=quickstart paths.output="$run" "${train_settings[@]}"
checkpoint="$run/checkpoints/last.ckpt"

step "2/3 predict ${tasks[*]}"
for task in "${tasks[@]}"; do
    "$atmossl" predict task="$task" checkpoint="$checkpoint" data=sample init_time=all \
        output="$run/predictions/$task.zarr" "${predict_settings[@]}"
done

step "3/3 evaluate, ends in a report"
"$atmossl" evaluate checkpoint="$checkpoint" tasks="[$(IFS=,; echo "${tasks[*]}")]" \
    output="$run/report" "${evaluate_settings[@]}"

step "done; look at"
cat <<END
report                $run/report/index.html   (one page; open it in a browser)
score table           $run/report/summary.md, scores.csv
maps                  $run/report/maps/*.png   (truth, prediction, error, spread)
training curves       $run/curves/*.png
predictions           $run/predictions/*.zarr
checkpoint            $checkpoint
END
