#!/usr/bin/env bash
# Everything that needs a GPU, in one go or in pieces of less than ten minutes; half an hour in all, no network:
#
#   benchmarks/gpu/run.sh [--out DIR] [--dry-run] [--record] [build] [first] [test] [sanitize] [kernels] [step]
#
# Results go to DIR (or $OUT; benchmarks/results by default) as <device>-<commit>.json and .md after every table.
# --dry-run (or FASTSLIM_DRY_RUN=1) rehearses the stages on a machine without a GPU. See stages.py.
set -euo pipefail
exec "${PYTHON:-python3}" "$(dirname "$0")/stages.py" "$@"
