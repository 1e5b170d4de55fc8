#!/usr/bin/env bash
# What only a GPU can tell, the most valuable part first, in at most ten minutes of one card:
#
#   bash benchmarks/gpu.sh                      all parts
#   bash benchmarks/gpu.sh tests inference      these parts
#
# PYTHON: the interpreter, .venv/bin/python unless set. OUT: a folder that is not there yet, runs/gpu
# unless set. It gets a log of every part and results.jsonl, the JSON lines of the benchmarks with
# the name of the card; keep that file as benchmarks/results/gpu_CARD.jsonl. A part that fails or
# needs more than its time does not stop the others; the last lines say how each ended.
# SMOKE=1: tiny networks and few steps, to try the script on a CPU.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-.venv/bin/python}
out=${OUT:-runs/gpu}
parts="tests atmorep_size large_size fsdp inference members reference"
for name in "$@"; do
    if [[ " $parts " != *" $name "* ]]; then
        echo "$name: no such part; valid: ${parts// /, }" >&2
        exit 2
    fi
done
if [[ -e $out ]]; then
    echo "OUT=$out exists; give a folder that does not" >&2
    exit 2
fi
mkdir -p "$out"
export BENCHMARK_RESULTS=$out/results

precise=(trainer.precision=bf16-mixed trainer.compile=true)
from_store=(data.catalog="$out/catalog.yaml" data=waves data.num_workers=12)
atmorep=(experiment=atmorep_temperature data.batch_size=32 "${precise[@]}" "${from_store[@]}")
large=(experiment=arco_large data.batch_size=8 trainer.recompute=none "${precise[@]}"
    "${from_store[@]}" "stream.atmosphere.variables=[temperature,u_component_of_wind,v_component_of_wind]")
fsdp=(experiment=quickstart trainer=fsdp trainer.devices=1 trainer.max_steps=30
    optimizer.warmup_steps=5)
reference=(experiment=reference_joint data.batch_size=16 trainer.max_steps=1200 "${precise[@]}")
days=30 dates=8 patience=1 cost=("${precise[@]}")
if [[ ${SMOKE:-0} == 1 ]]; then
    small=(model=tiny data.batch_size=1 data.num_workers=0 trainer.compile=false)
    atmorep+=("${small[@]}") large+=("${small[@]}" trainer.precision=32-true)
    fsdp+=(model=tiny trainer.accelerator=cpu trainer.precision=32-true trainer.max_steps=6)
    reference+=(model=tiny model.ensemble=noise "warm_start.checkpoints=[]" data.batch_size=1
        trainer.compile=false trainer.precision=32-true trainer.max_steps=2 optimizer.warmup_steps=1)
    days=10 dates=1 patience=4 cost=(model.dim=32)
fi

# NAME: whether the part was asked for.
asked() {
    [[ ${#chosen[@]} == 0 || " ${chosen[*]} " == *" $1 "* ]]
}

# NAME SECONDS COMMAND...: runs a part within its time and keeps what it prints.
part() {
    local name=$1 limit=$(($2 * patience)) status
    shift 2
    asked "$name" || return 0
    printf '\n== %s (at most %s s)\n' "$name" "$limit"
    timeout --signal=INT --kill-after=10 "$limit" "$@" 2>&1 | tee "$out/$name.log"
    status=${PIPESTATUS[0]}
    grep -h '^{"benchmark"' "$out/$name.log" >> "$out/results.jsonl"
    ended+=("$name: $([[ $status == 0 ]] && echo done || echo "exit status $status")")
}

chosen=("$@") ended=()
part tests 150 "$python" -m pytest -m gpu -q -n 0 -p no:cacheprovider tests
if asked atmorep_size || asked large_size; then
    "$python" -m benchmarks.window_store "$out/waves.zarr" --days "$days"
    "$python" -m atmossl data add "$out/waves.zarr" name=waves data.catalog="$out/catalog.yaml"
fi
part atmorep_size 75 "$python" -m benchmarks.train_step "${atmorep[@]}"
part large_size 75 "$python" -m benchmarks.train_step "${large[@]}"
part fsdp 45 "$python" -m atmossl train "${fsdp[@]}" paths.output="$out/fsdp"
part inference 45 "$python" -m benchmarks.inference --dates "$dates" --batch-size "$dates"
part members 45 "$python" -m benchmarks.joint --cost "${cost[@]}"
part reference 150 "$python" -m atmossl train "${reference[@]}" paths.output="$out/reference"
printf '\n'
printf '%s\n' "${ended[@]}"
