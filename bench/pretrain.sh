#!/usr/bin/env bash
# The experiments on small ViTs (bench/pretrain.py), in pieces of under 8 minutes: call it again, and it goes on.
#   bench/pretrain.sh DIR            DIR holds cifar10/ and tiny32/; for a GPU
#   bench/pretrain.sh DIR --pilot    the same cut down, for two cores of a CPU: about two hours in all
# Without a network; pure Python packages that the machine's python lacks are taken from wheels in .whl/ (or ${WHEELS}).
set -euo pipefail
cd "$(dirname "$0")/.."
for wheel in "${WHEELS:-.whl}"/*.whl; do
    [ -e "$wheel" ] && PYTHONPATH="$(realpath "$wheel")${PYTHONPATH:+:$PYTHONPATH}"
done
export PYTHONPATH="${PYTHONPATH:-}"
data="${1:?DIR is missing: the folder that holds cifar10/ and tiny32/}"
exec "${PYTHON:-python3}" bench/pretrain.py --data "$data" --minutes "${MINUTES:-7.5}" \
    --results "${OUT:-bench/results}" "${@:2}"
