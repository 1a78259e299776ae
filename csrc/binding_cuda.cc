// The torch face of the CUDA kernels, and the only CUDA file here that includes torch headers. LibTorch's stable ABI: one build
// serves every torch from 2.11 on. Checks shapes, types and devices, and hands raw pointers to the launchers. Nothing here
// allocates or synchronises: outputs are the caller's, so every operation can be captured in a graph. What lies in device memory
// (tiles, slots, ranks) cannot be checked here; its one writer is node/kernels/lora_tiles.py.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <limits>
#include <optional>
#include <vector>

#include <cuda_runtime_api.h>

#include "cuda/attention_decode.h"
#include "cuda/fused.h"
#include "cuda/gemm_sm90.h"
#include "cuda/lora_shrink.h"
#include "cuda/norm.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;
using Ints = std::vector<int64_t>;

constexpr int64_t kSpanFields = 6;  // node/kernels/linear.py: module, A offset, B offset, inputs, outputs, column

// The device and stream of one call.
class Place {
 public:
  explicit Place(const Tensor& t) : index_(t.get_device_index()), guard_(index_) {
    STD_TORCH_CHECK(t.is_cuda(), "openlora: the tensors of a CUDA operation lie on another device");
  }
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
  void require(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.is_cuda() && t.get_device_index() == index_, "openlora: ", name, " is not on CUDA device ", index_);
  }

 private:
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

void check_launch(cudaError_t error, const char* name) {
  STD_TORCH_CHECK(error == cudaSuccess, "openlora: ", name, " could not be launched: ", cudaGetErrorString(error));
}

void check(const Place& place, const Tensor& t, const char* name, int64_t dims, ScalarType type) {
  place.require(t, name);
  STD_TORCH_CHECK(t.dim() == dims, "openlora: ", name, " has ", t.dim(), " dimensions, wanted ", dims);
  STD_TORCH_CHECK(t.scalar_type() == type, "openlora: ", name, " has the wrong element type");
  STD_TORCH_CHECK(t.is_contiguous(), "openlora: ", name, " is not contiguous");
}

void check_size(const Tensor& t, const char* name, int64_t dim, int64_t wanted) {
  STD_TORCH_CHECK(t.size(dim) == wanted, "openlora: ", name, " has size ", t.size(dim), " in dimension ", dim, ", wanted ", wanted);
}

bool is_float(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "openlora: ", name, " is neither float32 nor bfloat16");
  return type == ScalarType::Float;
}

int as_int(int64_t value, const char* name) {
  STD_TORCH_CHECK(value >= 0 && value <= std::numeric_limits<int>::max(), "openlora: ", name, " is ", value);
  return static_cast<int>(value);
}

openlora::Follow follow_of(int64_t follow, int64_t most) {
  STD_TORCH_CHECK(follow >= 0 && follow <= most, "openlora: follow is ", follow, ", wanted 0 to ", most);
  return static_cast<openlora::Follow>(follow);
}

template <class T>
T* as(const Tensor& t) {
  return static_cast<T*>(t.data_ptr());
}
const void* data(const MaybeTensor& t) { return t.has_value() ? t->data_ptr() : nullptr; }

