// Times variants of the stencils; each in a process of its own. See gen.py.
#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <sys/wait.h>
#include <unistd.h>
#include <signal.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <string>
#include <vector>
#include <chrono>
#include "variants.h"

using bf16 = __nv_bfloat16;
#define CHECK(x) do { cudaError_t e_ = (x); if (e_ != cudaSuccess) { printf("#fail %s line %d: %s\n", current.c_str(), __LINE__, cudaGetErrorString(e_)); fflush(stdout); _exit(1); } } while (0)
static std::string current;

struct Case { int size, out, channels, stride, count; };
static const Case kCases[] = {{112, 56, 384, 2, 1}, {56, 56, 384, 1, 1}, {56, 28, 768, 2, 1}, {28, 28, 768, 1, 2},
                              {28, 14, 1536, 2, 1}, {14, 14, 1536, 1, 6}, {14, 7, 3072, 2, 1}, {7, 7, 3072, 1, 1}};
constexpr int kCaseCount = 8, kBatch = 64;

__device__ float noise(uint64_t i, uint32_t seed) {
  uint64_t h = (i + 1) * 0x9E3779B97F4A7C15ull + seed * 0xD1B54A32D192ED03ull;
  h ^= h >> 31; h *= 0xBF58476D1CE4E5B9ull; h ^= h >> 27; h *= 0x94D049BB133111EBull; h ^= h >> 32;
  float a = (h & 0xffffff) / 16777216.0f, b = (h >> 24 & 0xffffff) / 16777216.0f;
  return sqrtf(-2.0f * logf(a + 1e-7f)) * cosf(6.2831853f * b);
}
__global__ void fill(bf16* p, int64_t n, uint32_t seed) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) p[i] = __float2bfloat16(noise(i, seed));
}
__global__ void fill_floats(float* p, int64_t n, uint32_t seed, float scale, float offset) {
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += int64_t{gridDim.x} * blockDim.x) p[i] = offset + scale * noise(i, seed);
}
struct Args { int size, out, channels, stride, top; const bf16 *z1, *dy2, *z2; bf16* result; const float *taps, *affine, *factors; float* worst; double* sums; };
__device__ double phi(double y) { return 0.5 * erfc(-y * 0.70710678118654752); }
__device__ float h1(const Args& a, int64_t b, int y, int x, int e) {
  if (y < 0 || x < 0 || y >= a.size || x >= a.size) return 0;
  float v = a.affine[e] * __bfloat162float(a.z1[((b * a.size + y) * a.size + x) * a.channels + e]) + a.affine[a.channels + e];
  return v * 0.5f * erfcf(-v * 0.70710678f);
}
__device__ float dz2(const Args& a, int64_t b, int y, int x, int e) {
  if (y < 0 || x < 0 || y >= a.out || x >= a.out) return 0;
  int64_t i = ((b * a.out + y) * a.out + x) * a.channels + e;
  return a.factors[e] * __bfloat162float(a.dy2[i]) + a.factors[a.channels + e] * __bfloat162float(a.z2[i]) + a.factors[2 * a.channels + e];
}
__device__ void worst_of(float* worst, float error) { if (!(error < 1e30f)) error = 1e30f; atomicMax(reinterpret_cast<int*>(worst), __float_as_int(error)); }
// Images of the grid's y only.
__global__ void check_forward(Args a) {
  int e = blockIdx.x * 32 + threadIdx.x; int64_t b = blockIdx.y;
  double sum = 0, square = 0; float worst = 0;
  for (int p = threadIdx.y; p < a.out * a.out; p += blockDim.y) {
    int y = p / a.out, x = p % a.out; float s = 0;
    for (int i = 0; i < 3; ++i) for (int j = 0; j < 3; ++j)
      s += a.taps[(3 * i + j) * a.channels + e] * h1(a, b, y * a.stride + i - a.top, x * a.stride + j - a.top, e);
    float got = __bfloat162float(a.result[((b * a.out + y) * a.out + x) * a.channels + e]);
    worst = fmaxf(worst, fabsf(got - s) / fmaxf(1.0f, fabsf(s))); if (!(got == got)) worst = 1e30f;
    sum += got; square += double(got) * got;
  }
  worst_of(a.worst, worst); atomicAdd(a.sums + e, sum); atomicAdd(a.sums + a.channels + e, square);
}
__global__ void check_backward(Args a) {
  int e = blockIdx.x * 32 + threadIdx.x; int64_t b = blockIdx.y;
  double sums[11] = {}; float worst = 0;
  for (int p = threadIdx.y; p < a.size * a.size; p += blockDim.y) {
    int y = p / a.size, x = p % a.size; float s = 0;
    int64_t at = ((b * a.size + y) * a.size + x) * a.channels + e;
    float z = __bfloat162float(a.z1[at]), y1 = a.affine[e] * z + a.affine[a.channels + e];
    float h = y1 * float(phi(y1)), slope = float(phi(y1)) + y1 * 0.39894228f * expf(-0.5f * y1 * y1);
    for (int i = 0; i < 3; ++i) for (int j = 0; j < 3; ++j) {
      int oy = y + a.top - i, ox = x + a.top - j;
      if (oy % a.stride || ox % a.stride || oy < 0 || ox < 0) continue;
      float d = dz2(a, b, oy / a.stride, ox / a.stride, e);
      s += a.taps[(3 * i + j) * a.channels + e] * d; sums[3 * i + j] += double(d) * h;
    }
    s *= slope;
    float got = __bfloat162float(a.result[at]);
    worst = fmaxf(worst, fabsf(got - s) / fmaxf(1.0f, fabsf(s))); if (!(got == got)) worst = 1e30f;
    sums[9] += got; sums[10] += double(got) * z;
  }
  worst_of(a.worst, worst);
  for (int i = 0; i < 11; ++i) atomicAdd(a.sums + i * a.channels + e, sums[i]);
}

