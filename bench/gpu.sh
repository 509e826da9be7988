#!/usr/bin/env bash
# Everything that wants a CUDA device, in under 10 minutes and 70 GB: the tests marked gpu, then the grid of benchmarks,
# whose rows are appended to bench/results/<device>.jsonl. A grid that runs out of its minutes keeps the rows it has.
# Needs `pip install .[dev]`; flash-attn and cut-cross-entropy take part where they are installed.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

python -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 1; }
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm,clocks.mem --format=csv

failed=0
timed() { # seconds, then a command
  timeout "$@"
  local code=$?
  [ "$code" -eq 124 ] && echo "out of time: $*" >&2
  [ "$code" -ne 0 ] && failed=1
}
timed 80 python -m pytest -q -m gpu tests
timed 150 python -m pytest -q --benchmark-disable-gc bench/bench_attention.py bench/bench_splice.py
timed 340 python -m pytest -q --benchmark-disable-gc bench/bench_head.py

for rows in bench/results/*.jsonl; do
  [ "$rows" = bench/results/cpu.jsonl ] || python bench/table.py "$rows"
done
exit "$failed"
