// Speculative verification, the walk along the accepted draft tokens, on CPU and GPU (Leviathan et al. 2023, Miao et al. 2023).
//
// At a node of the draft (-1: the context) the children are tried in their order. A child drawn from q is accepted with
// probability min(1, r / q), r being the residual distribution: the target's at first; after a rejection the positive part of
// r - q, normalised. The last token is drawn from the residual of the node where no child passed. The tokens are then
// distributed as if drawn from the target, one after the other.
#pragma once

#include "jitgen/sampling_filter.h"

namespace jg {

constexpr int kMaxDraft = 62;         // the last draw of a call is for the last token
constexpr unsigned kLastDraw = 63;

// Walk: parent(i), draft_id(i), draft_prob(i) of draft token i; uniform(draw); start(node); residual(id) of a token;
// reject(i), then scale(factor) of what the rejection left; mass() of the residual; emit(position, i).
// Returns the number of accepted tokens; the walk is left at the last of them, with its residual, perhaps not normalised.
template <class Walk> JITGEN_METHOD int walk_draft(Walk& walk, int num_draft) {
  int node = -1, emitted = 0;
  for (bool moved = true; moved;) {
    moved = false;
    walk.start(node);
    bool unscaled = false;   // the residual after the last rejection is not normalised yet
    for (int i = node + 1; i < num_draft; ++i) {
      if (walk.parent(i) != node) continue;
      if (unscaled) {
        const float mass = walk.mass();
        if (!(mass > 0.0f)) break;   // rounding: nothing is left, so the caller takes the residual before
        walk.scale(1.0f / mass);
        unscaled = false;
      }
      if (walk.uniform(i) * walk.draft_prob(i) < walk.residual(walk.draft_id(i))) {
        walk.emit(emitted++, i);
        node = i;
        moved = true;
        break;
      }
      walk.reject(i);
      unscaled = true;
    }
  }
  return emitted;
}

// Draft tokens that would pass by themselves; one whose parent is not an earlier token cannot.
template <class Walk> JITGEN_METHOD int count_passing(Walk& walk, int num_draft) {
  int passing = 0;
  for (int i = 0; i < num_draft; ++i) {
    const int node = walk.parent(i);
    if (node < -1 || node >= i) continue;
    walk.start(node);
    passing += walk.uniform(i) * walk.draft_prob(i) < walk.residual(walk.draft_id(i));
  }
  return passing;
}

}  // namespace jg