constexpr int64_t kPool = int64_t{700} << 20, kSmallPool = int64_t{360} << 20;  // bytes
struct Memory { bf16 *z1, *wide, *dy2, *z2; float *taps, *affine, *factors, *partials, *worst; double* sums; };



static void run_child(const Variant& v, int fd) {
  dup2(fd, 1);
  current = v.name;
  alarm(40);
  Memory m;
  CHECK(cudaMalloc(&m.z1, kPool)); CHECK(cudaMalloc(&m.wide, kPool)); CHECK(cudaMalloc(&m.dy2, kSmallPool)); CHECK(cudaMalloc(&m.z2, kSmallPool));
  CHECK(cudaMalloc(&m.taps, 9 * 4096 * 4)); CHECK(cudaMalloc(&m.affine, 2 * 4096 * 4)); CHECK(cudaMalloc(&m.factors, 3 * 4096 * 4));
  CHECK(cudaMalloc(&m.partials, int64_t{512} << 20)); CHECK(cudaMalloc(&m.worst, 4)); CHECK(cudaMalloc(&m.sums, 11 * 4096 * 8));
  fill<<<4096, 256>>>(m.z1, kPool / 2, 1); fill<<<4096, 256>>>(m.dy2, kSmallPool / 2, 2); fill<<<4096, 256>>>(m.z2, kSmallPool / 2, 3);
  cudaEvent_t begin, end; CHECK(cudaEventCreate(&begin)); CHECK(cudaEventCreate(&end));
  for (int n = 0; n < kCaseCount; ++n) {
    const Case& c = kCases[n];
    int top = c.stride == 1 ? 1 : 0;
    fill_floats<<<64, 256>>>(m.taps, 9 * c.channels, 4, 0.33f, 0);
    fill_floats<<<64, 256>>>(m.affine, c.channels, 5, 0.2f, 1.0f); fill_floats<<<64, 256>>>(m.affine + c.channels, c.channels, 6, 0.3f, 0.0f);
    fill_floats<<<64, 256>>>(m.factors, 3 * c.channels, 7, 0.5f, 0.1f);
    CHECK(cudaDeviceSynchronize());
    int64_t in = int64_t{kBatch} * c.size * c.size * c.channels, out = int64_t{kBatch} * c.out * c.out * c.channels;
    int copies = int(std::min<int64_t>(std::min(kPool / 2 / in, kSmallPool / 2 / out), 12));
    for (int pass = 0; pass < 2; ++pass) {
      if (pass == 0 && !v.forward) continue;
      if (pass == 1 && !v.backward) continue;
      if (c.stride != v.stride && v.stride) continue;
      int checked = 0;
      for (const Plan plan : pass == 0 ? v.forward_plans : v.backward_plans) {
        const bool checks = plan.columns != checked;
        checked = plan.columns;
        auto call = [&](int k) {
          if (pass == 0) return v.forward(c.size, c.out, c.channels, c.stride, top, kBatch, m.z1 + k * in, m.affine, m.taps, m.dy2 + k * out, m.partials, plan.blocks, plan.columns);
          return v.backward(c.size, c.out, c.channels, c.stride, top, kBatch, m.dy2 + k * out, m.z2 + k * out, m.factors, m.z1 + k * in, m.affine, m.taps, m.wide + k * in, m.partials, plan.blocks, plan.columns);
        };
        bf16* dy2 = m.dy2;
        if (pass == 0) m.dy2 = m.wide;  // z2 goes there
        CHECK(cudaMemset(m.worst, 0, 4)); CHECK(cudaMemset(m.sums, 0, 11 * 4096 * 8)); CHECK(cudaMemset(m.wide, 0xff, 2 * (pass ? in : out)));
        int64_t parts = call(0);
        if (parts < 0) CHECK(static_cast<cudaError_t>(-parts));
        CHECK(cudaDeviceSynchronize());
        float worst = 0; double sum_error = 0;
        if (checks) {
        Args a{c.size, c.out, c.channels, c.stride, top, m.z1, dy2, m.z2, m.wide, m.taps, m.affine, m.factors, m.worst, m.sums};
        dim3 block(32, 8), grid(c.channels / 32, kBatch);
        if (pass == 0) check_forward<<<grid, block>>>(a); else check_backward<<<grid, block>>>(a);
        CHECK(cudaDeviceSynchronize());
        CHECK(cudaMemcpy(&worst, m.worst, 4, cudaMemcpyDeviceToHost));
        int rows = pass == 0 ? 3 : 11;
        std::vector<float> partials(parts * rows * c.channels); std::vector<double> sums(11 * c.channels);
        CHECK(cudaMemcpy(partials.data(), m.partials, partials.size() * 4, cudaMemcpyDeviceToHost));
        CHECK(cudaMemcpy(sums.data(), m.sums, sums.size() * 8, cudaMemcpyDeviceToHost));
        for (int e = 0; e < c.channels; ++e) {
          if (pass == 0) {
            double count = 0, total = 0, squares = 0;
            for (int64_t p = 0; p < parts; ++p) { const float* r = &partials[p * 3 * c.channels]; count += r[e]; total += double(r[e]) * r[c.channels + e]; }
            double mean = total / count;
            for (int64_t p = 0; p < parts; ++p) { const float* r = &partials[p * 3 * c.channels]; double d = r[c.channels + e] - mean; squares += r[2 * c.channels + e] + r[e] * d * d; }
            double n_ = double(kBatch) * c.out * c.out, want = sums[e] / n_, want2 = sums[c.channels + e] - n_ * want * want;
            double error = std::max(std::fabs(mean - want), std::fabs(squares - want2) / want2);
            if (count != n_ || !(error < 1e30)) error = 1e30;
            sum_error = std::max(sum_error, error);
          } else {
            for (int i = 0; i < 11; ++i) {
              double got = 0; for (int64_t p = 0; p < parts; ++p) got += partials[(p * 11 + i) * c.channels + e];
              double error = std::fabs(got - sums[i * c.channels + e]) / std::sqrt(double(kBatch) * c.size * c.size);
              if (!(error < 1e30)) error = 1e30;
              sum_error = std::max(sum_error, error);
            }
          }
        }
        }
        std::vector<float> times;
        for (int group = 0; group < 5; ++group) {
          int launches = std::max(2, std::min(copies, 6));
          CHECK(cudaEventRecord(begin));
          for (int k = 0; k < launches; ++k) call((group * launches + k) % copies);
          CHECK(cudaEventRecord(end)); CHECK(cudaEventSynchronize(end));
          float ms; CHECK(cudaEventElapsedTime(&ms, begin, end)); times.push_back(ms * 1000 / launches);
        }
        std::sort(times.begin(), times.end());
        CHECK(cudaGetLastError());
        printf("%s %d %d %d %d %.2f %.2e %.2e\n", v.name, pass, plan.columns, plan.blocks, n, times[2], worst, sum_error);
        fflush(stdout);
        m.dy2 = dy2;
      }
    }
  }
  printf("#done %s\n", v.name); fflush(stdout);
  _exit(0);
}

