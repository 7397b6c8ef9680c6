// Frozen weights made whole: the forms other than NF4 (nf4.cpp) and blocks (blocks.cpp), and tiles of large ones.

#include "stored.h"

#include <ATen/ATen.h>
#include <c10/core/GradMode.h>

#include <algorithm>
#include <numeric>

#include "guard.h"
#include "kernels.h"

namespace lora {

// On the CPU large weights are worked on in tiles of about this many numbers, 8 MiB in f32: what is as large as some
// weights (118 MiB) would come from the kernel anew each time, and its page faults cost more than all arithmetic of
// dequantising. Of an f32 weight in one piece oneDNN makes such a copy itself.
constexpr int64_t TILE = 1 << 21;
// Elsewhere in tiles of so many, 64 MiB in half precision: as large as the layers of image models; a half of the largest of a
// language model of 8 billion, a seventh of those of 70.
constexpr int64_t DEVICE_TILE = 1 << 25;

int64_t tile_of(int64_t outputs, int64_t row, int64_t numbers) {
  if (row * outputs <= numbers) return outputs;
  // A tile of NF4 begins a block, and oneDNN fills channels up to sixteen.
  const int64_t whole = std::lcm(nf4::BLOCK / std::gcd(nf4::BLOCK, row), int64_t(16));
  return std::min(outputs, std::max(whole, numbers / row / whole * whole));
}

Stored::Stored(const LoraStored &raw)
    : values(*raw.values), scale(or_none(raw.scale)),
      nf4{values, or_none(raw.absmax), or_none(raw.nested), or_none(raw.offset)},
      shape(raw.shape, raw.shape + raw.axes), portable(raw.portable != 0),
      block_type(static_cast<blocks::Type>(raw.blocks)), id(raw.staged) {
  TORCH_CHECK(raw.axes >= 1, "a weight has a shape");
  for (size_t axis = 1; axis < raw.axes; ++axis) row *= shape[axis];
  if (raw.staging != nullptr) staging = *static_cast<const std::shared_ptr<Staging> *>(raw.staging);
}

int64_t Stored::tile() const { return tile_of(shape[0], row, dry::as_on_cpu(values) ? TILE : DEVICE_TILE); }

Present::Present(const Stored &own) : weight(own) {
  if (!own.staging) return;
  lease.emplace(own.staging, own.id);
  const auto &parts = lease->parts;
  weight.values = parts[0];
  weight.scale = parts[1];
  weight.nf4 = {parts[0], parts[2], parts[3], parts[4]};
}

Rows::Rows(const Stored &own, at::ScalarType kind) : own(own), kind(kind) {
  if (own.is_nf4() && !nf4::by_kernel(own.nf4, own.portable)) most = nf4::magnitudes(own.nf4);
}

at::Tensor Rows::operator()(int64_t start, int64_t count) const {
  std::vector<int64_t> shape = own.shape;
  shape[0] = count;
  if (own.is_nf4())
    return nf4::dequantise(own.nf4, most, start * own.row, count * own.row, kind, own.portable).view(shape);
  if (own.is_blocks()) {
    return blocks::dequantise(own.values, own.block_type, start * own.row, count * own.row, kind, own.portable)
        .view(shape);
  }
  const at::Tensor stored = own.values.narrow(0, start, count);
  return own.scale.defined() ? scaled(stored, start) : stored.to(kind);
}

// Values of 8 bits times the factors of their outputs.
at::Tensor Rows::scaled(const at::Tensor &stored, int64_t start) const {
  if (dry::as_on_cuda(stored)) return at::empty(stored.sizes(), stored.options().dtype(kind));
  const Kernels *own_kernels = stored.is_cuda() ? kernels.load() : nullptr;
  // It reads eight numbers at once.
  if (own_kernels != nullptr && stored.is_contiguous() && start * own.row % 8 == 0) {
    const at::Tensor rows = at::empty(stored.sizes(), stored.options().dtype(kind));
    const float *scale = own.scale.const_data_ptr<float>() + start;
    const bool fp8 = stored.scalar_type() == at::kFloat8_e4m3fn;
    if (done(own_kernels->scaled(stored.const_data_ptr(), fp8, scale, own.row, stored.numel(), static_cast<int>(kind),
                                 rows.get_device(), rows.mutable_data_ptr()))) {
      return rows;
    }
  }
  return stored.to(kind).mul_(own.scale.narrow(0, start, stored.size(0)).to(kind));
}

extern "C" {

// What is made whole on CUDA is made so by these from now on; they stay.
void lora_kernels(const Kernels *own) { kernels.store(own); }

// The whole weight, a new tensor in `kind`.
int lora_frozen_whole(const LoraStored *weight, int kind, at::Tensor **output) {
  return guarded([&] {
    const c10::NoGradGuard no_grad;
    const Stored own(*weight);
    const Present present(own);
    const at::Tensor whole = Rows(*present, static_cast<at::ScalarType>(kind))(0, own.shape[0]);
    // What is in the ring will be written over.
    *output = new at::Tensor(own.staging ? whole.clone() : whole);
  });
}

} // extern "C"

} // namespace lora
