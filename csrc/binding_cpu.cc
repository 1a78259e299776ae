// The torch face of the CPU kernels, and the only file here that includes torch headers. LibTorch's stable ABI: one build serves
// every torch from 2.11 on. Checks shapes and types, allocates outputs, and hands raw pointers to the table of one instruction set.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstring>
#include <optional>

#include "cpu/dispatch.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

const openlora::KernelTable& table(int64_t isa) {
  STD_TORCH_CHECK(isa >= 0 && isa <= openlora::best_isa(), "openlora: instruction set ", isa, " cannot run on this CPU");
  if (isa == 2) return openlora::avx512bf16_kernels();
  return isa == 1 ? openlora::avx512_kernels() : openlora::avx2_kernels();
}

void check(const Tensor& t, const char* name, int64_t dims, ScalarType type) {
  STD_TORCH_CHECK(t.dim() == dims, "openlora: ", name, " has ", t.dim(), " dimensions, wanted ", dims);
  STD_TORCH_CHECK(t.scalar_type() == type, "openlora: ", name, " has the wrong element type");
  STD_TORCH_CHECK(t.is_contiguous(), "openlora: ", name, " is not contiguous");
}

bool is_float(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16, "openlora: ", name, " is neither float32 nor bfloat16");
  return type == ScalarType::Float;
}

const void* data(const MaybeTensor& t) { return t.has_value() ? t->data_ptr() : nullptr; }

template <class T>
const T* as(const Tensor& t) {
  return static_cast<const T*>(t.data_ptr());
}

int64_t best_isa() { return openlora::best_isa(); }

Tensor pack_linear(const Tensor& weight) {
  const bool wide = is_float(weight, "weight");
  check(weight, "weight", 2, weight.scalar_type());
  const int64_t outputs = weight.size(0), inputs = weight.size(1), step = wide ? 1 : 2, bytes = wide ? 4 : 2;
  const int64_t panels = (outputs + openlora::kPanel - 1) / openlora::kPanel, steps = (inputs + step - 1) / step;
  Tensor packed = wide ? torch::stable::new_zeros(weight, {panels, steps, openlora::kPanel})
                       : torch::stable::new_zeros(weight, {panels, steps, openlora::kPanel, 2});
  const char* from = as<char>(weight);
  char* to = static_cast<char*>(packed.data_ptr());
  for (int64_t o = 0; o < outputs; ++o)
    for (int64_t k = 0; k < inputs; k += step) {
      const int64_t place = ((o / openlora::kPanel * steps + k / step) * openlora::kPanel + o % openlora::kPanel) * step;
      std::memcpy(to + place * bytes, from + (o * inputs + k) * bytes, static_cast<size_t>((k + step <= inputs ? step : 1) * bytes));
    }
  return packed;
}

openlora::Linear linear_arguments(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t outputs, bool out_is_float, int64_t threads) {
  openlora::Linear a{};
  a.is_float = is_float(x, "x");
  check(x, "x", 2, x.scalar_type());
  check(packed, "packed", a.is_float ? 3 : 4, x.scalar_type());
  const int64_t step = a.is_float ? 1 : 2;
  STD_TORCH_CHECK(packed.size(0) == (outputs + openlora::kPanel - 1) / openlora::kPanel && packed.size(1) == (x.size(1) + step - 1) / step,
                  "openlora: the packed weight does not fit x or out_features");
  if (bias.has_value()) {
    check(*bias, "bias", 1, x.scalar_type());
    STD_TORCH_CHECK(bias->size(0) == outputs, "openlora: bias has ", bias->size(0), " elements, wanted ", outputs);
  }
  a.x = x.data_ptr();
  a.packed = packed.data_ptr();
  a.bias = data(bias);
  a.out_is_float = a.is_float || out_is_float;
  a.rows = x.size(0);
  a.inputs = x.size(1);
  a.outputs = outputs;
  a.threads = static_cast<int>(threads);
  return a;
}

Tensor new_output(const Tensor& x, int64_t rows, int64_t columns, bool wide) {
  if (wide) return torch::stable::new_empty(x, {rows, columns}, ScalarType::Float);
  return torch::stable::new_empty(x, {rows, columns});
}

Tensor linear(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t outputs, bool out_is_float, int64_t isa, int64_t threads) {
  openlora::Linear a = linear_arguments(x, packed, bias, outputs, out_is_float, threads);
  Tensor y = new_output(x, a.rows, outputs, a.out_is_float);
  a.y = y.data_ptr();
  table(isa).linear(a);
  return y;
}

