#!/usr/bin/env bash
# What a machine with a GPU has to answer, in parts of less than ten minutes each:
#
#   tools/gpu_session.sh build      the compiled libraries, for this machine's GPU
#   tools/gpu_session.sh test       pytest -m gpu
#   tools/gpu_session.sh sanitize   the CUDA kernels under compute-sanitizer
#   tools/gpu_session.sh bench      the table of targets (fastcov bench --gpu)
#   tools/gpu_session.sh compiled   compiled training steps
#
# Several parts may be named. Needs Python 3.11 or newer with torch, numpy and pytest, and nvcc, cmake and
# ninja; installs nothing. Every part first builds what has changed. PYTHON names the interpreter
# (default python3); OUT the folder of logs and results (default runs/gpu). With PACK=1 a part that has
# ended leaves one file, PART.tgz.
set -uo pipefail
cd "$(dirname "$0")/.."

PYTHON=${PYTHON:-python3}
OUT=${OUT:-runs/gpu}
PARTS="build test sanitize bench compiled"
LIMIT_S=570
export PYTHONPATH="$PWD:$PWD/detection${PYTHONPATH:+:$PYTHONPATH}"

stop() {
	echo "gpu_session: $*" >&2
	exit 2
}

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
mkdir -p "$OUT" build
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

run_part() {
	case $1 in
	build) build ;;
	test) gpu_tests ;;
	sanitize) "$PYTHON" tools/sanitize_gpu.py ;;
	bench) bench ;;
	compiled) bench --only '*-compiled' ;;
	esac
}

# Files with GPU tests alone, and none of the options that plugins bring: other packages of the test
# environment may be missing here.
gpu_tests() {
	# A test that hangs in a kernel is told by its name and, after two minutes, by where it hangs.
	grep -rlE 'mark\.gpu' --include='test_*.py' tests | xargs "$PYTHON" -u -m pytest -m gpu -v -ra \
		-o addopts=--import-mode=importlib -o faulthandler_timeout=120 -o timeout=150 \
		-o timeout_method=thread --junitxml="$OUT/test.xml"
}

bench() {
	"$PYTHON" -u -c 'import sys; from fastcov.bench import main; sys.exit(main())' \
		--gpu --out "$OUT/bench" "$@"
}

note() {
	PART=$1 STATUS=$2 SECONDS_TAKEN=$3 "$PYTHON" - "$OUT/$1.json" << 'PY'
import json, os, pathlib, subprocess, sys
import torch

def answer(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None

content = {
    "part": os.environ["PART"],
    "status": int(os.environ["STATUS"]),
    "seconds": int(os.environ["SECONDS_TAKEN"]),
    "device": torch.cuda.get_device_name(),
    "driver": answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    "torch": torch.__version__,
    "commit": answer("git", "rev-parse", "HEAD"),
}
path = pathlib.Path(sys.argv[1])
part = path.with_suffix(".part")
part.write_text(json.dumps(content, indent=1) + "\n")
part.replace(path)
PY
}

pack() {
	(
		cd "$OUT" || exit
		files=()
		for file in "$1" "$1".json "$1".log "$1".xml; do [ ! -e "$file" ] || files+=("$file"); done
		tar -czf "$1.tgz" "${files[@]}" && rm -rf "${files[@]}"
	)
}

export -f build gpu_tests bench run_part
export PYTHON OUT capability
failed=""
for part in "$@"; do
	begin=$SECONDS
	# What a part does counts from here; its build is the first thing that it does.
	timeout --kill-after=10 "$LIMIT_S" bash -c '
		if [ "$0" != build ]; then build > build/rebuild.log 2>&1 || { cat build/rebuild.log; exit 1; }; fi
		run_part "$0"' "$part" 2>&1 | tee "$OUT/$part.log"
	status=${PIPESTATUS[0]}
	note "$part" "$status" $((SECONDS - begin))
	[ "${PACK:-}" != 1 ] || pack "$part"
	echo "gpu_session: $part: status $status after $((SECONDS - begin)) s"
	[ "$status" -eq 0 ] || failed="$failed $part"
done
[ -z "$failed" ] || {
	echo "gpu_session: failed:$failed" >&2
	exit 1
}
