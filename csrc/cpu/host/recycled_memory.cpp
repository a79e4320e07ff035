#include "cpu/host/recycled_memory.h"

#include <torch/csrc/stable/library.h>

#include <mutex>

namespace moat_kernels::cpu {
namespace {

#if defined(__linux__)

constexpr size_t kHugePage = size_t{1} << 21;
constexpr size_t kSmallest = kHugePage;  // below, the C library keeps blocks itself

struct Block {
  void* data;
  size_t size;          // whole huge pages
  uint64_t kept_since;  // a time, in blocks given back
  bool may_go;          // the system may take its pages
};

// Blocks that this many others came back after are out of use: a training step gives back some
// hundreds. (Telling the system of every block interrupts the other threads each time, 3 % of a
// training step of tiny_moat_0.)
constexpr uint64_t kIdle = 4096;

class KeptBlocks {
 public:
  // A block of `size` bytes, null if there is no memory. Nobody waits for the lock: a process that
  // was forked while another thread held it never gets it, and does without kept blocks.
  void* take(size_t size) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return map(size);
    for (size_t i = blocks_.size(); i-- > 0;) {  // what was written last may still be in cache
      if (blocks_[i].size == size) return remove(i).data;
    }
    const size_t larger = smallest_above(size);
    if (larger == blocks_.size()) return join(size);
    return cut(blocks_[larger], size);
  }

  void give_back(void* data, size_t size) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) {
      munmap(data, size);
      return;
    }
    ++time_;
    blocks_.push_back({data, size, time_, false});
    let_go_of_idle();
  }

  size_t release() {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    size_t total = 0;
    while (lock && !blocks_.empty()) {
      const Block block = remove(blocks_.size() - 1);
      munmap(block.data, block.size);
      total += block.size;
    }
    return total;
  }

 private:
  Block remove(size_t index) {
    const Block block = blocks_[index];
    blocks_.erase(blocks_.begin() + static_cast<std::ptrdiff_t>(index));
    return block;
  }

  // The index of the smallest block of more than `size` bytes; blocks_.size() if there is none.
  size_t smallest_above(size_t size) const {
    size_t best = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); ++i) {
      const bool fits = blocks_[i].size > size;
      if (fits && (best == blocks_.size() || blocks_[i].size < blocks_[best].size)) best = i;
    }
    return best;
  }

  static void* cut(Block& block, size_t size) {
    void* data = block.data;
    block.data = static_cast<char*>(data) + size;
    block.size -= size;
    return data;
  }

  // Blocks are in the order in which they came back, so the idle ones are the first.
  void let_go_of_idle() {
#if defined(MADV_FREE)
    for (Block& block : blocks_) {
      if (time_ - block.kept_since < kIdle) break;
      if (!block.may_go) madvise(block.data, block.size, MADV_FREE);
      block.may_go = true;
    }
#endif
  }

  // A new block that takes over the pages of kept ones, oldest first, as far as they reach: calls
  // of changing sizes neither touch new memory nor let more be kept than was in use at a time.
  void* join(size_t size) {
    char* data = static_cast<char*>(map(size));
    if (data == nullptr) return nullptr;
    for (size_t filled = 0; filled < size && !blocks_.empty(); filled += kHugePage) {
      // Page by page: the kernel moves no range that it keeps in several parts.
      Block& oldest = blocks_.front();
      void* page = cut(oldest, kHugePage);
      void* moved =
          mremap(page, kHugePage, kHugePage, MREMAP_MAYMOVE | MREMAP_FIXED, data + filled);
      if (moved == MAP_FAILED) munmap(page, kHugePage);
      if (oldest.size == 0) blocks_.erase(blocks_.begin());
    }
    return data;
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
  uint64_t time_ = 0;
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

size_t bytes_of(const std::vector<int64_t>& sizes, ScalarType type) {
  size_t bytes = type == ScalarType::Float ? 4 : 2;
  for (const int64_t size : sizes) bytes *= static_cast<size_t>(size);
  return bytes;
}

}  // namespace

Tensor recycled_tensor(const Tensor& like, std::vector<int64_t> sizes, ScalarType type) {
#if defined(__linux__)
  const size_t bytes = bytes_of(sizes, type);
  if (bytes >= kSmallest) {
    const size_t size = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    void* data = kept_blocks().take(size);
    STD_TORCH_CHECK(data, "mbconv: no memory for ", static_cast<int64_t>(bytes), " bytes");
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; --i) strides[i - 1] = strides[i] * sizes[i];
    return torch::stable::from_blob(data, sizes, strides, like.device(), type,
                                    [size](void* block) { kept_blocks().give_back(block, size); });
  }
#endif
  return torch::stable::new_empty(like, sizes, type);
}

Tensor empty_maps(const Tensor& like, const MapSize& size, ScalarType type) {
  const std::vector<int64_t> rows = {size.batch, size.height, size.width, size.channels};
  if (bytes_of(rows, type) >= static_cast<size_t>(kLargeBytes)) {
    const Tensor channels_behind =
        torch::stable::transpose(recycled_tensor(like, rows, type), 2, 3);
    return torch::stable::transpose(channels_behind, 1, 2);
  }
  return torch::stable::empty({size.batch, size.channels, size.height, size.width}, type,
                              std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

}  // namespace moat_kernels::cpu

STABLE_TORCH_LIBRARY_IMPL(moat_kernels, CompositeExplicitAutograd, library) {
  library.impl("cpu_release_memory", TORCH_BOX(&moat_kernels::cpu::release_memory));
}
