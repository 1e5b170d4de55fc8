#!/usr/bin/env bash
# From nothing to zero-shot weather maps: installs, trains the demo experiment on the embedded
# sample, runs three tasks on held-out dates and scores them; then forecasts with the checkpoint
# default_joint of the repository, whose members are whole fields. Some minutes on two cores.
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
# Two days ahead in passes of 12 h, of two dates: the decoder runs once for every member and pass.
members_settings=(tasks.forecast.lead_time=48h tasks.forecast.rollout_time=12h every=80 ridge=false)
if [[ ${QUICKSTART_SMOKE:-0} == 1 ]]; then
    scratch="$(mktemp -d)"
    trap 'rm -rf "$scratch"' EXIT
    run="$scratch/quickstart"
    train_settings=(model=tiny optimizer.warmup_steps=1 trainer.max_steps=4
        trainer.validation_interval=4 trainer.checkpoint_interval=4 trainer.validation_batches=1 "$@")
    predict_settings=(every=1000) # the first time only
    evaluate_settings=(every=24 bootstrap=20 ridge=false)
    members_settings=(every=1000 bootstrap=20 members=3 ridge=false)
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

step "1/4 train -> $run"
"$atmossl" train experiment=quickstart paths.output="$run" "${train_settings[@]}"
checkpoint="$run/checkpoints/last.ckpt"

step "2/4 predict ${tasks[*]}"
for task in "${tasks[@]}"; do
    "$atmossl" predict task="$task" checkpoint="$checkpoint" data=sample init_time=all \
        output="$run/predictions/$task.zarr" "${predict_settings[@]}"
done

step "3/4 evaluate, ends in a report"
"$atmossl" evaluate checkpoint="$checkpoint" tasks="[$(IFS=,; echo "${tasks[*]}")]" \
    output="$run/report" "${evaluate_settings[@]}"

step "4/4 forecast with members that are whole fields (checkpoint default_joint)"
"$atmossl" evaluate checkpoint=default_joint tasks='[forecast]' output="$run/members" \
    "${members_settings[@]}"

step "done; look at"
cat <<END
report                $run/report/index.html   (one page; open it in a browser)
members               $run/members/index.html  (single members of default_joint, plumes of box means)
score table           $run/report/summary.md, scores.csv
maps                  $run/report/maps/*.png   (truth, prediction, error, spread)
training curves       $run/curves/*.png
predictions           $run/predictions/*.zarr
checkpoint            $checkpoint
END
