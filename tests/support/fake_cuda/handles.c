/* cuBLAS, cuBLASLt and cuDNN as far as they are asked for more than success: see device.c. */

#include <stdlib.h>
#include <string.h>

#define API __attribute__((visibility("default")))
static int handle(void **p) { *p = calloc(1, 4096); return 0; }
API int cublasCreate_v2(void **p) { return handle(p); }
API int cublasLtCreate(void **p) { return handle(p); }
API int cublasLtMatmulDescCreate(void **p) { return handle(p); }
API int cublasLtMatmulPreferenceCreate(void **p) { return handle(p); }
API int cublasLtMatrixLayoutCreate(void **p) { return handle(p); }
API int cublasLtMatrixTransformDescCreate(void **p) { return handle(p); }
API int cublasGetMathMode(void *handle, int *mode) { *mode = 0; return 0; }
API const char *cublasGetStatusName(int status) { return "CUBLAS_STATUS"; }
API const char *cublasGetStatusString(int status) { return "status of a made-up cuBLAS"; }
/* One algorithm fits: the structure of results is 96 bytes, its state 0 for success. */
API int cublasLtMatmulAlgoGetHeuristic(void *a, void *b, void *c, void *d, void *e, void *f,
                                       void *g, int wanted, void *results, int *found) {
  memset(results, 0, 96);
  *found = 1;
  return 0;
}

API int cudnnCreate(void **p) { return handle(p); }
API int cudnnCreateTensorDescriptor(void **p) { return handle(p); }
API int cudnnCreateReduceTensorDescriptor(void **p) { return handle(p); }
API int cudnnCreateFilterDescriptor(void **p) { return handle(p); }
API int cudnnCreateConvolutionDescriptor(void **p) { return handle(p); }
API int cudnnCreatePoolingDescriptor(void **p) { return handle(p); }
API int cudnnCreateActivationDescriptor(void **p) { return handle(p); }
/* Before 9.3 its own attention, which is built from descriptors, is not taken. */
API size_t cudnnGetVersion(void) { return 90100; }
API const char *cudnnGetErrorString(int status) { return "status of a made-up cuDNN"; }
