// What a card does with the pixels of a batch of pictures, a launch each: `letterbox` puts them on
// canvases, `crops` cuts faces out of them, `plain_ends` looks at their last block, `suppress`
// leaves of a detector's candidates the faces. Compiled when a worker starts (cuda_pixels.py); what
// stands before `__CUDACC__` a test compiles for the host as well. The same as torch_pixels.py and
// candidates.py, in float32 without contraction.

enum Layout { RGB_PLANES = 0, BGR = 1, NV12 = 2 };

struct Picture {
  unsigned long long pixels;   // rows of `pitch` bytes; RGB_PLANES: three planes of `height` rows
  unsigned long long chroma;   // NV12: rows of u and v in turn, of `pitch` bytes
  int height, width, pitch, layout;
  int to_height, to_width;     // its size on the canvas
  int average;                 // of all pixels that fall into one, instead of between four
  int unused;
  float colour[6];             // NV12: luma's factor and offset, v in red, u and v in green, u in blue
};

struct Crop {
  long long offset;            // of its first byte in the output
  int picture, size;
  float map[10];               // for x, then y: factor of x, factor of y, shift, least, most
};

struct Colour { float b, g, r; };

#ifdef __CUDACC__
#define HOST_OR_DEVICE __device__ __forceinline__
#else
#include <math.h>
#define HOST_OR_DEVICE static inline
#endif

HOST_OR_DEVICE float bounded(float value, float least, float most) {
  return fminf(fmaxf(value, least), most);
}

HOST_OR_DEVICE Colour pixel(const Picture& picture, int x, int y) {
  const unsigned char* row =
      (const unsigned char*)picture.pixels + (long long)y * picture.pitch;
  if (picture.layout == BGR) {
    return {(float)row[3 * x], (float)row[3 * x + 1], (float)row[3 * x + 2]};
  }
  if (picture.layout == RGB_PLANES) {
    long long plane = (long long)picture.height * picture.pitch;
    return {(float)row[x + 2 * plane], (float)row[x + plane], (float)row[x]};
  }
  const unsigned char* chroma =
      (const unsigned char*)picture.chroma + (long long)(y / 2) * picture.pitch + (x & ~1);
  const float* c = picture.colour;
  float luma = ((float)row[x] - c[1]) * c[0];
  float u = (float)chroma[0] - 128.0f, v = (float)chroma[1] - 128.0f;
  return {bounded(luma + c[5] * u, 0.0f, 255.0f),
          bounded(luma + c[3] * u + c[4] * v, 0.0f, 255.0f),
          bounded(luma + c[2] * v, 0.0f, 255.0f)};
}

// Nothing (black) outside of the picture.
HOST_OR_DEVICE void add(Colour& sum, const Picture& picture, int x, int y, float weight) {
  if (x < 0 || y < 0 || x >= picture.width || y >= picture.height) return;
  Colour found = pixel(picture, x, y);
  sum.b += found.b * weight;
  sum.g += found.g * weight;
  sum.r += found.r * weight;
}

HOST_OR_DEVICE Colour between(const Picture& picture, float x, float y) {
  float left = floorf(x), top = floorf(y);
  float right_part = x - left, lower_part = y - top;
  int column = (int)left, row = (int)top;
  Colour sum = {0.0f, 0.0f, 0.0f};
  add(sum, picture, column, row, (1.0f - right_part) * (1.0f - lower_part));
  add(sum, picture, column + 1, row, right_part * (1.0f - lower_part));
  add(sum, picture, column, row + 1, (1.0f - right_part) * lower_part);
  add(sum, picture, column + 1, row + 1, right_part * lower_part);
  return sum;
}

HOST_OR_DEVICE Colour averaged(const Picture& picture, int x, int y) {
  int left = (int)((long long)x * picture.width / picture.to_width);
  int right = (int)(((long long)(x + 1) * picture.width + picture.to_width - 1) / picture.to_width);
  int top = (int)((long long)y * picture.height / picture.to_height);
  int bottom =
      (int)(((long long)(y + 1) * picture.height + picture.to_height - 1) / picture.to_height);
  Colour sum = {0.0f, 0.0f, 0.0f};
  for (int row = top; row < bottom; ++row) {
    for (int column = left; column < right; ++column) add(sum, picture, column, row, 1.0f);
  }
  float pixels = (float)((right - left) * (bottom - top));
  return {sum.b / pixels, sum.g / pixels, sum.r / pixels};
}

HOST_OR_DEVICE void write(unsigned char* out, const Colour& colour) {
  out[0] = (unsigned char)bounded(rintf(colour.b), 0.0f, 255.0f);
  out[1] = (unsigned char)bounded(rintf(colour.g), 0.0f, 255.0f);
  out[2] = (unsigned char)bounded(rintf(colour.r), 0.0f, 255.0f);
}

