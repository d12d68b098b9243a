// Masked log-softmax over the rows of a matrix, and its gradient.
#pragma once

#include "device.h"

namespace cl_kernels::cuda {

// Rows of any length, which may start anywhere, but in x, y and mask as many elements past a multiple of 16
// bytes (of the mask: of as many bytes as 16 bytes have elements) as in out.
struct LogSoftmaxParams {
  const void* x;        // [n, m] logits; in the backward the gradient of the output
  const void* y;        // [n, m] the output, in the backward
  const uint8_t* mask;  // [n, m] 1: included, or null: everything is
  void* out;            // [n, m], aligned to 16 bytes and without gaps
  int64_t x_stride, y_stride, mask_stride;
  int n, m;
  int splits;     // of long rows, one block each; 0: a block or a warp a row
  float2* parts;  // [n, splits]
};

// Into how many parts to cut the rows: 0 where a multiprocessor, with so much shared memory for a block,
// holds a row and there are rows enough.
int log_softmax_splits(int n, int m, Type, int multiprocessors, int shared_bytes);

// out = x - LSE(x over the included); -inf elsewhere.
void launch_log_softmax_forward(const LogSoftmaxParams&, Type, cudaStream_t);
// out = x - exp(y) sum(x over the included); 0 elsewhere, and in a row whose y is -inf throughout.
void launch_log_softmax_backward(const LogSoftmaxParams&, Type, cudaStream_t);

}  // namespace cl_kernels::cuda
