// Search of a gallery for a few probes (card_search.py), in float32: `scores` reads every row once,
// as fast as the card reads memory, and says the best of each group of rows; `best` finds the best
// subjects in the best groups. Compiled with DIM (of the vectors, a multiple of 8), PROBES, MOST
// (subjects that can be asked for), ROWS (that a warp reads side by side) and TEAM (warps that share
// a group).
//
// A group begins and ends between subjects, so the best K subjects lie in the K best groups.

#define WARP 32
#define WIDE 8                          // halves of a load of 16 bytes
#define CHUNKS ((DIM + WARP * WIDE - 1) / (WARP * WIDE))
#define SUMS (PROBES * ROWS)            // a power of two, at most WARP
#define SHARE (WARP / SUMS)             // lanes that end with the same sum
#define NOTHING -4.0f                   // below those who are gone
#define GONE -2.0f                      // card_search.NEVER

struct __align__(16) Halves { unsigned int pair[4]; };

// What nobody reads again, so that it takes no room from what is.
__device__ __forceinline__ Halves once(const Halves* from) {
  Halves read;
  asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
      : "=r"(read.pair[0]), "=r"(read.pair[1]), "=r"(read.pair[2]), "=r"(read.pair[3])
      : "l"(from));
  return read;
}

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

// matrix [rows][DIM] halves, probes [PROBES][DIM], gone [rows] or null, groups [count + 1] rows that
// each begins with -> scored [PROBES][rows], group_best [PROBES][count]. TEAM warps a group.
extern "C" __global__ void scores(
    const Halves* __restrict__ matrix, const float4* __restrict__ probes,
    const unsigned char* __restrict__ gone, const int* __restrict__ groups, float* scored,
    float* group_best, long long rows, int count) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  const int group = blockIdx.x * (warps / TEAM) + warp / TEAM;
  const int first = group < count ? groups[group] : 0, last = group < count ? groups[group + 1] : 0;
  float own[PROBES][CHUNKS][WIDE];
#pragma unroll
  for (int p = 0; p < PROBES; ++p)
#pragma unroll
    for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
      for (int i = 0; i < WIDE / 4; ++i) {
        const int at = (c * WARP + lane) * (WIDE / 4) + i;
        const float4 four = at < DIM / 4 ? probes[p * (DIM / 4) + at] : float4{0, 0, 0, 0};
        own[p][c][4 * i] = four.x, own[p][c][4 * i + 1] = four.y;
        own[p][c][4 * i + 2] = four.z, own[p][c][4 * i + 3] = four.w;
      }
  const int probe = lane / SHARE / ROWS, mine = lane / SHARE % ROWS;  // whose sum this lane ends with
  float most = NOTHING;
  for (int row = first + warp % TEAM * ROWS; row < last; row += TEAM * ROWS) {
    Halves read[ROWS][CHUNKS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int c = 0; c < CHUNKS; ++c) {
        // The last rows again, rather than rows that are not there.
        const long long at = row + r < last ? row + r : last - 1;
        if ((c * WARP + lane) * WIDE < DIM)
          read[r][c] = once(matrix + at * (DIM / WIDE) + c * WARP + lane);
        else
          read[r][c] = Halves{{0, 0, 0, 0}};
      }
    float sum[SUMS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r)
#pragma unroll
      for (int p = 0; p < PROBES; ++p) {
        float of_one = 0.0f;
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c)
#pragma unroll
          for (int i = 0; i < WIDE / 2; ++i) {
            of_one = fmaf(low(read[r][c].pair[i]), own[p][c][2 * i], of_one);
            of_one = fmaf(high(read[r][c].pair[i]), own[p][c][2 * i + 1], of_one);
          }
        sum[p * ROWS + r] = of_one;
      }
    // Half of the lanes add up one half of the sums, half of them the other, until each has one;
    // every sum is added up in the same order, so equal rows are equal.
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) {
      const int kept = SUMS * step / WARP;
      if (kept) {
        const bool upper = lane & step;
#pragma unroll
        for (int i = 0; i < kept; ++i) {
          const float given = upper ? sum[i] : sum[i + kept];
          const float own_sum = upper ? sum[i + kept] : sum[i];
          sum[i] = own_sum + __shfl_xor_sync(0xffffffffu, given, step);
        }
      } else {
        sum[0] += __shfl_xor_sync(0xffffffffu, sum[0], step);
      }
    }
    if (row + mine < last) {
      float value = sum[0];
      if (gone && gone[row + mine]) value = GONE;
      if (lane % SHARE == 0) scored[probe * rows + row + mine] = value;
      most = fmaxf(most, value);
    }
  }
#pragma unroll
  for (int step = SHARE * ROWS / 2; step >= SHARE; step /= 2)
    most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, step));
