// Every kernel of one instruction set. An isa_*.cc includes this inside its own namespace and compiles it with its own flags.
#include "cpu/simd.h"
// The order matters: each file uses the ones above it.
#include "cpu/sgmv.h"
#include "cpu/gemm.h"
#include "cpu/norm.h"
#include "cpu/rope.h"
#include "cpu/attention.h"