struct LoraTensors {
  const Tensor &pages, &slot_pages, &ranks, &scales;
  int64_t page_rank;
  const Tensor &row_start, &slot, &weight, &spans;
};

// Every index a kernel will follow is checked here: a wrong table must be an error, never a read outside the pool.
void check_spans(const openlora::Lora& a, int64_t modules, int64_t inputs, int64_t outputs) {
  for (int64_t s = 0; s < a.span_count; ++s) {
    const int64_t* span = a.spans + s * openlora::kSpanFields;
    const bool fits = span[0] >= 0 && span[0] < modules && span[3] == inputs && span[4] > 0 && span[5] >= 0 && span[5] + span[4] <= outputs &&
                      span[1] >= 0 && span[2] >= 0 && span[1] + a.page_rank * span[3] <= a.page_elements &&
                      span[2] + a.page_rank * span[4] <= a.page_elements;
    STD_TORCH_CHECK(fits, "openlora: span ", s, " lies outside the page, the module table or the linear");
  }
}

void check_terms(const openlora::Lora& a, int64_t rows, int64_t page_count) {
  STD_TORCH_CHECK(a.row_start[0] == 0 && a.row_start[rows] == a.term_count, "openlora: row_start does not cover the terms");
  for (int64_t t = 0; t < rows; ++t) STD_TORCH_CHECK(a.row_start[t] <= a.row_start[t + 1], "openlora: row_start falls at row ", t);
  int32_t last = -1;
  for (int64_t n = 0; n < a.term_count; ++n) {
    const int32_t slot = a.slot[n];
    if (slot == last) continue;
    STD_TORCH_CHECK(slot >= 0 && slot < a.slot_count, "openlora: term ", n, " names slot ", slot, " of ", a.slot_count);
    for (int64_t s = 0; s < a.span_count; ++s) {
      const int64_t rank = a.ranks[a.spans[s * openlora::kSpanFields] * a.slot_count + slot];
      const int64_t pages = (rank + a.page_rank - 1) / a.page_rank;
      STD_TORCH_CHECK(rank >= 0 && pages <= a.max_pages, "openlora: slot ", slot, " has rank ", rank, " but at most ", a.max_pages, " pages");
      for (int64_t p = 0; p < pages; ++p) {
        const int32_t page = a.slot_pages[slot * a.max_pages + p];
        STD_TORCH_CHECK(page >= 0 && page < page_count, "openlora: slot ", slot, " names page ", page, " of ", page_count);
      }
    }
    last = slot;
  }
}

openlora::Lora lora_arguments(const LoraTensors& t, int64_t rows, int64_t inputs, int64_t outputs) {
  openlora::Lora a{};
  a.pages_are_float = is_float(t.pages, "pages");
  check(t.pages, "pages", 2, t.pages.scalar_type());
  check(t.slot_pages, "slot_pages", 2, ScalarType::Int);
  check(t.ranks, "ranks", 2, ScalarType::Int);
  check(t.scales, "scales", 2, ScalarType::Float);
  check(t.row_start, "row_start", 1, ScalarType::Int);
  check(t.slot, "slot", 1, ScalarType::Int);
  check(t.weight, "weight", 1, ScalarType::Float);
  check(t.spans, "spans", 2, ScalarType::Long);
  a.slot_count = t.slot_pages.size(0);
  STD_TORCH_CHECK(t.ranks.size(1) == a.slot_count && t.scales.size(1) == a.slot_count && t.scales.size(0) == t.ranks.size(0),
                  "openlora: slot_pages, ranks and scales disagree about slots or modules");
  STD_TORCH_CHECK(t.row_start.size(0) == rows + 1, "openlora: row_start has ", t.row_start.size(0), " entries for ", rows, " rows");
  STD_TORCH_CHECK(t.slot.size(0) == t.weight.size(0), "openlora: slot and weight differ in length");
  STD_TORCH_CHECK(t.spans.size(1) == openlora::kSpanFields && t.page_rank > 0, "openlora: spans or page_rank malformed");
  a.pages = t.pages.data_ptr();
  a.page_elements = t.pages.size(1);
  a.page_rank = t.page_rank;
  a.slot_pages = as<int32_t>(t.slot_pages);
  a.max_pages = t.slot_pages.size(1);
  a.ranks = as<int32_t>(t.ranks);
  a.scales = as<float>(t.scales);
  a.row_start = as<int32_t>(t.row_start);
  a.slot = as<int32_t>(t.slot);
  a.weight = as<float>(t.weight);
  a.term_count = t.slot.size(0);
  a.spans = as<int64_t>(t.spans);
  a.span_count = t.spans.size(0);
  check_spans(a, t.ranks.size(0), inputs, outputs);
  check_terms(a, rows, t.pages.size(0));
  return a;
}