#if TEAM > 1
  __shared__ float found[WARP][PROBES];
  if (lane % (SHARE * ROWS) == 0) found[warp][probe] = most;
  __syncthreads();
  if (warp % TEAM) return;
  for (int w = 1; w < TEAM; ++w) most = fmaxf(most, found[warp + w][probe]);
#endif
  if (group < count && lane % (SHARE * ROWS) == 0)
    group_best[probe * (long long)count + group] = most;
}

typedef unsigned long long Key;  // of a value and its place: the greater, and of equal ones the first

__device__ __forceinline__ Key key(float value, int at) {
  if (!(value > NOTHING)) return 0;
  const unsigned int bits = __float_as_uint(value);
  const unsigned int ordered = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return (Key)ordered << 32 | ~(unsigned int)at;
}

__device__ __forceinline__ int place(Key of) { return ~(unsigned int)of; }

__device__ __forceinline__ float value(Key of) {
  const unsigned int ordered = of >> 32;
  return __uint_as_float(ordered & 0x80000000u ? ordered & 0x7fffffffu : ~ordered);
}

// Into a list that is sorted, the greatest first; no two keys are equal.
__device__ __forceinline__ void take(Key (&list)[MOST], Key one) {
  if (one <= list[MOST - 1]) return;
#pragma unroll
  for (int i = 0; i < MOST; ++i) {
    const Key less = one > list[i] ? list[i] : one;
    list[i] = one > list[i] ? one : list[i];
    one = less;
  }
}

// The first `keep` of all the lanes' lists, which are used up.
__device__ __forceinline__ void warps_best(Key (&list)[MOST], Key* into, int keep) {
  for (int k = 0; k < keep; ++k) {
    Key top = list[0];
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) {
      const Key other = __shfl_xor_sync(0xffffffffu, top, step);
      top = other > top ? other : top;
    }
    if (list[0] == top) {
#pragma unroll
      for (int i = 0; i + 1 < MOST; ++i) list[i] = list[i + 1];
      list[MOST - 1] = 0;
    }
    if (threadIdx.x % WARP == 0) into[k] = top;
  }
}

// The first `keep` of all threads' lists, into `best`.
__device__ __forceinline__ void blocks_best(
    Key (&list)[MOST], Key (*of_warps)[MOST], Key* best, int keep) {
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
  warps_best(list, of_warps[warp], keep);
  __syncthreads();
  if (warp == 0) {
#pragma unroll
    for (int i = 0; i < MOST; ++i)
      list[i] = lane < blockDim.x / WARP && i < keep ? of_warps[lane][i] : 0;
    warps_best(list, best, keep);
  }
  __syncthreads();
}

// group_subjects [count + 1] subjects that each group begins with, first_of [subjects + 1] rows ->
// places and cosines [probes][keep] of the best subjects; fewer are filled up with a cosine of
// NOTHING. A block a probe.
extern "C" __global__ void best(
    const float* __restrict__ scored, const float* __restrict__ group_best,
    const int* __restrict__ group_subjects, const int* __restrict__ first_of, int* places,
    float* cosines, long long rows, int count, int keep) {
  __shared__ Key of_warps[WARP][MOST], chosen[MOST];
  const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
  scored += blockIdx.x * rows;
  group_best += blockIdx.x * (long long)count;
  const int wanted = keep < count ? keep : count;
  Key list[MOST];
#pragma unroll
  for (int i = 0; i < MOST; ++i) list[i] = 0;
#pragma unroll 8
  for (int g = threadIdx.x; g < count; g += blockDim.x) take(list, key(group_best[g], g));
  blocks_best(list, of_warps, chosen, wanted);
#pragma unroll
  for (int i = 0; i < MOST; ++i) list[i] = 0;
  // Some warps a group.
  const int parts = warps > wanted ? warps / wanted : 1;
  for (int unit = warp; unit < wanted * parts; unit += warps) {
    const Key of = chosen[unit % wanted];
    if (!of) continue;
    const int last = group_subjects[place(of) + 1];
    for (int s = group_subjects[place(of)] + unit / wanted * WARP + lane; s < last; s += parts * WARP) {
      const int end = first_of[s + 1];
      float most = NOTHING;
      for (int row = first_of[s]; row < end; ++row) most = fmaxf(most, scored[row]);
      take(list, key(most, s));
    }
  }
  blocks_best(list, of_warps, chosen, keep);
  if (threadIdx.x < keep) {
    const Key of = chosen[threadIdx.x];
    places[blockIdx.x * keep + threadIdx.x] = of ? place(of) : 0;
    cosines[blockIdx.x * keep + threadIdx.x] = of ? value(of) : NOTHING;
  }
}
