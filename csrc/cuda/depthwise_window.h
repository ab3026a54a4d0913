// How the taps of a depthwise window move, and how a block divides its cells among warps, for depthwise_swish.cu.
#pragma once

namespace vf::depthwise {

enum class Form { plain, upsample, plain_backward, upsample_backward };

constexpr int kWarps = 4;  // of a block

struct Range {
  int begin, end;
};

// Phase p of cell a reads the source rows stride a - origin + p shift + e for e = 0 .. taps-1; tap e is the sum of the
// weight's rows entries(p, e). Columns likewise. csrc/cpu/depthwise_swish.h derives the four forms.
template <int K, Form kForm>
struct Window {
  static constexpr int kK = K;
  static constexpr bool kForward = kForm == Form::plain || kForm == Form::upsample;
  static constexpr bool kUpsample = kForm == Form::upsample, kGather = kForm == Form::upsample_backward;
  static constexpr int kPhases = kUpsample ? 2 : 1, kStride = kGather ? 2 : 1;
  static constexpr int kTaps = kUpsample ? K / 2 + 1 : kGather ? K + 1 : K;
  static constexpr int kOrigin = kUpsample ? (K / 2 + 1) / 2 : K / 2;
  static constexpr int kShift = kUpsample ? K / 2 % 2 : 0;
  static constexpr int kHeight = kTaps + kShift;     // source rows that the phases of a cell read
  static constexpr int kInFlight = kTaps / kStride;  // output rows that a source row reaches

  __device__ static Range entries(int phase, int e) {
    if (kUpsample) {
      const int k = 2 * (e + phase * kShift - kOrigin) + K / 2 - phase;
      return {k < 0 ? 0 : k, k + 2 > K ? K : k + 2};
    }
    if (kGather) return {e == K ? 0 : K - 1 - e, e == 0 ? K : K - e + 1};
    return kForward ? Range{e, e + 1} : Range{K - 1 - e, K - e};
  }
};

// How the four warps of a block share a strip.
template <class Win>
struct Strip {
  static constexpr int kCells = Win::kGather ? 2 : 4;    // per thread; 2 when gathering, where taps fill the registers
  static constexpr int kGroups = kWarps / Win::kPhases;  // of adjacent cells; each phase has its own warps
  static constexpr int kWidth = kGroups * kCells;
  static constexpr int kInputs = Win::kStride * (kCells - 1) + Win::kHeight;  // source columns that a thread reads
  static constexpr int kColumns = Win::kStride * (kWidth - 1) + Win::kHeight;
  static constexpr int kFetches = (kColumns + kWarps - 1) / kWarps;  // per warp and row
};

}  // namespace vf::depthwise
