#include "forward_launch.cuh"

namespace reft::cuda {

const char* launch_forward(const ForwardCall& call, cudaStream_t stream) {
  if (call.pool_rows == 0) return nullptr;
  if (call.way != Way::usual) return launch_forward_way(call, false, stream);
  return run_forward<false>(call, stream);
}

#ifdef __CUDACC__
std::string describe_forward() { return forward_forms<false>(); }
#endif

}  // namespace reft::cuda
