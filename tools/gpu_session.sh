#!/usr/bin/env bash
# What a machine with a GPU has to answer, in three calls of at most ten minutes each:
#
#   tools/gpu_session.sh call-1            build, kernels, test: whether it is right
#   tools/gpu_session.sh call-2            the benchmarks that promises are judged by
#   tools/gpu_session.sh call-3            sanitizers, compiled training steps
#
# or part by part, each in at most eight minutes:
#
#   tools/gpu_session.sh build             the compiled libraries, for this machine's GPU
#   tools/gpu_session.sh kernels           Triton's kernels into its cache, 16 processes at a time
#   tools/gpu_session.sh test              pytest -m gpu, each file in a process of its own, three at a time
#   tools/gpu_session.sh sanitize-TOOL     memcheck, racecheck or synccheck of the CUDA kernels
#   tools/gpu_session.sh bench-CASE        one case of fastcov bench --gpu: covariance, eigen, hooks, snapshot,
#                                          training-NETWORK or training-NETWORK-compiled
#   tools/gpu_session.sh list              these parts, one a line, in the order in which they should run
#
# Several parts may be named. `test` called again goes on with the files that have not run. Needs Python 3.11 or newer with
# torch, numpy and pytest; installs nothing. Every part first builds what has changed, for which it needs nvcc, cmake and
# ninja; where one of them is missing, or PREBUILT=1 says so, the libraries in fastcov/lib are taken as they are. PYTHON names
# the interpreter (default python3); OUT the folder of results (default runs/gpu), in which each part that has ended leaves one
# archive, PART.tgz, and one line in status.jsonl.
set -uo pipefail
cd "$(dirname "$0")/.." || exit

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
LIMIT_S=${LIMIT_S:-480} # of one part
CALL_S=${CALL_S:-570}   # of all parts together, where call-N is named
LEAST_S=${LEAST_S:-40}  # left of them, or no part begins
FILE_S=${FILE_S:-240} # of one file of tests
NETWORKS="resnet50 vit faster_rcnn"
PARTS="build kernels test bench-hooks bench-covariance bench-eigen bench-snapshot"
for network in $NETWORKS; do PARTS+=" bench-training-$network"; done
for tool in memcheck racecheck synccheck; do PARTS+=" sanitize-$tool"; done
for network in $NETWORKS; do PARTS+=" bench-training-$network-compiled"; done
CALL_1="build kernels test"
CALL_3=$(tr ' ' '\n' <<< "$PARTS" | grep -E '^sanitize-|-compiled$' | tr '\n' ' ')
CALL_2=$(tr ' ' '\n' <<< "$PARTS" | grep '^bench-' | grep -v -- '-compiled$' | tr '\n' ' ')
export PATH="$PATH:${CUDA_HOME:-/usr/local/cuda}/bin:/usr/local/cuda/bin"
export PYTHONPATH="$PWD:$PWD/detection${PYTHONPATH:+:$PYTHONPATH}"

stop() {
	echo "gpu_session: $*" >&2
	exit 2
}

[ "${1:-}" != list ] || { tr ' ' '\n' <<< "$PARTS"; exit 0; }
[ $# -gt 0 ] || stop "name call-1, call-2 or call-3, or one or more of: $PARTS"
ends_s=
case $1 in
call-1) set -- $CALL_1; ends_s=$CALL_S ;;
call-2) set -- $CALL_2; ends_s=$CALL_S ;;
call-3) set -- $CALL_3; ends_s=$CALL_S ;;
esac
for part in "$@"; do
	[[ " $PARTS " == *" $part "* ]] || stop "no part '$part': choose of call-1, call-2, call-3, $PARTS"
done
command -v "$PYTHON" > /dev/null || stop "$PYTHON is not on PATH"
PREBUILT=${PREBUILT:-}
for tool in nvcc cmake ninja; do
	command -v "$tool" > /dev/null || { PREBUILT=1; echo "gpu_session: $tool is not on PATH: fastcov/lib is taken as it is"; }
done
"$PYTHON" -c 'import numpy, pytest, torch' || stop "$PYTHON needs numpy, pytest and torch"
capability=$("$PYTHON" -c 'import torch; print("%d%d" % torch.cuda.get_device_capability())' 2> /dev/null) ||
	stop "torch finds no CUDA device here"
mkdir -p "$OUT" build/gpu
OUT=$(cd "$OUT" && pwd)

