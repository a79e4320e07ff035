#pragma once

#include "cpu/common/mbconv_problem.h"
#include "cpu/common/per_isa.h"

namespace moat_kernels::cpu {

// A piece of the output of one image, or of `images` whole ones: rows [first_row, last_row), and of
// the sum over the E channels the blocks [first_block, last_block).
struct MBConvTask {
  int64_t image, images, first_row, last_row, first_block, last_block;
  // A block's weights when it comes to it: best where no other task or strip needs them.
  bool packs;
};

}  // namespace moat_kernels::cpu

// How a call is computed; sizes are in floats.
//
//   mbconv_eval_fold            vectors that all blocks share -> packed
//   mbconv_eval_pack            a block's weights with the norms folded in -> packed; left out with
//                               MBConvTask::packs, where each task packs the blocks that it comes
//                               to
//   without squeeze-excite, per task:
//     mbconv_eval_bottleneck   -> a partial sum [rows, result columns] over the task's blocks
//     mbconv_eval_finish       partial sums of all blocks, shortcut -> output
//   with it, each step for all tasks of an image before the next:
//     mbconv_eval_stencil      -> gated input [blocks, pixels, block pitch], and sums over the
//                              task's rows
//     mbconv_eval_gate         -> gate [E]
//     mbconv_eval_project      -> a partial sum as above, then mbconv_eval_finish
MOAT_KERNELS_DECLARE_PER_ISA(
    int64_t mbconv_eval_blocks(const MBConvProblem& problem);
    int64_t mbconv_eval_packed_size(const MBConvProblem& problem, bool with_blocks);
    int64_t mbconv_eval_scratch_size(const MBConvProblem& problem);
    int64_t mbconv_eval_result_columns(const MBConvProblem& problem);
    int64_t mbconv_eval_gated_size(const MBConvProblem& problem);
    int64_t mbconv_eval_gate_size(const MBConvProblem& problem);
    int64_t mbconv_eval_strip_rows(const MBConvProblem& problem);
    bool mbconv_eval_groups(const MBConvProblem& problem);
    void mbconv_eval_fold(const MBConvProblem& problem, float* packed);
    void mbconv_eval_pack(const MBConvProblem& problem, int64_t block, float* packed);
    void mbconv_eval_bottleneck(const MBConvProblem& problem, const float* packed,
                                const MBConvTask& task, float* scratch, float* partial);
    void mbconv_eval_fused(const MBConvProblem& problem, const float* packed,
                           const MBConvTask& task, float* scratch);
    void mbconv_eval_finish(const MBConvProblem& problem, const float* packed,
                            const MBConvTask& task, float* scratch, float* partials, int64_t parts,
                            int64_t part_stride);
    void mbconv_eval_stencil(const MBConvProblem& problem, const float* packed,
                             const MBConvTask& task, float* scratch, float* gated, float* sums);
    void mbconv_eval_gate(const MBConvProblem& problem, const float* sums, int64_t parts,
                          int64_t part_stride, float* scratch, float* gate);
    void mbconv_eval_project(const MBConvProblem& problem, const float* packed,
                             const MBConvTask& task, float* scratch, const float* gated,
                             const float* gate);)