// The tables of the adapters. `type` is the model's; `inputs` or `columns` is 0 where the caller has none to compare with.
openlora::LoraWork work_of(const Place& place, const Tensor& pages, const Tensor& tiles, const Tensor& ranks, const Tensor& v, const Ints& spans,
                           int64_t tile_rows, ScalarType type, int64_t inputs, int64_t columns) {
  check(place, pages, "pages", 2, type);
  check(place, tiles, "tiles", 1, ScalarType::Int);
  check(place, ranks, "ranks", 2, ScalarType::Int);
  check(place, v, "v", 4, ScalarType::Float);
  STD_TORCH_CHECK(v.size(0) >= 1 && v.size(0) <= openlora::kMaxRankPlanes, "openlora: v has ", v.size(0), " planes, wanted 1 to 8");
  const int64_t count = static_cast<int64_t>(spans.size()) / kSpanFields;
  STD_TORCH_CHECK(spans.size() % kSpanFields == 0 && count >= 1 && count <= openlora::kMaxLoraSpans, "openlora: spans has ", spans.size(),
                  " fields, wanted 6 for each of 1 to 3 modules");
  STD_TORCH_CHECK(tile_rows >= 1 && tile_rows <= openlora::kMostTileRows, "openlora: tile_rows is ", tile_rows, ", wanted 1 to 16");
  STD_TORCH_CHECK(tiles.size(0) >= openlora::kTileHeader, "openlora: tiles has ", tiles.size(0), " elements, fewer than its header");
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tiles.data_ptr()) % 16 == 0, "openlora: tiles is not 16-byte aligned");
  check_size(v, "v", 2, count);
  check_size(v, "v", 3, openlora::kPageRank);
  openlora::LoraWork work{};
  work.pages = pages.data_ptr();
  work.page_elements = pages.size(1);
  work.tiles = as<int32_t>(tiles);
  work.ranks = as<int32_t>(ranks);
  work.slots = as_int(ranks.size(1), "the number of slots");
  work.v = as<float>(v);
  work.v_planes = static_cast<int>(v.size(0));
  work.v_stride = v.stride(0);
  work.span_count = static_cast<int>(count);
  work.tile_rows = static_cast<int>(tile_rows);
  for (int64_t m = 0; m < count; ++m) {
    const int64_t* s = spans.data() + m * kSpanFields;
    const bool fits = s[0] >= 0 && s[0] < ranks.size(0) && s[3] > 0 && s[4] > 0 && s[5] >= 0 && s[1] >= 0 && s[2] >= 0 &&
                      (inputs == 0 || s[3] == inputs) && (columns == 0 || s[5] + s[4] <= columns) &&
                      s[1] + openlora::kPageRank * s[3] <= pages.size(1) && s[2] + openlora::kPageRank * s[4] <= pages.size(1);
    STD_TORCH_CHECK(fits, "openlora: span ", m, " lies outside the page, the rank table or the linear");
    work.spans[m] = {as_int(s[0], "module"), s[1], s[2], as_int(s[3], "inputs"), as_int(s[4], "outputs"), as_int(s[5], "column")};
  }
  return work;
}

void lora_shrink(const Tensor& x, const Tensor& pages, const Tensor& tiles, const Tensor& ranks, const Tensor& scales, const Ints& spans,
                 int64_t tile_rows, int64_t follow, Tensor v) {
  const Place place(x);
  openlora::LoraShrinkArgs a{};
  a.is_float = is_float(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1), "openlora: x must have 2 dimensions, the last one dense");
  a.x = x.data_ptr();
  a.x_stride = x.stride(0);
  a.rows = as_int(x.size(0), "rows");
  a.inputs = as_int(x.size(1), "inputs");
  a.work = work_of(place, pages, tiles, ranks, v, spans, tile_rows, x.scalar_type(), x.size(1), 0);
  check(place, scales, "scales", 2, ScalarType::Float);
  check_size(scales, "scales", 0, ranks.size(0));
  check_size(scales, "scales", 1, ranks.size(1));
  a.work.scales = as<float>(scales);
  STD_TORCH_CHECK(v.size(0) == 1 || v.size(0) == openlora::lora_shrink_planes(x.size(1)), "openlora: v has ", v.size(0),
                  " planes, wanted 1 or ", openlora::lora_shrink_planes(x.size(1)));
  a.follow = follow_of(follow, 2);
  a.tile_ints = as_int(tiles.size(0), "the size of tiles");
  check_launch(openlora::launch_lora_shrink(a, place.stream()), "lora_shrink");
}

int64_t lora_shrink_planes(int64_t inputs) { return openlora::lora_shrink_planes(inputs); }

// What every consumer takes first. Keeps the LoraWork that its Product points to.
struct ProductArguments {
  openlora::LoraWork work{};
  openlora::Product product{};

  ProductArguments(const Place& place, const Tensor& y, const MaybeTensor& bias, const MaybeTensor& pages, const MaybeTensor& tiles,
                   const MaybeTensor& ranks, const MaybeTensor& v, const Ints& spans, int64_t tile_rows, int64_t follow, ScalarType model) {
    product.y_is_float = is_float(y, "y");
    product.is_float = model == ScalarType::Float;
    check(place, y, "y", 3, y.scalar_type());
    STD_TORCH_CHECK(product.y_is_float || !product.is_float, "openlora: a bfloat16 y has a bfloat16 model");
    product.y = y.data_ptr();
    product.planes = as_int(y.size(0), "planes");
    product.rows = as_int(y.size(1), "rows");
    product.columns = as_int(y.size(2), "columns");
    if (bias.has_value()) {
      check(place, *bias, "bias", 1, model);
      check_size(*bias, "bias", 0, y.size(2));
      product.bias = bias->data_ptr();
    }
    product.follow = follow_of(follow, 1);
    if (!tiles.has_value()) return;
    STD_TORCH_CHECK(pages.has_value() && ranks.has_value() && v.has_value(), "openlora: tiles are given without pages, ranks or v");
    work = work_of(place, *pages, *tiles, *ranks, *v, spans, tile_rows, model, 0, y.size(2));
    product.lora = &work;
  }
  ProductArguments(const ProductArguments&) = delete;
};

