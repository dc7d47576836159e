// The counted gather's launch on the host, for Python: what lies behind addresses is its own
// memory.
#include "gather_counted_cuda.h"

extern "C" int gather_counted(const fastcov::CountedGather* at, const void* rows) {
  return fastcov::launch_gather_counted(*at, rows, nullptr);
}
