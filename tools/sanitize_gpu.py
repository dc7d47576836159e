"""Check of CUDA kernels on a GPU by one tool of compute-sanitizer: memory, races or barriers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

TOOLS = ("memcheck", "racecheck", "synccheck")
TEST = "tests/ops/test_eigen_gpu.py"
ERROR_STATUS = 9
# Words of the sanitizer where a container or driver does not let it look into kernels.
REFUSALS = (
    "Device not supported",
    "not supported on this device",
    "Insufficient permissions",
    "insufficient driver permissions",
    "Failed to initialize",
    "Unable to find injection library",
)


def main() -> int:
    """One line about one tool; the status says whether it is clean, or cannot be had here."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] not in TOOLS:
        sys.stderr.write(f"name a tool, one of {', '.join(TOOLS)}, then options of pytest\n")
        return 2
    tool, *options = arguments
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        sys.stdout.write(f"{tool}: not available: no compute-sanitizer (package cuda-sanitizer)\n")
        return 0
    # Each tensor its own allocation, or an access beyond one would land in another.
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [sanitizer, "--tool", tool, "--error-exitcode", str(ERROR_STATUS)]
    command += ["--kernel-name", "kns=eigen_", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    # Plugins that the project's own options need may be missing here.
    command += ["-o", "addopts=--import-mode=importlib"]
    command += [TEST, "-k", "test_every_class_once", *options]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    output = run.stdout + run.stderr
    # A machine without a GPU leaves the test out: that is no clean run.
    if run.returncode == 0 and " passed" in run.stdout:
        sys.stdout.write(f"{tool}: clean\n")
        return 0
    refusal = next((line for line in output.splitlines() if any(r in line for r in REFUSALS)), None)
    if refusal is not None and run.returncode != ERROR_STATUS:
        sys.stdout.write(f"{tool}: not available: {refusal.strip(' =')}\n")
        return 0
    sys.stdout.write(f"{tool}: NOT clean\n{run.stdout[-6000:]}{run.stderr[-2000:]}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