void check_output(const Place& place, const Tensor& out, const char* name, int64_t rows, int64_t columns, ScalarType type) {
  check(place, out, name, 2, type);
  check_size(out, name, 0, rows);
  check_size(out, name, 1, columns);
}

void fused_silu_mul(const Tensor& y, const MaybeTensor& bias, const MaybeTensor& pages, const MaybeTensor& tiles, const MaybeTensor& ranks,
                    const MaybeTensor& v, const Ints& spans, int64_t tile_rows, int64_t follow, Tensor out) {
  const Place place(y);
  is_float(out, "out");
  const ProductArguments a(place, y, bias, pages, tiles, ranks, v, spans, tile_rows, follow, out.scalar_type());
  STD_TORCH_CHECK(y.size(2) % 2 == 0, "openlora: y has an odd number of columns");
  check_output(place, out, "out", y.size(1), y.size(2) / 2, out.scalar_type());
  check_launch(openlora::launch_fused_silu_mul({a.product, out.data_ptr()}, place.stream()), "fused_silu_mul");
}

void fused_add_rms_norm(const Tensor& y, const MaybeTensor& bias, const MaybeTensor& pages, const MaybeTensor& tiles, const MaybeTensor& ranks,
                        const MaybeTensor& v, const Ints& spans, int64_t tile_rows, Tensor residual, const Tensor& weight, double eps,
                        int64_t follow, Tensor out) {
  const Place place(y);
  is_float(out, "out");
  const ScalarType type = out.scalar_type();
  const ProductArguments a(place, y, bias, pages, tiles, ranks, v, spans, tile_rows, follow, type);
  check_output(place, out, "out", y.size(1), y.size(2), type);
  check_output(place, residual, "residual", y.size(1), y.size(2), type);
  check(place, weight, "weight", 1, type);
  check_size(weight, "weight", 0, y.size(2));
  const openlora::AddRmsNormArgs args{a.product, residual.data_ptr(), weight.data_ptr(), static_cast<float>(eps), out.data_ptr()};
  check_launch(openlora::launch_fused_add_rms_norm(args, place.stream()), "fused_add_rms_norm");
}

void check_caches(const Place& place, const Tensor& keys, const Tensor& values, ScalarType type) {
  for (const Tensor* cache : {&keys, &values}) {
    place.require(*cache, "a cache");
    STD_TORCH_CHECK(cache->dim() == 4 && cache->scalar_type() == type && cache->stride(3) == 1,
                    "openlora: a cache must be [blocks, block_size, groups, head_size] of the model's type, its last dimension dense");
  }
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(keys.size(d) == values.size(d) && keys.stride(d) == values.stride(d), "openlora: the caches differ in shape or strides");
}

