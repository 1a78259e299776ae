// What the skinny GEMM of gemm_sm90.h takes and refuses, and its launch (host).
#include "gemm_sm90.h"

#include <algorithm>

#include "gemm_kernel.h"
#include "gemm_maps.h"
#include "gemm_plan.h"
#include "gemm_wide_sm90.h"
#include "launch.cuh"

namespace openlora {
namespace {

GemmKernel kernel_of(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan) {
  const int side = gemm_side_tokens(plan);
  if (args.output == GemmOutput::kLogits) return head_gemm(side);
  switch (plan.form) {
    case GemmForm::kNarrow: return narrow_gemm(side);
    case GemmForm::kTall: return tall_gemm(side);
    case GemmForm::kBroad: return broad_gemm(side);
  }
  return {};
}

// Whether the accumulators can leave in the form that is asked for.
bool has_valid_output(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan) {
  if (args.output == GemmOutput::kLogits) return plan.form == GemmForm::kNarrow && plan.planes == 1 && args.wanted != nullptr && args.bests != nullptr;
  return args.output != GemmOutput::kSiluMul || (plan.planes == 1 && args.outputs % 16 == 0 && plan.tile_rows % 16 == 0);
}

bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

bool is_valid(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan) {
  return can_run_skinny_gemm(args.tokens, args.outputs, args.inputs) && args.tokens <= plan.tile_tokens && plan.tile_rows % 8 == 0 &&
         plan.tile_rows <= 64 * gemm_groups(plan.form) && gemm_shared_bytes(plan) <= kGemmSharedBytes && args.x_stride % 8 == 0 &&
         args.x_stride >= args.inputs && is_aligned(args.x) && is_aligned(args.w) && is_aligned(args.y) && has_valid_output(args, plan);
}

bool has_wgmma() { return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9; }

GemmWork work_of(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan) {
  GemmWork work{args.y, args.tokens, args.outputs};
  work.k_blocks = args.inputs / kGemmBlockK;
  work.planes = plan.planes;
  work.row_tiles = gemm_row_tiles(args.outputs, plan.tile_rows);
  work.tile_rows = plan.tile_rows;
  work.stages = plan.stages;
  work.ring_bytes = gemm_ring_bytes(plan);
  work.output = args.output;
  work.wanted = args.wanted;
  work.bests = static_cast<int2*>(args.bests);
  return work;
}

// As many as are resident, in whole neighbourhoods; of logits as many as their reader knows of.
int blocks_of(const SkinnyGemmArgs& args, const GemmWork& work, const GemmKernel& kernel) {
  const int most = args.output == GemmOutput::kLogits ? kGemmProcessors : processor_count();
  return std::min(work.row_tiles * work.planes, most / kernel.neighbours) * kernel.neighbours;
}

}  // namespace

bool can_run_skinny_gemm(int64_t tokens, int64_t outputs, int64_t inputs) { return gemm_can_run(tokens, outputs, inputs); }

bool is_skinny_gemm_faster(int64_t tokens, int64_t outputs, int64_t inputs, bool has_adapters) {
  return gemm_is_faster(tokens, outputs, inputs, has_adapters);
}

int skinny_gemm_planes(int64_t outputs, int64_t inputs) { return gemm_planes(outputs, inputs); }

int skinny_gemm_parts(int64_t outputs, int64_t inputs) { return gemm_parts(outputs, inputs); }

cudaError_t launch_skinny_gemm(const SkinnyGemmArgs& args, cudaStream_t stream) {
  if (!can_run_skinny_gemm(args.tokens, args.outputs, args.inputs)) return cudaErrorInvalidValue;
  const SkinnyGemmPlan plan = gemm_plan(args.tokens, args.outputs, args.inputs);
  if (is_valid(args, plan) && has_wgmma()) {
    const bool is_half = args.output == GemmOutput::kBfloat16 || args.output == GemmOutput::kSiluMul;
    if (is_half && gemm_is_wide(args.tokens, args.outputs, args.inputs, kGemmWideRows)) return launch_wide_gemm(args, stream);
    const bool is_head = args.output == GemmOutput::kLogits;
    if (is_head && gemm_is_wide_head(args.tokens, args.outputs, args.inputs)) return launch_wide_head(args, stream);
  }
  return launch_skinny_gemm_as(args, plan, stream);
}

cudaError_t launch_skinny_gemm_as(const SkinnyGemmArgs& args, const SkinnyGemmPlan& plan, cudaStream_t stream) {
  const GemmKernel kernel = is_valid(args, plan) ? kernel_of(args, plan) : GemmKernel{};
  if (kernel.run == nullptr) return cudaErrorInvalidValue;
  if (!has_wgmma()) return cudaErrorNotSupported;
  CUtensorMap w_map, x_map;
  if (!encode_w(&w_map, args, plan.tile_rows) || !encode_x(&x_map, args, gemm_side_tokens(plan))) return cudaErrorInvalidValue;
  const GemmWork work = work_of(args, plan);
  const Shape shape{blocks_of(args, work, kernel), kernel.threads, gemm_shared_bytes(plan)};
  return launch(kernel.run, shape, args.use_pdl ? Follow::kWaitFirst : Follow::kPlain, stream, w_map, x_map, work);
}

}  // namespace openlora
