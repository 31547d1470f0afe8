// Search of a gallery for a few probes (card_search.py), in float32: `scores` reads every row once,
// as fast as the card reads memory, and says the best of each group of rows; `best` finds the best
// subjects in the best groups. Compiled with DIM (of the vectors, a multiple of 8) and PROBES.
//
// A group begins and ends between subjects, so the best K subjects lie in the K best groups.

#define WARP 32
#define ROWS (PROBES > 1 ? 2 : 4)         // that a warp reads side by side
#define WIDE 8                          // halves of a load of 16 bytes
#define CHUNKS ((DIM + WARP * WIDE - 1) / (WARP * WIDE))
#define NOTHING -4.0f                   // below those who are gone
#define GONE -2.0f                      // card_search.NEVER

struct __align__(16) Halves { unsigned int pair[4]; };

__device__ __forceinline__ float low(unsigned int pair) {
  float value;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, a; }" : "=f"(value) : "r"(pair));
  return value;
}

__device__ __forceinline__ float high(unsigned int pair) {
  float value;
  asm("{ .reg .b16 a, b; mov.b32 {a, b}, %1; cvt.f32.f16 %0, b; }" : "=f"(value) : "r"(pair));
  return value;
}

// matrix [rows][DIM] halves, probes [PROBES][DIM], gone [rows] or null, groups [groups + 1] rows that
// each begins with -> scored [PROBES][rows], group_best [PROBES][groups]. A block a group.
extern "C" __global__ void scores(
    const Halves* __restrict__ matrix, const float* __restrict__ probes,
    const unsigned char* __restrict__ gone, const int* __restrict__ groups, float* scored,
    float* group_best, long long rows) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  float own[PROBES][CHUNKS][WIDE];
#pragma unroll
  for (int p = 0; p < PROBES; ++p)
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c) {
      const int column = (c * WARP + lane) * WIDE;
#pragma unroll
      for (int i = 0; i < WIDE; ++i)
        own[p][c][i] = column < DIM ? probes[p * DIM + column + i] : 0.0f;
    }
  const int first = groups[blockIdx.x], last = groups[blockIdx.x + 1];
  float most[PROBES];
#pragma unroll
  for (int p = 0; p < PROBES; ++p) most[p] = NOTHING;
  for (int row = first + warp * ROWS; row < last; row += warps * ROWS) {
    Halves read[ROWS][CHUNKS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        const int column = (c * WARP + lane) * WIDE;
        // The last rows again, rather than rows that are not there.
        const long long at = row + r < last ? row + r : last - 1;
        if (column < DIM) read[r][c] = matrix[at * (DIM / WIDE) + c * WARP + lane];
        else read[r][c] = Halves{{0, 0, 0, 0}};
      }
#pragma unroll
    for (int p = 0; p < PROBES; ++p) {
      float sum[ROWS];
#pragma unroll
      for (int r = 0; r < ROWS; ++r) {
        sum[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
          for (int i = 0; i < WIDE / 2; ++i) {
            sum[r] = fmaf(low(read[r][c].pair[i]), own[p][c][2 * i], sum[r]);
            sum[r] = fmaf(high(read[r][c].pair[i]), own[p][c][2 * i + 1], sum[r]);
          }
      }
#pragma unroll
      for (int step = WARP / 2; step; step /= 2)
#pragma unroll
        for (int r = 0; r < ROWS; ++r) sum[r] += __shfl_xor_sync(0xffffffffu, sum[r], step);
      if (lane < ROWS && row + lane < last) {
        float value = sum[0];
#pragma unroll
        for (int r = 1; r < ROWS; ++r) value = lane == r ? sum[r] : value;
        if (gone && gone[row + lane]) value = GONE;
        scored[p * rows + row + lane] = value;
        most[p] = fmaxf(most[p], value);
      }
    }
  }
  __shared__ float found[PROBES][WARP];
#pragma unroll
  for (int p = 0; p < PROBES; ++p) {
#pragma unroll
    for (int step = ROWS / 2; step; step /= 2)
      most[p] = fmaxf(most[p], __shfl_xor_sync(0xffffffffu, most[p], step));
    if (lane == 0) found[p][warp] = most[p];
  }
  __syncthreads();
  if (threadIdx.x < PROBES) {
    float value = NOTHING;
    for (int w = 0; w < warps; ++w) value = fmaxf(value, found[threadIdx.x][w]);
    group_best[threadIdx.x * gridDim.x + blockIdx.x] = value;
  }
}

struct Found { float value; int at; };

// The greatest of all threads', the first of equal ones; every thread gets it.
__device__ Found greatest(Found own, Found* shared) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
#pragma unroll
  for (int step = WARP / 2; step; step /= 2) {
    const float value = __shfl_xor_sync(0xffffffffu, own.value, step);
    const int at = __shfl_xor_sync(0xffffffffu, own.at, step);
    if (value > own.value || (value == own.value && at < own.at)) own = Found{value, at};
  }
  __syncthreads();  // whoever still reads the last one's
  if (lane == 0) shared[warp] = own;
  __syncthreads();
  own = shared[0];
  for (int w = 1; w < warps; ++w)
    if (shared[w].value > own.value || (shared[w].value == own.value && shared[w].at < own.at))
      own = shared[w];
  return own;
}

// subject_of [rows], first_of [subjects + 1] rows -> subjects and cosines [PROBES][keep]; fewer are
// filled up with a cosine of NOTHING. A block a probe. `scored` and `group_best` are used up.
extern "C" __global__ void best(
    float* scored, float* group_best, const int* __restrict__ groups,
    const int* __restrict__ subject_of, const int* __restrict__ first_of, int* subjects,
    float* cosines, long long rows, int count, int keep) {
  __shared__ Found shared[WARP];
  __shared__ int chosen[MOST];
  scored += blockIdx.x * rows;
  group_best += blockIdx.x * (long long)count;
  const int wanted = keep < count ? keep : count;
  for (int k = 0; k < wanted; ++k) {
    Found own = {NOTHING - 1, 0x7fffffff};
    for (int g = threadIdx.x; g < count; g += blockDim.x)
      if (group_best[g] > own.value) own = Found{group_best[g], g};
    own = greatest(own, shared);
    if (threadIdx.x == own.at % blockDim.x) {  // who reads it again
      group_best[own.at] = NOTHING - 1;
      chosen[k] = own.at;
    }
  }
  __syncthreads();
  for (int k = 0; k < keep; ++k) {
    Found own = {NOTHING, 0x7fffffff};
    for (int g = 0; g < wanted; ++g)
      for (int row = groups[chosen[g]] + threadIdx.x; row < groups[chosen[g] + 1]; row += blockDim.x)
        if (scored[row] > own.value || (scored[row] == own.value && row < own.at))
          own = Found{scored[row], row};
    own = greatest(own, shared);
    const bool some = own.value > NOTHING;
    const int subject = some ? subject_of[own.at] : 0;
    if (threadIdx.x == 0) {
      subjects[blockIdx.x * keep + k] = subject;
      cosines[blockIdx.x * keep + k] = own.value;
    }
    if (some)
      for (int row = first_of[subject] + threadIdx.x; row < first_of[subject + 1]; row += blockDim.x)
        scored[row] = NOTHING;
    __syncthreads();
  }
}