void fused_rope_kv_write(const Tensor& y, const MaybeTensor& bias, const MaybeTensor& pages, const MaybeTensor& tiles, const MaybeTensor& ranks,
                         const MaybeTensor& v, const Ints& spans, int64_t tile_rows, const Tensor& cos, const Tensor& sin, const Tensor& positions,
                         const Tensor& kv_slots, Tensor key_cache, Tensor value_cache, const MaybeTensor& q_norm, const MaybeTensor& k_norm,
                         double eps, int64_t follow, Tensor q) {
  const Place place(y);
  is_float(q, "q");
  const ScalarType type = q.scalar_type();
  const ProductArguments a(place, y, bias, pages, tiles, ranks, v, spans, tile_rows, follow, type);
  check_caches(place, key_cache, value_cache, type);
  openlora::RopeKvArgs args{};
  args.product = a.product;
  args.block_size = as_int(key_cache.size(1), "block_size");
  args.groups = as_int(key_cache.size(2), "groups");
  args.head_size = as_int(key_cache.size(3), "head_size");
  args.heads = as_int(y.size(2) / args.head_size - 2 * args.groups, "the number of heads");
  STD_TORCH_CHECK(args.head_size % 2 == 0 && args.heads > 0 && y.size(2) % args.head_size == 0, "openlora: y does not hold whole heads");
  args.block_stride = key_cache.stride(0);
  args.token_stride = key_cache.stride(1);
  args.group_stride = key_cache.stride(2);
  check(place, cos, "cos", 2, ScalarType::Float);
  check(place, sin, "sin", 2, ScalarType::Float);
  check_size(cos, "cos", 1, args.head_size / 2);
  check_size(sin, "sin", 1, args.head_size / 2);
  check_size(sin, "sin", 0, cos.size(0));
  check(place, positions, "positions", 1, ScalarType::Int);
  check(place, kv_slots, "kv_slots", 1, ScalarType::Int);
  check_size(positions, "positions", 0, y.size(1));
  check_size(kv_slots, "kv_slots", 0, y.size(1));
  for (const MaybeTensor* weight : {&q_norm, &k_norm})
    if (weight->has_value()) {
      check(place, **weight, "q_norm or k_norm", 1, type);
      check_size(**weight, "q_norm or k_norm", 0, args.head_size);
    }
  check_output(place, q, "q", y.size(1), static_cast<int64_t>(args.heads) * args.head_size, type);
  args.cos = as<float>(cos);
  args.sin = as<float>(sin);
  args.positions = as<int32_t>(positions);
  args.kv_slots = as<int32_t>(kv_slots);
  args.key_cache = key_cache.data_ptr();
  args.value_cache = value_cache.data_ptr();
  args.q_norm = data(q_norm);
  args.k_norm = data(k_norm);
  args.eps = static_cast<float>(eps);
  args.q = q.data_ptr();
  check_launch(openlora::launch_fused_rope_kv_write(args, place.stream()), "fused_rope_kv_write");
}

void materialize(const Tensor& y, const MaybeTensor& bias, const MaybeTensor& pages, const MaybeTensor& tiles, const MaybeTensor& ranks,
                 const MaybeTensor& v, const Ints& spans, int64_t tile_rows, int64_t follow, Tensor out) {
  const Place place(y);
  const bool out_is_float = is_float(out, "out");
  // Logits are float32 whatever the model is: its type shows in its adapters or its bias, and does not matter without either.
  const ScalarType model = pages.has_value() ? pages->scalar_type() : (bias.has_value() ? bias->scalar_type() : (out_is_float && is_float(y, "y") ? ScalarType::Float : ScalarType::BFloat16));
  const ProductArguments a(place, y, bias, pages, tiles, ranks, v, spans, tile_rows, follow, model);
  STD_TORCH_CHECK(out_is_float || model == ScalarType::BFloat16, "openlora: out is bfloat16 but the model is float32");
  check_output(place, out, "out", y.size(1), y.size(2), out.scalar_type());
  openlora::MaterializeArgs args{a.product, out.data_ptr(), out_is_float};
  if (!pages.has_value() && !bias.has_value()) args.product.is_float = false;  // nothing of the model's type is read
  check_launch(openlora::launch_materialize(args, place.stream()), "materialize");
}

openlora::RmsNormArgs norm_arguments(const Place& place, const Tensor& weight, double eps, int64_t follow, const Tensor& out) {
  openlora::RmsNormArgs a{};
  a.is_float = is_float(out, "out");
  check(place, out, "out", 2, out.scalar_type());
  check(place, weight, "weight", 1, out.scalar_type());
  check_size(weight, "weight", 0, out.size(1));
  a.weight = weight.data_ptr();
  a.out = out.data_ptr();
  a.rows = as_int(out.size(0), "rows");
  a.size = as_int(out.size(1), "the row size");
  a.eps = static_cast<float>(eps);
  a.follow = follow_of(follow, 1);
  return a;
}

void rms_norm_into(const Tensor& x, const Tensor& weight, double eps, int64_t follow, Tensor out) {
  const Place place(x);
  openlora::RmsNormArgs a = norm_arguments(place, weight, eps, follow, out);
  check_output(place, x, "x", out.size(0), out.size(1), out.scalar_type());
  a.x = x.data_ptr();
  check_launch(openlora::launch_rms_norm(a, place.stream()), "rms_norm_into");
}

