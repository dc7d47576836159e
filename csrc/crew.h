// Several threads that work on one matrix. This is for code that is compiled once for each
// instruction set, so it uses no inline function of the standard library and no header of torch.
#pragma once

#include "team.h"

namespace fastcov {

struct Crew {
  int ranks;
  // Calls body(argument, begin, end) on threads that run at the same time. Their ranges make up [0,
  // ranks). It is not called where there is one rank.
  void (*run)(int ranks, void (*body)(void* argument, int begin, int end), void* argument);
};

inline namespace FASTCOV_LEVEL {

template <class Body>
void on_ranks(const Crew& crew, const Body& body) {
  if (crew.ranks == 1) {
    body(0, 1);
    return;
  }
  crew.run(
      crew.ranks,
      [](void* argument, int begin, int end) { (*static_cast<const Body*>(argument))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

// Calls body(index) for every index below `count`. A rank takes the next index when it is free.
template <class Body>
void deal(const Crew& crew, int count, const Body& body) {
  if (crew.ranks == 1 || count == 1) {
    for (int index = 0; index < count; ++index) body(index);
    return;
  }
  int next = 0;
  on_ranks(crew, [&](int, int) {
    for (int index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED); index < count;
         index = __atomic_fetch_add(&next, 1, __ATOMIC_RELAXED)) {
      body(index);
    }
  });
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
