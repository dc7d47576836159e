#!/usr/bin/env bash
# What a machine with a GPU has to answer, in calls of at most eight minutes each:
#
#   tools/gpu_session.sh build             the compiled libraries, for this machine's GPU
#   tools/gpu_session.sh kernels           Triton's kernels into its cache, 16 processes at a time
#   tools/gpu_session.sh test              pytest -m gpu, each file in a process of its own
#   tools/gpu_session.sh sanitize-TOOL     memcheck, racecheck or synccheck of the CUDA kernels
#   tools/gpu_session.sh bench-CASE        one case of fastcov bench --gpu: covariance, eigen, hooks, snapshot,
#                                          training-NETWORK or training-NETWORK-compiled
#   tools/gpu_session.sh list              these parts, one a line, in the order in which they should run
#
# Several parts may be named; each has eight minutes. `test` called again goes on with the files that have not run.
# Needs Python 3.11 or newer with torch, numpy and pytest, and nvcc, cmake and ninja; installs nothing. Every part first
# builds what has changed. PYTHON names the interpreter (default python3); OUT the folder of results (default runs/gpu),
# in which each part that has ended leaves one archive, PART.tgz, and one line in status.jsonl.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
LIMIT_S=${LIMIT_S:-480}
FILE_S=${FILE_S:-240} # of one file of tests
NETWORKS="resnet50 vit faster_rcnn"
PARTS="build kernels test bench-hooks bench-covariance bench-eigen bench-snapshot"
for network in $NETWORKS; do PARTS+=" bench-training-$network"; done
for tool in memcheck racecheck synccheck; do PARTS+=" sanitize-$tool"; done
for network in $NETWORKS; do PARTS+=" bench-training-$network-compiled"; done
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin"
export PYTHONPATH="$PWD:$PWD/detection${PYTHONPATH:+:$PYTHONPATH}"

stop() {
	echo "gpu_session: $*" >&2
	exit 2
}

[ "${1:-}" != list ] || { tr ' ' '\n' <<< "$PARTS"; exit 0; }
[ $# -gt 0 ] || stop "name one or more of: $PARTS"
for part in "$@"; do
	[[ " $PARTS " == *" $part "* ]] || stop "no part '$part': choose of $PARTS"
done
for tool in "$PYTHON" nvcc cmake ninja; do
	command -v "$tool" > /dev/null || stop "$tool is not on PATH"
done
"$PYTHON" -c 'import numpy, pytest, torch' || stop "$PYTHON needs numpy, pytest and torch"
capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2> /dev/null) ||
	stop "torch finds no CUDA device here"
mkdir -p "$OUT" build/gpu
OUT=$(cd "$OUT" && pwd)

# Of the virtual environment's cmake or the system's: only the compilers and torch's headers matter.
build() {
	FASTCOV_CUDA=1 FASTCOV_CUDA_ARCHS=$capability cmake -S . -B build/gpu -G Ninja \
		-DPython3_EXECUTABLE="$(command -v "$PYTHON")" --log-level=WARNING &&
		cmake --build build/gpu -- --quiet &&
		cmake --install build/gpu --prefix "$PWD" > build/gpu/install.log &&
		"$PYTHON" -c '
import fastcov
for name, backend in fastcov.backends().items():
    print(f"{name}: {backend}")
assert fastcov.backends()["cuda"].active, "the CUDA library is not active"'
}

# A file's errors that stick to its process, and its hang, cost that file alone. None of the options that plugins bring:
# other packages of the test environment may be missing here.
gpu_tests() {
	local folder=$OUT/test begin=$SECONDS file name left failed=0
	mkdir -p "$folder"
	for file in $(grep -rlE 'mark\.gpu' --include='test_*.py' tests | sort); do
		name=$(tr '/' '-' <<< "${file%.py}")
		[ ! -e "$folder/$name.status" ] || continue
		left=$((LIMIT_S - 20 - (SECONDS - begin)))
		[ "$left" -gt "$FILE_S" ] || [ "$left" -ge 60 ] || { echo "not run yet, call again: $file"; failed=3; continue; }
		# A test that hangs in a kernel is told by its name and, after two minutes, by where it hangs.
		timeout --kill-after=10 $((left < FILE_S ? left : FILE_S)) "$PYTHON" -u -m pytest "$file" -m gpu -v -ra -o addopts=--import-mode=importlib \
			-o faulthandler_timeout=120 --junitxml="$folder/$name.xml" > "$folder/$name.log" 2>&1
		echo $? > "$folder/$name.status"
		echo "$file: status $(cat "$folder/$name.status"): $(tail -1 "$folder/$name.log")"
		[ "$(cat "$folder/$name.status")" -eq 0 ] || failed=1
	done
	return $failed
}

run_part() {
	case $1 in
	build) build ;;
	kernels) "$PYTHON" -m tests.kernels.aot --cache "$capability" --workers 16 ;;
	test) gpu_tests ;;
	sanitize-*) "$PYTHON" tools/sanitize_gpu.py "${1#sanitize-}" ;;
	bench-*)
		"$PYTHON" -u -c 'import sys; from fastcov.bench import main; sys.exit(main())' --gpu --only "${1#bench-}" \
			--seconds $((LIMIT_S - 60)) --out "$OUT/$1"
		;;
	esac
}

note() {
	PART=$1 STATUS=$2 SECONDS_TAKEN=$3 "$PYTHON" - >> "$OUT/status.jsonl" << 'PY'
import json, os, subprocess
import torch

def answer(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None

print(json.dumps({
    "part": os.environ["PART"],
    "status": int(os.environ["STATUS"]),
    "seconds": int(os.environ["SECONDS_TAKEN"]),
    "device": torch.cuda.get_device_name(),
    "driver": answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    "torch": torch.__version__,
    "commit": answer("git", "rev-parse", "HEAD"),
}))
PY
}

pack() {
	(
		cd "$OUT" || exit
		files=()
		for file in "$1" "$1.log"; do [ ! -e "$file" ] || files+=("$file"); done
		tar -czf "$1.tgz" "${files[@]}"
	)
}

export -f build gpu_tests run_part
export PYTHON OUT LIMIT_S FILE_S capability
failed=""
for part in "$@"; do
	begin=$SECONDS
	# What a part does counts from here; its build is the first thing that it does.
	timeout --kill-after=10 "$LIMIT_S" bash -c '
		if [ "$0" != build ]; then build > build/gpu/rebuild.log 2>&1 || { cat build/gpu/rebuild.log; exit 1; }; fi
		run_part "$0"' "$part" 2>&1 | tee "$OUT/$part.log"
	status=${PIPESTATUS[0]}
	note "$part" "$status" $((SECONDS - begin))
	pack "$part"
	echo "gpu_session: $part: status $status after $((SECONDS - begin)) s"
	[ "$status" -eq 0 ] || failed="$failed $part"
done
[ -z "$failed" ] || {
	echo "gpu_session: failed:$failed" >&2
	exit 1
}