void embed_rms_norm(const Tensor& token_ids, const MaybeTensor& sources, const Tensor& embedding, const Tensor& weight, double eps, int64_t follow, Tensor residual, Tensor out) {
  const Place place(embedding);
  openlora::EmbedRmsNormArgs a{};
  a.norm = norm_arguments(place, weight, eps, follow, out);
  a.ids_are_long = token_ids.scalar_type() == ScalarType::Long;
  check(place, token_ids, "token_ids", 1, a.ids_are_long ? ScalarType::Long : ScalarType::Int);
  if (sources.has_value()) check(place, *sources, "sources", 1, ScalarType::Int);
  check_size(sources.has_value() ? *sources : token_ids, "what names the rows", 0, out.size(0));
  check(place, embedding, "embedding", 2, out.scalar_type());
  check_size(embedding, "embedding", 1, out.size(1));
  check_output(place, residual, "residual", out.size(0), out.size(1), out.scalar_type());
  a.token_ids = token_ids.data_ptr();
  a.id_count = token_ids.size(0);
  a.sources = sources.has_value() ? as<int32_t>(*sources) : nullptr;
  a.embedding = embedding.data_ptr();
  a.vocabulary = embedding.size(0);
  a.residual = residual.data_ptr();
  check_launch(openlora::launch_embed_rms_norm(a, place.stream()), "embed_rms_norm");
}

void take_rows(const Tensor& x, const Tensor& rows, int64_t follow, Tensor out) {
  const Place place(x);
  check(place, x, "x", 2, out.scalar_type());
  check(place, rows, "rows", 1, ScalarType::Int);
  check_output(place, out, "out", rows.size(0), x.size(1), x.scalar_type());
  const int bytes = is_float(x, "x") ? 4 : 2;
  openlora::TakeRowsArgs a{x.data_ptr(), as<int32_t>(rows), out.data_ptr()};
  a.count = as_int(rows.size(0), "the number of rows");
  a.row_count = as_int(x.size(0), "x's rows");
  a.row_bytes = as_int(x.size(1) * bytes, "a row's bytes");
  STD_TORCH_CHECK(a.row_bytes % 16 == 0, "openlora: take_rows takes rows of whole 16 bytes, not of ", a.row_bytes);
  a.follow = follow_of(follow, 1);
  check_launch(openlora::launch_take_rows(a, place.stream()), "take_rows");
}

int64_t skinny_gemm_planes(int64_t outputs, int64_t inputs, int64_t tokens) {
  return openlora::can_run_skinny_gemm(tokens, outputs, inputs) ? openlora::skinny_gemm_planes(outputs, inputs) : 0;
}

bool is_skinny_gemm_faster(int64_t outputs, int64_t inputs, int64_t tokens, bool has_adapters) {
  return openlora::is_skinny_gemm_faster(tokens, outputs, inputs, has_adapters);
}

// What all forms of the skinny GEMM take; y is the caller's to check.
openlora::SkinnyGemmArgs skinny_gemm_inputs(const Place& place, const Tensor& x, const Tensor& weight, bool use_pdl) {
  STD_TORCH_CHECK(x.dim() == 2 && x.scalar_type() == ScalarType::BFloat16 && x.stride(1) == 1, "openlora: x must be [T, K] bfloat16, K dense");
  check(place, weight, "weight", 2, ScalarType::BFloat16);
  check_size(weight, "weight", 1, x.size(1));
  STD_TORCH_CHECK(skinny_gemm_planes(weight.size(0), weight.size(1), x.size(0)) > 0, "openlora: skinny_gemm cannot run ", x.size(0), " rows of ", weight.size(0), " x ", weight.size(1));
  openlora::SkinnyGemmArgs a{};
  a.x = x.data_ptr();
  a.x_stride = x.stride(0);
  a.w = weight.data_ptr();
  a.tokens = as_int(x.size(0), "rows");
  a.outputs = as_int(weight.size(0), "outputs");
  a.inputs = as_int(weight.size(1), "inputs");
  a.use_pdl = use_pdl;
  return a;
}

