// The LoRA shrink of short steps on Hopper: see lora_stream_sm90.cu. Called by launch_lora_shrink, which says where it can run.
#pragma once

#include "lora_shrink.h"

namespace openlora {

// Planes of v that the kernel makes of rows of so many inputs; 0 where it cannot run.
int lora_stream_planes(int64_t inputs);

// Whether it can take these, on Hopper and where launch_lora_shrink could use tensor cores.
bool can_stream_lora(const LoraShrinkArgs& args);

cudaError_t launch_lora_stream(const LoraShrinkArgs& args, cudaStream_t stream);

}  // namespace openlora