# Of the virtual environment's cmake or the system's: only the compilers and torch's headers matter.
build() {
	if [ -z "$PREBUILT" ]; then
		FASTCOV_CUDA=1 FASTCOV_CUDA_ARCHS=$capability cmake -S . -B build/gpu -G Ninja \
			-DPython3_EXECUTABLE="$(command -v "$PYTHON")" --log-level=WARNING &&
			cmake --build build/gpu -- --quiet &&
			cmake --install build/gpu --prefix "$PWD" > build/gpu/install.log || return 1
	fi
	"$PYTHON" -c '
import fastcov
for name, backend in fastcov.backends().items():
    print(f"{name}: {backend}")
assert fastcov.backends()["cuda"].active, "the CUDA library is not active"'
}

# A file's errors that stick to its process, and its hang, cost that file alone. None of the options that plugins bring:
# other packages of the test environment may be missing here.
gpu_tests_of() {
	local file=$1 folder=$OUT/test name left
	name=$(tr '/' '-' <<< "${file%.py}")
	[ ! -e "$folder/$name.status" ] || return 0
	left=$((ENDS_AT - $(date +%s)))
	[ "$left" -gt "$FILE_S" ] || [ "$left" -ge 60 ] || { echo "not run yet, call again: $file"; return 1; }
	# A test that hangs in a kernel is told by its name and, after two minutes, by where it hangs.
	timeout --kill-after=10 $((left < FILE_S ? left : FILE_S)) "$PYTHON" -u -m pytest "$file" -m gpu -v -ra -o addopts=--import-mode=importlib \
		-o faulthandler_timeout=120 --junitxml="$folder/$name.xml" > "$folder/$name.log" 2>&1
	echo $? > "$folder/$name.status"
	echo "$file: status $(cat "$folder/$name.status"): $(tail -1 "$folder/$name.log")"
	[ "$(cat "$folder/$name.status")" -eq 0 ]
}

gpu_tests() {
	mkdir -p "$OUT/test"
	ENDS_AT=$(($(date +%s) + PART_S - 20))
	export ENDS_AT
	grep -rlE 'mark\.gpu' --include='test_*.py' tests | sort | xargs -P 3 -I {} bash -c 'gpu_tests_of {}' || return 1
}

run_part() {
	case $1 in
	build) build ;;
	kernels) "$PYTHON" -m tests.kernels.aot --cache "$capability" --workers 16 ;;
	test) gpu_tests ;;
	sanitize-*) "$PYTHON" tools/sanitize_gpu.py "${1#sanitize-}" ;;
	bench-*)
		"$PYTHON" -u -c 'import sys; from fastcov.bench import main; sys.exit(main())' --gpu --only "${1#bench-}" \
			--seconds $((PART_S * 3 / 4)) --out "$OUT/$1"
		;;
	esac
}

# Seconds of a part within its call, so that no part takes those of the parts behind it.
share_of() {
	case $1 in
	build) echo 240 ;;
	kernels) echo 150 ;;
	bench-covariance) echo 140 ;;
	bench-eigen) echo 100 ;;
	bench-*-compiled) echo 130 ;;
	bench-training-*) echo 80 ;;
	bench-*) echo 40 ;;
	sanitize-*) echo 60 ;;
	*) echo "$LIMIT_S" ;;
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

export -f build gpu_tests gpu_tests_of run_part
export PYTHON OUT FILE_S PREBUILT PART_S capability
# A fresh machine finds what this one has compiled if the folder travels to it.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$PWD/build/gpu/triton}
failed="" left_out=""
for part in "$@"; do
	begin=$SECONDS
	PART_S=$LIMIT_S
	if [ -n "$ends_s" ]; then
		left=$((ends_s - begin))
		share=$(share_of "$part")
		[ "$left" -ge "$LEAST_S" ] || { left_out="$left_out $part"; continue; }
		PART_S=$((left < share ? left : share))
	fi
	# What a part does counts from here; its build is the first thing that it does.
	timeout --kill-after=10 "$PART_S" bash -c '
		if [ "$0" != build ]; then build > build/gpu/rebuild.log 2>&1 || { cat build/gpu/rebuild.log; exit 1; }; fi
		run_part "$0"' "$part" 2>&1 | tee "$OUT/$part.log"
	status=${PIPESTATUS[0]}
	note "$part" "$status" $((SECONDS - begin))
	pack "$part"
	echo "gpu_session: $part: status $status after $((SECONDS - begin)) s"
	[ "$status" -eq 0 ] || failed="$failed $part"
done
[ -z "$left_out" ] || echo "gpu_session: no time was left for:$left_out"
[ -z "$failed" ] || {
	echo "gpu_session: failed:$failed" >&2
	exit 1
}
[ -z "$left_out" ]
