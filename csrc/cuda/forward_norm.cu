#include "forward_launch.cuh"

namespace reft::cuda {

const char* launch_forward_norm(const ForwardCall& call, cudaStream_t stream) {
  if (call.way != Way::usual) return launch_forward_way(call, true, stream);
  return run_forward<true>(call, stream);
}

#ifdef __CUDACC__
std::string describe_forward_norm() { return forward_forms<true>(); }
#endif

}  // namespace reft::cuda
