// Teams of host threads with real barriers: what runs on a GPU as warps, blocks and groups of
// blocks runs here as threads, so that ThreadSanitizer sees every access that lacks a barrier.
#pragma once

#include <pthread.h>

#include <memory>
#include <thread>
#include <vector>

#include "team.h"

namespace fastcov {

class Barrier {
 public:
  explicit Barrier(int threads) { pthread_barrier_init(&barrier_, nullptr, threads); }
  Barrier(const Barrier&) = delete;
  ~Barrier() { pthread_barrier_destroy(&barrier_); }
  void wait() { pthread_barrier_wait(&barrier_); }

 private:
  pthread_barrier_t barrier_;
};

// What the lanes of all members share.
struct ThreadShape {
  int members;
  int squads;
  int lanes;
  bool waits;  // false takes away the barrier of sync(): a control for ThreadSanitizer
  Barrier all;
  std::vector<std::unique_ptr<Barrier>> of_member;
  std::vector<std::unique_ptr<Barrier>> of_squad;
  std::vector<double> slots;  // one for each thread

  ThreadShape(int members, int squads, int lanes, bool waits)
      : members(members),
        squads(squads),
        lanes(lanes),
        waits(waits),
        all(members * squads * lanes),
        slots(static_cast<size_t>(members * squads * lanes)) {
    for (int m = 0; m < members; ++m) {
      of_member.push_back(std::make_unique<Barrier>(squads * lanes));
      for (int s = 0; s < squads; ++s) of_squad.push_back(std::make_unique<Barrier>(lanes));
    }
  }
};

// One lane of a block: squads are its warps.
class ThreadTeam {
 public:
  ThreadTeam(ThreadShape& shape, int number) : shape_(shape) {
    lane_ = number % shape.lanes;
    squad_ = number / shape.lanes % shape.squads;
    member_ = number / (shape.lanes * shape.squads);
  }
  int lane() const { return lane_; }
  int lanes() const { return shape_.lanes; }
  int squad() const { return squad_; }
  int squads() const { return shape_.squads; }
  int rank() const { return squad_ * shape_.lanes + lane_; }
  int size() const { return shape_.squads * shape_.lanes; }
  int member() const { return member_; }
  int members() const { return shape_.members; }
  bool owns(int i) const { return i / shape_.lanes % shape_.squads == squad_; }
  bool leads() const { return rank() == 0; }
  void squad_sync() { squad_barrier().wait(); }
  void sync() {
    if (shape_.waits) shape_.of_member[member_]->wait();
  }
  template <class Real>
  Real sum(Real value) {
    return reduce(value, [](Real a, Real b) { return a + b; });
  }
  template <class Real>
  Real maximum(Real value) {
    return reduce(value, [](Real a, Real b) { return a > b ? a : b; });
  }
  template <class Real>
  void add_sums(const Real (&sums)[4], Real* target, int count) {
    for (int c = 0; c < 4; ++c) {
      const Real total = sum(sums[c]);
      if (lane_ == c % shape_.lanes && c < count) target[c] += total;
    }
  }

 protected:
  template <class Value, class Combine>
  Value reduce(Value value, const Combine& combine) {
    Value* const slots = reinterpret_cast<Value*>(
        &shape_.slots[static_cast<size_t>((member_ * shape_.squads + squad_) * shape_.lanes)]);
    slots[lane_] = value;
    squad_barrier().wait();
    value = slots[0];
    for (int l = 1; l < shape_.lanes; ++l) value = combine(value, slots[l]);
    squad_barrier().wait();
    return value;
  }
  Barrier& squad_barrier() {
    return *shape_.of_squad[static_cast<size_t>(member_ * shape_.squads + squad_)];
  }

  ThreadShape& shape_;
  int lane_;
  int squad_;
  int member_;
};

// One lane of one of several blocks for a matrix: the block reduces together, its warps (squads of
// the shape) work on rows of their own.
class MemberThreadTeam : public ThreadTeam {
 public:
  using ThreadTeam::ThreadTeam;
  int lane() const { return rank(); }
  int lanes() const { return size(); }
  int squad() const { return 0; }
  int squads() const { return 1; }
  bool owns(int) const { return true; }
  void squad_sync() { shape_.of_member[static_cast<size_t>(member_)]->wait(); }
  void exchange() {
    if (shape_.waits) shape_.all.wait();
  }
  int row_lane() const { return lane_; }
  int row_lanes() const { return shape_.lanes; }
  int row_squad() const { return squad_; }
  int row_squads() const { return shape_.squads; }
  template <class Real>
  void store_sums(const Real (&sums)[4], Real* const (&targets)[4]) {
    for (int c = 0; c < 4; ++c) {
      const Real total = ThreadTeam::sum(sums[c]);
      if (lane_ == 0 && targets[c]) *targets[c] = total;
    }
  }
  template <class Real>
  Real sum(Real value) {
    return reduce_member(value, [](Real a, Real b) { return a + b; });
  }
  template <class Real>
  Real maximum(Real value) {
    return reduce_member(value, [](Real a, Real b) { return a > b ? a : b; });
  }

 private:
  template <class Real, class Combine>
  Real reduce_member(Real value, const Combine& combine) {
    Barrier& barrier = *shape_.of_member[static_cast<size_t>(member_)];
    Real* const slots =
        reinterpret_cast<Real*>(&shape_.slots[static_cast<size_t>(member_ * size())]);
    slots[rank()] = value;
    barrier.wait();
    value = slots[0];
    for (int l = 1; l < size(); ++l) value = combine(value, slots[l]);
    barrier.wait();
    return value;
  }
};

// Runs work(team) on a thread for each lane of each member.
template <class Team, class Work>
void run_threads(ThreadShape& shape, const Work& work) {
  std::vector<std::thread> threads;
  const int count = shape.members * shape.squads * shape.lanes;
  for (int number = 0; number < count; ++number) {
    threads.emplace_back([&shape, &work, number] {
      Team team(shape, number);
      work(team);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace fastcov
