// The speed of a rotation, as launch arguments carry it. The same on CPU and CUDA.
#pragma once

namespace jg {

// Angular speed of a pair, in turns for each position, as a sum of two floats: with one, the angle at position 100,000 would
// be off by a hundredth.
struct Turns { float high, low; };

}  // namespace jg
