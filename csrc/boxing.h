// LibTorch Stable ABI: the one place that includes it. Schemas are defined from Python
// (fastcov/ops/library.py), which also checks arguments and reports errors: texts of errors thrown
// here are lost. The checks here only keep a wrong call from touching foreign memory.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

namespace fastcov {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

}  // namespace fastcov