HOST_OR_DEVICE void letterbox_pixel(const Picture& picture, unsigned char* out, int x, int y) {
  Colour found = {0.0f, 0.0f, 0.0f};
  if (x < picture.to_width && y < picture.to_height) {
    if (picture.average) {
      found = averaged(picture, x, y);
    } else {
      float across = (float)picture.width / (float)picture.to_width;
      float down = (float)picture.height / (float)picture.to_height;
      found = between(
          picture,
          bounded(((float)x + 0.5f) * across - 0.5f, 0.0f, (float)(picture.width - 1)),
          bounded(((float)y + 0.5f) * down - 0.5f, 0.0f, (float)(picture.height - 1)));
    }
  }
  write(out, found);
}

HOST_OR_DEVICE void crop_pixel(
    const Picture* pictures, const Crop& crop, unsigned char* out, int x, int y) {
  const float* m = crop.map;
  float at_x = bounded((float)x * m[0] + (float)y * m[1] + m[2], m[3], m[4]);
  float at_y = bounded((float)x * m[5] + (float)y * m[6] + m[7], m[8], m[9]);
  write(out, between(pictures[crop.picture], at_x, at_y));
}

#ifdef __CUDACC__

// Grid (blocks of 256 pixels, pictures). `canvases`: [pictures, height, width, 3], BGR.
extern "C" __global__ void letterbox(
    const Picture* pictures, unsigned char* canvases, int height, int width) {
  int at = blockIdx.x * blockDim.x + threadIdx.x;
  if (at >= height * width) return;
  unsigned char* out = canvases + ((long long)blockIdx.y * height * width + at) * 3;
  letterbox_pixel(pictures[blockIdx.y], out, at % width, at / width);
}

// Grid (crops).
extern "C" __global__ void crops(
    const Picture* pictures, const Crop* table, unsigned char* out) {
  const Crop crop = table[blockIdx.x];
  for (int at = threadIdx.x; at < crop.size * crop.size; at += blockDim.x) {
    crop_pixel(pictures, crop, out + crop.offset + 3 * at, at % crop.size, at / crop.size);
  }
}

// Grid (pictures), 64 threads. 1 where the last 8 x 8 pixels are of one colour.
extern "C" __global__ void plain_ends(const Picture* pictures, unsigned char* plain) {
  const Picture picture = pictures[blockIdx.x];
  int x = picture.width - 1, y = picture.height - 1;
  Colour last = pixel(picture, x, y);
  Colour own = pixel(picture, x - threadIdx.x % 8, y - threadIdx.x / 8);
  int same = own.b == last.b && own.g == last.g && own.r == last.r;
  same = __syncthreads_and(same);
  if (threadIdx.x == 0) plain[blockIdx.x] = (unsigned char)same;
}

// Grid (pictures), 1024 threads; count <= 1024. Greedy suppression of `candidates`
// [pictures, count, 15], best first, into `kept` [pictures, limit, 15]; score 0 = no more.
extern "C" __global__ void suppress(
    const float* candidates, float* kept, int count, int limit, float score, float iou) {
  const int size = 15;
  __shared__ int next;
  __shared__ float best[5];
  const float* rows = candidates + (long long)blockIdx.x * count * size;
  float* out = kept + (long long)blockIdx.x * limit * size;
  int own = threadIdx.x;
  float value[size];
  bool alive = own < count;
  if (alive) {
    for (int i = 0; i < size; ++i) {
      value[i] = rows[own * size + i];
      alive = alive && isfinite(value[i]);
    }
    alive = alive && value[0] >= score && value[0] > 0.0f && value[3] > 0.0f && value[4] > 0.0f;
  }
  for (int i = own; i < limit * size; i += blockDim.x) out[i] = 0.0f;
  for (int taken = 0; taken < limit; ++taken) {
    if (own == 0) next = count;
    __syncthreads();
    unsigned int there = __ballot_sync(0xffffffffu, alive);
    if (own % 32 == 0 && there) atomicMin(&next, own + __ffs(there) - 1);
    __syncthreads();
    if (next == count) return;
    if (own == next) {
      alive = false;
      for (int i = 0; i < size; ++i) out[taken * size + i] = value[i];
      best[0] = value[1];
      best[1] = value[2];
      best[2] = value[1] + value[3];
      best[3] = value[2] + value[4];
      best[4] = value[3] * value[4];
    }
    __syncthreads();
    if (alive) {
      float across =
          fmaxf(fminf(best[2], value[1] + value[3]) - fmaxf(best[0], value[1]), 0.0f);
      float down = fmaxf(fminf(best[3], value[2] + value[4]) - fmaxf(best[1], value[2]), 0.0f);
      float shared = across * down;
      alive = shared <= iou * (best[4] + value[3] * value[4] - shared);
    }
  }
}

#endif
