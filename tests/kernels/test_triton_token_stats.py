import os
import subprocess
import sys
from pathlib import Path

CHECKS = Path(__file__).parent / "interpreted_token_stats.py"
KERNELS = Path(__file__).parents[2] / "kernels"


def test_interpreted_kernels_equal_the_definition():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(KERNELS)}
    done = subprocess.run([sys.executable, str(CHECKS)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == CHECKS.read_text().count("\ndef check_")