Tensor lora_linear(const Tensor& x, const Tensor& packed, const MaybeTensor& bias, int64_t outputs, bool out_is_float, const Tensor& pages,
                   const Tensor& slot_pages, const Tensor& ranks, const Tensor& scales, int64_t page_rank, const Tensor& row_start,
                   const Tensor& slot, const Tensor& weight, const Tensor& spans, int64_t isa, int64_t threads) {
  openlora::Linear a = linear_arguments(x, packed, bias, outputs, out_is_float, threads);
  a.lora = lora_arguments({pages, slot_pages, ranks, scales, page_rank, row_start, slot, weight, spans}, a.rows, a.inputs, outputs);
  Tensor y = new_output(x, a.rows, outputs, a.out_is_float);
  a.y = y.data_ptr();
  table(isa).linear(a);
  return y;
}

void sgmv(Tensor y, const Tensor& x, const Tensor& pages, const Tensor& slot_pages, const Tensor& ranks, const Tensor& scales,
          int64_t page_rank, const Tensor& row_start, const Tensor& slot, const Tensor& weight, const Tensor& spans, int64_t isa, int64_t threads) {
  openlora::Linear a{};
  a.is_float = is_float(x, "x");
  a.out_is_float = is_float(y, "y");
  STD_TORCH_CHECK(a.out_is_float || !a.is_float, "openlora: y is bfloat16 but x is float32");
  check(x, "x", 2, x.scalar_type());
  check(y, "y", 2, y.scalar_type());
  STD_TORCH_CHECK(x.size(0) == y.size(0), "openlora: x and y differ in rows");
  a.x = x.data_ptr();
  a.y = y.data_ptr();
  a.rows = x.size(0);
  a.inputs = x.size(1);
  a.outputs = y.size(1);
  a.threads = static_cast<int>(threads);
  a.lora = lora_arguments({pages, slot_pages, ranks, scales, page_rank, row_start, slot, weight, spans}, a.rows, a.inputs, a.outputs);
  if (a.lora.term_count > 0) table(isa).linear(a);
}

Tensor norm(const Tensor& x, const Tensor* residual, const Tensor& weight, double eps, int64_t isa, int64_t threads) {
  openlora::Norm a{};
  a.is_float = is_float(x, "x");
  check(x, "x", 2, x.scalar_type());
  check(weight, "weight", 1, x.scalar_type());
  STD_TORCH_CHECK(weight.size(0) == x.size(1), "openlora: weight has ", weight.size(0), " elements, wanted ", x.size(1));
  if (residual != nullptr) {
    check(*residual, "residual", 2, x.scalar_type());
    STD_TORCH_CHECK(residual->size(0) == x.size(0) && residual->size(1) == x.size(1), "openlora: x and residual differ in shape");
    a.residual = residual->data_ptr();
  }
  Tensor y = torch::stable::new_empty(x, {x.size(0), x.size(1)});
  a.x = x.data_ptr();
  a.weight = weight.data_ptr();
  a.y = y.data_ptr();
  a.rows = x.size(0);
  a.size = x.size(1);
  a.eps = static_cast<float>(eps);
  a.threads = static_cast<int>(threads);
  table(isa).norm(a);
  return y;
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps, int64_t isa, int64_t threads) { return norm(x, nullptr, weight, eps, isa, threads); }

Tensor add_rms_norm(const Tensor& x, Tensor residual, const Tensor& weight, double eps, int64_t isa, int64_t threads) {
  return norm(x, &residual, weight, eps, isa, threads);
}

Tensor silu_mul(const Tensor& gate_up, int64_t isa, int64_t threads) {
  openlora::SiluMul a{};
  a.is_float = is_float(gate_up, "gate_up");
  check(gate_up, "gate_up", 2, gate_up.scalar_type());
  STD_TORCH_CHECK(gate_up.size(1) % 2 == 0, "openlora: gate_up has an odd number of columns");
  a.rows = gate_up.size(0);
  a.size = gate_up.size(1) / 2;
  Tensor y = torch::stable::new_empty(gate_up, {a.rows, a.size});
  a.gate_up = gate_up.data_ptr();
  a.y = y.data_ptr();
  a.threads = static_cast<int>(threads);
  table(isa).silu_mul(a);
  return y;
}

