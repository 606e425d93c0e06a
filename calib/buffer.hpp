// Scratch memory of the forward pass: cache-line aligned floats that are not cleared, and a pool of work
// areas that threads borrow, so that no loop allocates.
#pragma once

#include <cstddef>
#include <memory>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

namespace fireq::calib {

template <typename T>
struct AlignedAllocator {
  using value_type = T;
  static constexpr std::align_val_t kAlignment{64};

  AlignedAllocator() = default;
  template <typename U>
  explicit AlignedAllocator(const AlignedAllocator<U>& /*other*/) noexcept {}

  T* allocate(std::size_t n) { return static_cast<T*>(::operator new(n * sizeof(T), kAlignment)); }
  void deallocate(T* p, std::size_t /*n*/) noexcept { ::operator delete(p, kAlignment); }
  // resize() leaves the new elements as they are: every buffer is written before it is read.
  template <typename U>
  void construct(U* p) noexcept {
    ::new (static_cast<void*>(p)) U;
  }
  template <typename U, typename... Args>
  void construct(U* p, Args&&... args) {
    ::new (static_cast<void*>(p)) U(std::forward<Args>(args)...);
  }
  template <typename U>
  bool operator==(const AlignedAllocator<U>& /*other*/) const noexcept {
    return true;
  }
};

using FloatBuffer = std::vector<float, AlignedAllocator<float>>;

// Row stride in floats for k columns that keeps rows off one another's cache sets: a whole number of cache
// lines, one more than a multiple of two lines.
inline std::size_t padded_stride(std::size_t k) noexcept {
  return (k + 31) / 32 * 32 + 16;
}

// Work areas handed out to whoever runs; at most one per running thread is ever made.
template <typename Area>
class Pool {
 public:
  class Loan {
   public:
    explicit Loan(Pool& pool) : pool_(pool), area_(pool.take()) {}
    ~Loan() { pool_.give(std::move(area_)); }
    Loan(const Loan&) = delete;
    Loan& operator=(const Loan&) = delete;
    Area& operator*() noexcept { return *area_; }
    Area* operator->() noexcept { return area_.get(); }

   private:
    Pool& pool_;
    std::unique_ptr<Area> area_;
  };

 private:
  std::unique_ptr<Area> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (free_.empty()) return std::make_unique<Area>();
    std::unique_ptr<Area> area = std::move(free_.back());
    free_.pop_back();
    return area;
  }
  void give(std::unique_ptr<Area> area) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(std::move(area));
  }

  std::mutex mutex_;
  std::vector<std::unique_ptr<Area>> free_;
};

}  // namespace fireq::calib
