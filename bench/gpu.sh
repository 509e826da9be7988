#!/usr/bin/env bash
# Everything that wants a CUDA device, in under 10 minutes and 70 GB: bench/gpu.sh [FOLDER], which gets the rows as
# <device>.jsonl (bench/results without it). First the tests marked gpu, then the grids of benchmarks, each in a process
# of its own: after an illegal access nothing else runs in that one. A grid out of its minutes keeps the rows it has.
# Nothing is installed or downloaded. torch, triton, pytest and pytest-benchmark have to be there; the others take part
# where they are, and the first lines say which are not.
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1
rows=$(realpath -m "${1:-bench/results}")
export PYTHONPATH="$PWD:$PWD/kernels${PYTHONPATH:+:$PYTHONPATH}" # the tests start processes that pytest's own path misses

missing() { # modules; prints those that are not there
  python3 - "$@" <<'EOF'
import sys
from importlib.util import find_spec
print(*[name for name in sys.argv[1:] if find_spec(name) is None])
EOF
}
needed=$(missing torch triton pytest pytest_benchmark)
[ -z "$needed" ] || { echo "not installed: $needed" >&2; exit 1; }
python3 -c 'import torch; raise SystemExit(not torch.cuda.is_available())' || { echo "no CUDA device" >&2; exit 1; }
nvidia-smi --query-gpu=name,driver_version,power.limit,clocks.sm,clocks.mem --format=csv
python3 -c 'import platform, torch, triton
print("Python", platform.python_version(), "torch", torch.__version__, "triton", triton.__version__)'
peers=$(missing trl liger_kernel cut_cross_entropy flash_attn)
steps=$(missing transformers deepspeed pydantic datasets peft av trl)
[ -z "$peers" ] || echo "not installed, so only a row with the reason: $peers"
[ -z "$steps" ] || echo "not installed, so no whole steps: $steps"

failed=0
timed() { # seconds, then arguments of pytest; the interrupt lets pytest say what it had done
  timeout --signal=INT --kill-after=10 "$1" python3 -m pytest -q -p no:cacheprovider "${@:2}"
  local code=$?
  [ "$code" -eq 124 ] && echo "out of time after $1 s: ${*:2}" >&2
  [ "$code" -eq 0 ] || failed=1
}
bench=(--benchmark-disable-gc --rows "$rows")
mapfile -t tests < <(grep -rl --include='test_*.py' 'mark\.gpu' tests) # others import what may be missing here
timed 90 -m gpu "${tests[@]}"
timed 75 "${bench[@]}" bench/bench_attention.py
timed 45 "${bench[@]}" bench/bench_splice.py
if [ -z "$steps" ]; then
  timed 150 "${bench[@]}" -s bench/bench_step_trl.py bench/bench_step_frames.py
  timed 210 "${bench[@]}" bench/bench_head.py
else
  timed 360 "${bench[@]}" bench/bench_head.py
fi

for file in "$rows"/*.jsonl; do
  [ ! -e "$file" ] || [ "$(basename "$file")" = cpu.jsonl ] || python3 bench/table.py "$file"
done
exit "$failed"
