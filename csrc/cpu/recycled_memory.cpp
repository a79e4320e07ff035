#include "cpu/recycled_memory.h"

#include <torch/csrc/stable/library.h>

#include <mutex>

namespace moat_kernels::cpu {
namespace {

#if defined(__linux__)

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kSmallest = kHugePage;  // below, the C library keeps blocks itself

struct Block {
  void* data;
  size_t size;  // whole huge pages
};

class KeptBlocks {
 public:
  // A block of `size` bytes, null if there is no memory. Nobody waits for the lock: a process that
  // was forked while another thread held it never gets it, and does without kept blocks.
  void* take(size_t size) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (lock) {
      for (size_t i = blocks_.size(); i-- > 0;) {
        if (blocks_[i].size != size) continue;
        void* data = blocks_[i].data;
        blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(i));
        return data;
      }
      unmap_oldest(size);
    }
    return map(size);
  }

  void give_back(Block block) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) {
      munmap(block.data, block.size);
      return;
    }
#if defined(MADV_FREE)
    madvise(block.data, block.size, MADV_FREE);
#endif
    blocks_.push_back(block);
  }

  size_t release() {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    return lock ? unmap_oldest(SIZE_MAX) : 0;
  }

 private:
  // At least `size` bytes in all, if there are as many.
  size_t unmap_oldest(size_t size) {
    size_t total = 0;
    while (total < size && !blocks_.empty()) {
      total += blocks_.front().size;
      munmap(blocks_.front().data, blocks_.front().size);
      blocks_.erase(blocks_.begin());
    }
    return total;
  }

  static void* map(size_t size) {
    void* memory =
        mmap(nullptr, size + kHugePage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return nullptr;
    // What lies before and behind whole huge pages goes back.
    char* begin = static_cast<char*>(memory);
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(begin) % kHugePage) % kHugePage;
    if (before > 0) munmap(begin, before);
    munmap(begin + before + size, kHugePage - before);
    madvise(begin + before, size, MADV_HUGEPAGE);
    return begin + before;
  }

  std::mutex mutex_;
  std::vector<Block> blocks_;  // oldest first
};

// Never destroyed: tensors may outlive static objects.
KeptBlocks& kept_blocks() {
  static KeptBlocks* const blocks = new KeptBlocks;
  return *blocks;
}

#endif

int64_t release_memory() {
#if defined(__linux__)
  return static_cast<int64_t>(kept_blocks().release());
#else
  return 0;
#endif
}

}  // namespace

Tensor recycled_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
#if defined(__linux__)
  size_t bytes = type == ScalarType::Float ? 4 : 2;
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  if (bytes >= kSmallest) {
    const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = kept_blocks().take(size);
    STD_TORCH_CHECK(data, "mbconv: no memory for ", static_cast<int64_t>(bytes), " bytes");
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
    return torch::stable::from_blob(data, sizes, strides, like.device(), type, [size](void* block) {
      kept_blocks().give_back({block, size});
    });
  }
#endif
  return torch::stable::new_empty(like, sizes, type);
}

}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_release_memory", TORCH_BOX(&moat_kernels::cpu::release_memory));
}
