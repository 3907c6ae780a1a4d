// What exllamav3's quantiser, in Python, calls of its kernels. The functions are defined in the package's own sources.

#include <torch/extension.h>

#include "quant/frac.cuh"
#include "quant/pack.cuh"
#include "quant/quantize.cuh"

PYBIND11_MODULE(TORCH_EXTENSION_NAME, module) {
    module.def("quantize_tiles", &quantize_tiles);
    module.def("quantize_tiles_frac", &quantize_tiles_frac);
    module.def("quantize_tiles_scratch", &quantize_tiles_scratch);
    module.def("pack_trellis", &pack_trellis);
    module.def("pack_trellis_frac", &pack_trellis_frac);
}