openlora::SkinnyGemmArgs skinny_gemm_args(const Place& place, const Tensor& x, const Tensor& weight, bool use_pdl, const Tensor& y) {
  openlora::SkinnyGemmArgs a = skinny_gemm_inputs(place, x, weight, use_pdl);
  a.output = is_float(y, "y") ? openlora::GemmOutput::kFloatPlanes : openlora::GemmOutput::kBfloat16;
  check(place, y, "y", 3, y.scalar_type());
  check_size(y, "y", 0, skinny_gemm_planes(weight.size(0), weight.size(1), x.size(0)));
  check_size(y, "y", 1, x.size(0));
  check_size(y, "y", 2, weight.size(0));
  a.y = y.data_ptr();
  return a;
}

// out = silu(gate) * up, where weight is gate and up one after the other and their product has one plane.
void skinny_gemm_silu_mul(const Tensor& x, const Tensor& weight, bool use_pdl, Tensor out) {
  const Place place(x);
  openlora::SkinnyGemmArgs a = skinny_gemm_inputs(place, x, weight, use_pdl);
  STD_TORCH_CHECK(weight.size(0) % 16 == 0 && skinny_gemm_planes(weight.size(0), weight.size(1), x.size(0)) == 1,
                  "openlora: skinny_gemm_silu_mul cannot run ", weight.size(0), " x ", weight.size(1));
  check_output(place, out, "out", x.size(0), weight.size(0) / 2, ScalarType::BFloat16);
  a.output = openlora::GemmOutput::kSiluMul;
  a.y = out.data_ptr();
  check_launch(openlora::launch_skinny_gemm(a, place.stream()), "skinny_gemm_silu_mul");
}

int64_t skinny_gemm_parts(int64_t outputs, int64_t inputs) { return openlora::skinny_gemm_parts(outputs, inputs); }

// Logits of the rows that want them, and the largest of every row in each part of the vocabulary, where the product has one plane.
void skinny_gemm_logits(const Tensor& x, const Tensor& weight, const Tensor& wanted, bool use_pdl, Tensor y, Tensor parts) {
  const Place place(x);
  openlora::SkinnyGemmArgs a = skinny_gemm_inputs(place, x, weight, use_pdl);
  STD_TORCH_CHECK(skinny_gemm_planes(weight.size(0), weight.size(1), x.size(0)) == 1, "openlora: skinny_gemm_logits cannot run ",
                  weight.size(0), " x ", weight.size(1));
  check(place, wanted, "wanted", 1, ScalarType::Int);
  check_size(wanted, "wanted", 0, x.size(0));
  check_output(place, y, "y", x.size(0), weight.size(0), ScalarType::Float);
  check(place, parts, "parts", 3, ScalarType::Int);
  check_size(parts, "parts", 0, x.size(0));
  check_size(parts, "parts", 1, skinny_gemm_parts(weight.size(0), weight.size(1)));
  check_size(parts, "parts", 2, 2);
  a.output = openlora::GemmOutput::kLogits;
  a.y = y.data_ptr();
  a.wanted = as<int32_t>(wanted);
  a.bests = parts.data_ptr();
  check_launch(openlora::launch_skinny_gemm(a, place.stream()), "skinny_gemm_logits");
}

void skinny_gemm(const Tensor& x, const Tensor& weight, bool use_pdl, Tensor y) {
  const Place place(x);
  check_launch(openlora::launch_skinny_gemm(skinny_gemm_args(place, x, weight, use_pdl, y), place.stream()), "skinny_gemm");
}

