#!/usr/bin/env bash
# Everything that needs a GPU, in one go: build with CUDA, GPU tests, compute-sanitizer, benchmarks.
# Result files name the device, the versions and the commit: benchmarks/results/<device>-<commit>.*
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON="${PYTHON:-python3}"

if ! command -v nvidia-smi >/dev/null || ! device=$(nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null); then
  echo "benchmarks/gpu/run.sh needs an NVIDIA GPU: nvidia-smi is missing or finds none" >&2
  exit 1
fi
command -v nvcc >/dev/null || { echo "benchmarks/gpu/run.sh needs nvcc on PATH" >&2; exit 1; }
"$PYTHON" -c 'import torch, sys; sys.exit(None if torch.cuda.is_available() else f"torch {torch.__version__} cannot use this GPU: install a CUDA build of torch")'

commit=$(git rev-parse --short HEAD 2>/dev/null || echo unknown)
name="$(head -n1 <<<"$device" | tr -cs 'A-Za-z0-9\n' '-' | sed 's/-*$//')-$commit"
mkdir -p benchmarks/results
result="benchmarks/results/$name"

FASTSLIM_CUDA=1 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -e .
{
  date -u +%FT%TZ
  nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader
  nvcc --version | tail -n 2
  "$PYTHON" -m fastslim.info
} | tee "$result.txt"

"$PYTHON" -m pytest -m gpu tests 2>&1 | tee -a "$result.txt"
if command -v compute-sanitizer >/dev/null; then
  compute-sanitizer --error-exitcode 1 --target-processes all "$PYTHON" -m pytest -q -m gpu tests 2>&1 | tee -a "$result.txt"
else
  echo "compute-sanitizer is not installed: memory check left out" | tee -a "$result.txt"
fi
# Exit status 5: no benchmark is marked gpu yet.
{ "$PYTHON" -m pytest -m gpu benchmarks --benchmark-json="$result.json" || [ $? -eq 5 ]; } 2>&1 | tee -a "$result.txt"
echo "results: $result.txt $result.json"
