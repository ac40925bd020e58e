#!/usr/bin/env bash
# The tables of one GPU, in one call of less than nine minutes; nothing is downloaded.
#
#     bash benchmarks/gpu.sh
#
# Earlier models get more of the time. A contender that there is no time for, or that does not
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

# table SECONDS SCRIPT ARGUMENT...: one script with a budget after which it begins nothing; it is ended at the limit
table() {
    local budget=$1 script=$2
    timeout "$(left)" "${PYTHON:-python3}" "benchmarks/$script" --device "$device" --results "$results" \
        --backend "${BACKEND:-inductor}" --budget "$budget" "${@:3}" || echo "no table of $script ${*:3}: exit status $?"
}

if [[ $device == cuda ]] && (($(left) >= 3 * least)); then
    timeout 60 "${PYTHON:-python3}" benchmarks/symmetric.py --results "$results" --budget 40 || echo "no table of symmetric.py"
fi
parts=$((${#models[@]} + 1)) # the tables of times, and that of memory
for model in "${models[@]}"; do
    if (($(left) < least)); then
        echo "$model is left out: $(left) s left"
        continue
    fi
    table $(($(left) * 2 / (parts + 1))) step_time.py --model "$model" "${groups[@]/#/--group=}" --precision high \
        --rounds "${ROUNDS:-20}" --seconds 30
    parts=$((parts - 1))
done
if (($(left) >= least)); then
    table $(($(left) * 9 / 10)) apart.py --model "${models[0]}" --group ours --once
fi
"${PYTHON:-python3}" benchmarks/goals.py --device "$device" --results "$results"
echo "$SECONDS s"