void check_caches(const Tensor& key_cache, const Tensor& value_cache, ScalarType type) {
  check(key_cache, "key_cache", 4, type);
  check(value_cache, "value_cache", 4, type);
  for (int64_t d = 0; d < 4; ++d)
    STD_TORCH_CHECK(key_cache.size(d) == value_cache.size(d), "openlora: key_cache and value_cache differ in shape");
}

Tensor rope_kv_write(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& positions, const Tensor& kv_slots,
                     Tensor key_cache, Tensor value_cache, const MaybeTensor& q_norm, const MaybeTensor& k_norm, double eps, int64_t isa, int64_t threads) {
  openlora::RopeKv a{};
  a.is_float = is_float(qkv, "qkv");
  check(qkv, "qkv", 2, qkv.scalar_type());
  check_caches(key_cache, value_cache, qkv.scalar_type());
  a.rows = qkv.size(0);
  a.groups = key_cache.size(1);
  a.block_size = key_cache.size(2);
  a.head_size = key_cache.size(3);
  a.heads = qkv.size(1) / a.head_size - 2 * a.groups;
  STD_TORCH_CHECK(a.head_size % 2 == 0 && a.heads > 0 && qkv.size(1) % a.head_size == 0, "openlora: qkv does not hold whole heads");
  check(cos, "cos", 2, ScalarType::Float);
  check(sin, "sin", 2, ScalarType::Float);
  STD_TORCH_CHECK(cos.size(1) == a.head_size / 2 && sin.size(1) == cos.size(1) && sin.size(0) == cos.size(0), "openlora: cos or sin malformed");
  check(positions, "positions", 1, ScalarType::Long);
  check(kv_slots, "kv_slots", 1, ScalarType::Long);
  STD_TORCH_CHECK(positions.size(0) == a.rows && kv_slots.size(0) == a.rows, "openlora: positions or kv_slots do not match the rows");
  for (const MaybeTensor* weight : {&q_norm, &k_norm})
    if (weight->has_value()) {
      check(**weight, "q_norm or k_norm", 1, qkv.scalar_type());
      STD_TORCH_CHECK((*weight)->size(0) == a.head_size, "openlora: q_norm or k_norm is not one head long");
    }
  a.positions = as<int64_t>(positions);
  a.kv_slots = as<int64_t>(kv_slots);
  for (int64_t t = 0; t < a.rows; ++t) {
    STD_TORCH_CHECK(a.positions[t] >= 0 && a.positions[t] < cos.size(0), "openlora: position ", a.positions[t], " of ", cos.size(0));
    STD_TORCH_CHECK(a.kv_slots[t] >= 0 && a.kv_slots[t] < key_cache.size(0) * a.block_size, "openlora: kv slot ", a.kv_slots[t], " is outside the cache");
  }
  Tensor q = torch::stable::new_empty(qkv, {a.rows, a.heads * a.head_size});
  a.qkv = qkv.data_ptr();
  a.cos = as<float>(cos);
  a.sin = as<float>(sin);
  a.key_cache = key_cache.data_ptr();
  a.value_cache = value_cache.data_ptr();
  a.q_norm = data(q_norm);
  a.k_norm = data(k_norm);
  a.q = q.data_ptr();
  a.eps = static_cast<float>(eps);
  a.threads = static_cast<int>(threads);
  table(isa).rope_kv_write(a);
  return q;
}

void check_sequences(const openlora::Attention& a, int64_t rows, int64_t blocks) {
  STD_TORCH_CHECK(a.query_start[0] == 0 && a.query_start[a.sequences] == rows, "openlora: query_start does not cover the rows");
  for (int64_t s = 0; s < a.sequences; ++s) {
    const int64_t count = a.query_start[s + 1] - a.query_start[s], context = a.context_lens[s];
    const int64_t needed = (context + a.block_size - 1) / a.block_size;
    STD_TORCH_CHECK(count >= 0 && context >= count && needed <= a.max_blocks, "openlora: sequence ", s, " has ", count, " rows and context ", context);
    for (int64_t b = 0; b < needed; ++b) {
      const int32_t block = a.block_tables[s * a.max_blocks + b];
      STD_TORCH_CHECK(block >= 0 && block < blocks, "openlora: sequence ", s, " names block ", block, " of ", blocks);
    }
  }
}

