"""Runs the eigenvalue kernels on a GPU under compute-sanitizer: memory, races, barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "synccheck")
TEST = "tests/ops/test_eigen_gpu.py"
ERROR_STATUS = 9


def main() -> int:
    """One line a tool; the status says whether all are clean."""
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        sys.stderr.write(
            "compute-sanitizer is not on PATH: it comes with the CUDA toolkit "
            "(package cuda-sanitizer)\n"
        )
        return 2
    # Each tensor its own allocation, or an access beyond one would land in another.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    dirty = []
    for tool in TOOLS:
        command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_STATUS)]
        command += ["--kernel-name", "kns=eigen_", "--target-processes", "all"]
        command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        # Plugins that the project's own options need may be missing here.
        command += ["-o", "addopts=--import-mode=importlib"]
        command += [TEST, "-k", "test_every_class_once", *sys.argv[1:]]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        # A machine without a GPU leaves the test out: that is no clean run.
        is_clean = run.returncode == 0 and "1 passed" in run.stdout
        sys.stdout.write(f"{tool}: {'clean' if is_clean else 'NOT clean'}\n")
        sys.stdout.flush()  # what is known stays known if the next tool outlasts the session
        if not is_clean:
            dirty.append(tool)
            sys.stdout.write(run.stdout[-6000:] + run.stderr[-2000:])
    return 1 if dirty else 0


if __name__ == "__main__":
    sys.exit(main())