// The plan's tables lie in device memory and are not checked here; their one writer is node/kernels/attention/items.py.
void attention_decode(const Tensor& q, const Tensor& keys, const Tensor& values, const Tensor& tables, const Tensor& items,
                      const Tensor& counts, Tensor partial, Tensor stats, Tensor done, double scale_log2, int64_t window,
                      int64_t workers, int64_t variant, int64_t follow, Tensor out) {
  const Place place(q);
  place.require(keys, "keys");
  place.require(values, "values");
  STD_TORCH_CHECK(q.dim() == 3 && q.scalar_type() == ScalarType::BFloat16 && q.stride(2) == 1 && q.stride(1) == q.size(2),
                  "openlora: q must be [Q, N, D] bfloat16, rows dense");
  STD_TORCH_CHECK(keys.dim() == 4 && values.dim() == 4 && keys.scalar_type() == ScalarType::BFloat16 &&
                      values.scalar_type() == ScalarType::BFloat16,
                  "openlora: keys and values must be [blocks, B, G, D] bfloat16");
  for (int64_t dim = 0; dim < 4; ++dim) {
    STD_TORCH_CHECK(keys.size(dim) == values.size(dim) && keys.stride(dim) == values.stride(dim), "openlora: keys and values differ in shape");
  }
  const int64_t groups = keys.size(2), size = keys.size(3);
  STD_TORCH_CHECK(keys.stride(3) == 1 && keys.stride(2) == size, "openlora: a token's keys must be dense");
  STD_TORCH_CHECK(keys.stride(1) % 8 == 0 && keys.stride(0) % 8 == 0 && reinterpret_cast<uintptr_t>(keys.data_ptr()) % 16 == 0 &&
                      reinterpret_cast<uintptr_t>(values.data_ptr()) % 16 == 0,
                  "openlora: keys and values are not 16-byte aligned");
  STD_TORCH_CHECK(q.size(2) == size && groups > 0 && q.size(1) % groups == 0, "openlora: q does not fit the cache");
  STD_TORCH_CHECK(openlora::can_attend_decode(size, q.size(1) / groups, keys.size(1)), "openlora: attention_decode has no head size ", size,
                  " with ", q.size(1) / groups, " heads a group and blocks of ", keys.size(1));
  place.require(out, "out");
  STD_TORCH_CHECK(out.dim() == 3 && out.scalar_type() == ScalarType::BFloat16 && out.stride(2) == 1 && out.stride(1) == size &&
                      out.size(0) == q.size(0) && out.size(1) == q.size(1) && out.size(2) == size,
                  "openlora: out must have q's shape and type");
  place.require(tables, "tables");
  STD_TORCH_CHECK(tables.dim() == 2 && tables.scalar_type() == ScalarType::Int && tables.stride(1) == 1, "openlora: tables must be [Q, n] int32");
  const bool has_chunks = openlora::has_attention_chunks(variant);
  const int64_t sequences = has_chunks ? tables.size(0) : q.size(0);
  check_size(tables, "tables", 0, sequences);
  check(place, items, "items", 2, ScalarType::Int);
  check_size(items, "items", 1, openlora::kAttentionItemInts);
  check(place, counts, "counts", 1, ScalarType::Int);
  check_size(counts, "counts", 0, sequences + 1);
  check(place, partial, "partial", 3, ScalarType::Float);
  check(place, stats, "stats", 3, ScalarType::Float);
  check(place, done, "done", 2, ScalarType::Int);
  // Items of several rows have no partial results.
  STD_TORCH_CHECK((has_chunks || partial.size(0) >= items.size(0)) && partial.size(1) == q.size(1) && partial.size(2) == size &&
                      stats.size(0) == partial.size(0) && stats.size(1) == q.size(1) && stats.size(2) == 2 &&
                      done.size(0) >= sequences && done.size(1) == groups,
                  "openlora: the memory for partial results is too small");
  openlora::AttentionDecodeArgs a{};
  a.q = q.data_ptr();
  a.keys = keys.data_ptr();
  a.values = values.data_ptr();
  a.out = out.data_ptr();
  a.tables = as<int32_t>(tables);
  a.items = as<int32_t>(items);
  a.counts = as<int32_t>(counts);
  a.partial = as<float>(partial);
  a.stats = as<float>(stats);
  a.done = as<int32_t>(done);
  a.block_stride = keys.stride(0);
  a.token_stride = keys.stride(1);
  a.q_stride = as_int(q.stride(0), "q's stride");
  a.out_stride = as_int(out.stride(0), "out's stride");
  a.table_stride = as_int(tables.stride(0), "tables' stride");
  a.sequences = as_int(sequences, "sequences");
  a.groups = as_int(groups, "groups");
  a.heads_per_group = as_int(q.size(1) / groups, "heads of a group");
  a.head_dim = as_int(size, "the head size");
  a.block_size = as_int(keys.size(1), "the block size");
  STD_TORCH_CHECK(workers >= 1 && workers <= items.size(0), "openlora: workers is ", workers, " with room for ", items.size(0), " items");
  a.workers = as_int(workers, "workers");
  STD_TORCH_CHECK(window >= 0, "openlora: window is ", window);
  a.window = as_int(window, "the window");
  a.scale_log2 = static_cast<float>(scale_log2);
  a.follow = follow_of(follow, 1);
  check_launch(openlora::launch_attention_decode(a, as_int(variant, "variant"), place.stream()), "attention_decode");
}

}  // namespace

