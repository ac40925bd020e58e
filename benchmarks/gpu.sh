#!/usr/bin/env bash
# The tables of one GPU, in one call of less than nine minutes; nothing is downloaded.
#
#     bash benchmarks/gpu.sh
#
# Every model gets an equal part of the time that is left. A contender that there is no time for, or that does not
# fit into memory, is a row that says so; a model that there is no time for is left out. Settings, from the
# environment: LIMIT (seconds), MODELS, GROUPS_OF_ROWS, DEVICE, BACKEND, ROUNDS, RESULTS (a folder), PYTHON.
set -uo pipefail
cd "$(dirname "$0")/.."
limit=${LIMIT:-520} device=${DEVICE:-cuda} results=${RESULTS:-benchmarks/results}
read -ra models <<<"${MODELS:-gpt2 vit resnet50}"
read -ra groups <<<"${GROUPS_OF_ROWS:-ours variants peers}"
least=20 # seconds: with less, nothing is begun
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

left() { echo $((limit - SECONDS)); }

# table SECONDS SCRIPT ARGUMENT...: one script with a budget; it is ended where it takes half as long again
table() {
    local budget=$1 script=$2 patience
    patience=$((budget * 3 / 2 < $(left) ? budget * 3 / 2 : $(left)))
    timeout "$patience" "${PYTHON:-python3}" "benchmarks/$script" --device "$device" --results "$results" \
        --backend "${BACKEND:-inductor}" --budget "$budget" "${@:3}" || echo "no table of $script ${*:3}: exit status $?"
}

parts=$((${#models[@]} + 1)) # the tables of times, and that of memory
for model in "${models[@]}"; do
    if (($(left) < least)); then
        echo "$model is left out: $(left) s left"
        continue
    fi
    table $(($(left) / parts)) step_time.py --model "$model" "${groups[@]/#/--group=}" --precision high \
        --rounds "${ROUNDS:-20}" --seconds 30
    parts=$((parts - 1))
done
if (($(left) >= least)); then
    table $(($(left) * 9 / 10)) apart.py --model "${models[0]}" --group ours --once
fi
"${PYTHON:-python3}" benchmarks/goals.py --device "$device" --results "$results"
echo "$SECONDS s"
