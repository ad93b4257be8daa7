#!/usr/bin/env bash
# All measurements on one GPU, in under 8 minutes and without a network; results go to ${OUT:-bench/results}.
# Packages that the machine's python lacks are taken from wheels in .whl/ (or ${WHEELS}); pure Python, they need no pip.
# Flags are those of bench/gpu.py: --tiny tries the script on a CPU, --data DIR takes other images.
set -euo pipefail
cd "$(dirname "$0")/.."
for wheel in "${WHEELS:-.whl}"/*.whl; do
    [ -e "$wheel" ] && PYTHONPATH="$(realpath "$wheel")${PYTHONPATH:+:$PYTHONPATH}"
done
export PYTHONPATH="${PYTHONPATH:-}" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
exec "${PYTHON:-python3}" bench/gpu.py --output "${OUT:-bench/results}" "$@"