#define OPENLORA_ADAPTERS "Tensor y, Tensor? bias, Tensor? pages, Tensor? tiles, Tensor? ranks, Tensor? v, int[] spans, int tile_rows, "

// A fragment: the CPU library may be loaded beside this one and owns the namespace.
STABLE_TORCH_LIBRARY_FRAGMENT(openlora, m) {
  m.def(
      "lora_shrink(Tensor x, Tensor pages, Tensor tiles, Tensor ranks, Tensor scales, int[] spans, int tile_rows, int follow, "
      "Tensor(a!) v) -> ()");
  m.def("lora_shrink_planes(int inputs) -> int");
  m.def("fused_silu_mul(" OPENLORA_ADAPTERS "int follow, Tensor(a!) out) -> ()");
  m.def("fused_add_rms_norm(" OPENLORA_ADAPTERS "Tensor(a!) residual, Tensor weight, float eps, int follow, Tensor(b!) out) -> ()");
  m.def(
      "fused_rope_kv_write(" OPENLORA_ADAPTERS
      "Tensor cos, Tensor sin, Tensor positions, Tensor kv_slots, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor? q_norm, "
      "Tensor? k_norm, float eps, int follow, Tensor(c!) q) -> ()");
  m.def("materialize(" OPENLORA_ADAPTERS "int follow, Tensor(a!) out) -> ()");
  m.def("rms_norm_into(Tensor x, Tensor weight, float eps, int follow, Tensor(a!) out) -> ()");
  m.def(
      "embed_rms_norm(Tensor token_ids, Tensor? sources, Tensor embedding, Tensor weight, float eps, int follow, Tensor(a!) residual, "
      "Tensor(b!) out) -> ()");
  m.def("take_rows(Tensor x, Tensor rows, int follow, Tensor(a!) out) -> ()");
  m.def(
      "attention_decode(Tensor q, Tensor keys, Tensor values, Tensor tables, Tensor items, Tensor counts, "
      "Tensor(a!) partial, Tensor(b!) stats, Tensor(c!) done, float scale_log2, int window, int workers, int variant, int follow, Tensor(d!) out) -> ()");
  m.def("skinny_gemm(Tensor x, Tensor weight, bool use_pdl, Tensor(a!) y) -> ()");
  m.def("skinny_gemm_silu_mul(Tensor x, Tensor weight, bool use_pdl, Tensor(a!) out) -> ()");
  m.def("skinny_gemm_logits(Tensor x, Tensor weight, Tensor wanted, bool use_pdl, Tensor(a!) y, Tensor(b!) parts) -> ()");
  m.def("skinny_gemm_parts(int outputs, int inputs) -> int");
  m.def("skinny_gemm_planes(int outputs, int inputs, int tokens) -> int");
  m.def("is_skinny_gemm_faster(int outputs, int inputs, int tokens, bool has_adapters) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(openlora, CompositeExplicitAutograd, m) {
  m.impl("skinny_gemm_parts", TORCH_BOX(&skinny_gemm_parts));
  m.impl("skinny_gemm_planes", TORCH_BOX(&skinny_gemm_planes));
  m.impl("lora_shrink_planes", TORCH_BOX(&lora_shrink_planes));
  m.impl("is_skinny_gemm_faster", TORCH_BOX(&is_skinny_gemm_faster));
}

STABLE_TORCH_LIBRARY_IMPL(openlora, CUDA, m) {
  m.impl("lora_shrink", TORCH_BOX(&lora_shrink));
  m.impl("fused_silu_mul", TORCH_BOX(&fused_silu_mul));
  m.impl("fused_add_rms_norm", TORCH_BOX(&fused_add_rms_norm));
  m.impl("fused_rope_kv_write", TORCH_BOX(&fused_rope_kv_write));
  m.impl("materialize", TORCH_BOX(&materialize));
  m.impl("rms_norm_into", TORCH_BOX(&rms_norm_into));
  m.impl("embed_rms_norm", TORCH_BOX(&embed_rms_norm));
  m.impl("take_rows", TORCH_BOX(&take_rows));
  m.impl("attention_decode", TORCH_BOX(&attention_decode));
  m.impl("skinny_gemm", TORCH_BOX(&skinny_gemm));
  m.impl("skinny_gemm_silu_mul", TORCH_BOX(&skinny_gemm_silu_mul));
  m.impl("skinny_gemm_logits", TORCH_BOX(&skinny_gemm_logits));
}