Tensor paged_attention(const Tensor& q, const Tensor& key_cache, const Tensor& value_cache, const Tensor& block_tables,
                       const Tensor& query_start, const Tensor& context_lens, double scale, int64_t window, int64_t isa, int64_t threads) {
  openlora::Attention a{};
  a.is_float = is_float(q, "q");
  check(q, "q", 2, q.scalar_type());
  check_caches(key_cache, value_cache, q.scalar_type());
  check(block_tables, "block_tables", 2, ScalarType::Int);
  check(query_start, "query_start", 1, ScalarType::Int);
  check(context_lens, "context_lens", 1, ScalarType::Int);
  a.sequences = context_lens.size(0);
  a.max_blocks = block_tables.size(1);
  a.groups = key_cache.size(1);
  a.block_size = key_cache.size(2);
  a.head_size = key_cache.size(3);
  a.heads = q.size(1) / a.head_size;
  STD_TORCH_CHECK(q.size(1) % a.head_size == 0 && a.heads % a.groups == 0, "openlora: q does not hold whole groups of heads");
  STD_TORCH_CHECK(query_start.size(0) == a.sequences + 1 && block_tables.size(0) == a.sequences, "openlora: the sequence tables differ in length");
  a.block_tables = as<int32_t>(block_tables);
  a.query_start = as<int32_t>(query_start);
  a.context_lens = as<int32_t>(context_lens);
  check_sequences(a, q.size(0), key_cache.size(0));
  Tensor y = torch::stable::new_empty(q, {q.size(0), q.size(1)});
  a.q = q.data_ptr();
  a.key_cache = key_cache.data_ptr();
  a.value_cache = value_cache.data_ptr();
  a.y = y.data_ptr();
  a.window = window;
  a.scale = static_cast<float>(scale);
  a.threads = static_cast<int>(threads);
  table(isa).attention(a);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY(openlora, m) {
  m.def("best_isa() -> int");
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def("linear(Tensor x, Tensor packed, Tensor? bias, int out_features, bool is_float, int isa, int threads) -> Tensor");
  m.def(
      "lora_linear(Tensor x, Tensor packed, Tensor? bias, int out_features, bool is_float, Tensor pages, Tensor slot_pages, Tensor ranks, "
      "Tensor scales, int page_rank, Tensor row_start, Tensor slot, Tensor weight, Tensor spans, int isa, int threads) -> Tensor");
  m.def(
      "sgmv(Tensor(a!) y, Tensor x, Tensor pages, Tensor slot_pages, Tensor ranks, Tensor scales, int page_rank, Tensor row_start, "
      "Tensor slot, Tensor weight, Tensor spans, int isa, int threads) -> ()");
  m.def("rms_norm(Tensor x, Tensor weight, float eps, int isa, int threads) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps, int isa, int threads) -> Tensor");
  m.def("silu_mul(Tensor gate_up, int isa, int threads) -> Tensor");
  m.def(
      "rope_kv_write(Tensor qkv, Tensor cos, Tensor sin, Tensor positions, Tensor kv_slots, Tensor(a!) key_cache, Tensor(b!) value_cache, "
      "Tensor? q_norm, Tensor? k_norm, float eps, int isa, int threads) -> Tensor");
  m.def(
      "paged_attention(Tensor q, Tensor key_cache, Tensor value_cache, Tensor block_tables, Tensor query_start, Tensor context_lens, "
      "float scale, int sliding_window, int isa, int threads) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(openlora, CompositeExplicitAutograd, m) { m.impl("best_isa", TORCH_BOX(&best_isa)); }

STABLE_TORCH_LIBRARY_IMPL(openlora, CPU, m) {
  m.impl("pack_linear", TORCH_BOX(&pack_linear));
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("lora_linear", TORCH_BOX(&lora_linear));
  m.impl("sgmv", TORCH_BOX(&sgmv));
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("add_rms_norm", TORCH_BOX(&add_rms_norm));
  m.impl("silu_mul", TORCH_BOX(&silu_mul));
  m.impl("rope_kv_write", TORCH_BOX(&rope_kv_write));
  m.impl("paged_attention", TORCH_BOX(&paged_attention));
}
