#include "vec_avx512.h"
// After the vector type that it is written for:
#include "kernel.h"
#include "norm.h"
#include "sum.h"

const reft::Isa reft::kAvx512Bf16 = {"avx512_bf16", forward_tile, fold_tile,
                                     backward_tile, norm_row,     weight_grad};