struct Row { std::string key; double us[kCaseCount]; double worst = 0, sums = 0; };

int main() {
  auto start = std::chrono::steady_clock::now();
  std::map<std::string, Row> tables[2];
  for (const Variant& v : variants()) {
    int fds[2]; if (pipe(fds)) return 1;
    fflush(stdout);
    pid_t child = fork();
    if (child == 0) { close(fds[0]); run_child(v, fds[1]); }
    close(fds[1]);
    FILE* file = fdopen(fds[0], "r"); char line[512]; bool done = false;
    while (fgets(line, sizeof line, file)) {
      if (!strncmp(line, "#done", 5)) { done = true; continue; }
      if (line[0] == '#') { printf("%s", line); continue; }
      char name[128]; int pass, columns, blocks, n; double us, worst, sums;
      if (sscanf(line, "%127s %d %d %d %d %lf %lf %lf", name, &pass, &columns, &blocks, &n, &us, &worst, &sums) != 8) { printf("? %s", line); continue; }
      char key[200]; snprintf(key, sizeof key, "%-22s c%-2d b%-5d", name, columns, blocks);
      auto [it, fresh] = tables[pass].try_emplace(key); Row& row = it->second;
      if (fresh) { row.key = key; for (double& u : row.us) u = NAN; }
      row.us[n] = us; row.worst = std::max(row.worst, worst); row.sums = std::max(row.sums, sums);
    }
    fclose(file); int status; waitpid(child, &status, 0);
    printf("# %-22s %s (%.0f s)\n", v.name, done ? "ran" : "FAILED", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    fflush(stdout);
  }
  for (int pass = 0; pass < 2; ++pass) {
    printf("\n%s, us a launch; cases HxWxE/stride(launches). Total of a step in us, s2 and s1 parts.\n%-38s %7s %7s %7s", pass ? "BACKWARD" : "FORWARD", "variant, columns, target blocks", "total", "s2", "s1");
    for (const Case& c : kCases) printf(" %4dx%d/%d(%d)", c.size, c.channels, c.stride, c.count);
    printf("   error    sums\n");
    std::vector<Row> rows; for (auto& [key, row] : tables[pass]) rows.push_back(row);
    auto part = [](const Row& r, int stride) { double t = 0; for (int n = 0; n < kCaseCount; ++n) if (kCases[n].stride == stride) t += r.us[n] * kCases[n].count; return t; };
    auto total = [&](const Row& r) { return part(r, 1) + part(r, 2); };
    auto order = [](double x) { return std::isnan(x) ? 1e30 : x; };
    auto print = [&](const Row& r) {
      printf("%-38s %7.0f %7.0f %7.0f", r.key.c_str(), total(r), part(r, 2), part(r, 1));
      for (int n = 0; n < kCaseCount; ++n) printf(" %*.1f", kCases[n].channels > 999 ? 12 : 11, r.us[n]);
      printf("  %.1e %.1e\n", r.worst, r.sums);
    };
    std::sort(rows.begin(), rows.end(), [&](const Row& a, const Row& b) { return order(total(a)) < order(total(b)); });
    for (const Row& r : rows) print(r);
    for (int stride = 2; stride >= 1; --stride) {
      std::sort(rows.begin(), rows.end(), [&](const Row& a, const Row& b) { return order(part(a, stride)) < order(part(b, stride)); });
      printf("best at stride %d:\n", stride);
      for (size_t i = 0; i < rows.size() && i < 4; ++i) printf("  %s %.0f\n", rows[i].key.c_str(), part(rows[i], stride));
    }
    printf("best of each case:");
    double sum = 0;
    for (int n = 0; n < kCaseCount; ++n) {
      const Row* best = nullptr;
      for (const Row& r : rows) if (!std::isnan(r.us[n]) && (!best || r.us[n] < best->us[n])) best = &r;
      if (!best) continue;
      sum += best->us[n] * kCases[n].count;
      printf("\n  %dx%d/%d: %.1f %s", kCases[n].size, kCases[n].channels, kCases[n].stride, best->us[n], best->key.c_str());
    }
    printf("\n  sum of a step %.0f us\n", sum);
  }
  printf("total %.0f s\n", std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
}
