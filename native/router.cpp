// From router logits to experts and weights: every published rule that is one token's alone. Plain definition:
// fewfire.model.router.route.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "dispatch.hpp"
#include "step.hpp"

namespace fewfire {
namespace {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

std::int64_t padded(std::int64_t count) { return (count + 15) / 16 * 16; }

// Numbers of one token while it is routed; one a worker, so that routing allocates nothing a token.
struct Choice {
    std::vector<float> scores, choice, values;
    std::vector<std::int64_t> ids;

    explicit Choice(const RouterSpec& spec)
        : scores(static_cast<std::size_t>(padded(spec.num_experts))),
          choice(static_cast<std::size_t>(padded(std::max(spec.num_experts, spec.num_groups)))),
          values(static_cast<std::size_t>(padded(std::max(spec.top_k, spec.num_groups)))),
          ids(static_cast<std::size_t>(std::max(spec.top_k, spec.num_groups))) {}
};

// Experts outside the best groups can no longer be chosen: 0 where groups score by their best, else -inf.
void keep_best_groups(const RouterSpec& spec, Choice& room) {
    const std::int64_t each = spec.num_experts / spec.num_groups;
    std::vector<float> scores(static_cast<std::size_t>(spec.num_groups));
    for (std::int64_t g = 0; g < spec.num_groups; ++g) {
        const float* members = room.choice.data() + g * each;
        float best = kMinusInfinity, second = kMinusInfinity;
        for (std::int64_t i = 0; i < each; ++i) {
            if (members[i] > best) {
                second = best;
                best = members[i];
            } else {
                second = std::max(second, members[i]);
            }
        }
        scores[static_cast<std::size_t>(g)] = spec.groups_by_max || each == 1 ? best : best + second;
    }
    table().top_k_rows(scores.data(), 1, spec.num_groups, spec.top_groups, room.ids.data(), room.values.data());
    std::vector<bool> keep(static_cast<std::size_t>(spec.num_groups), false);
    for (std::int64_t i = 0; i < spec.top_groups; ++i) keep[static_cast<std::size_t>(room.ids[static_cast<std::size_t>(i)])] = true;
    for (std::int64_t e = 0; e < spec.num_experts; ++e) {
        if (!keep[static_cast<std::size_t>(e / each)]) room.choice[static_cast<std::size_t>(e)] = spec.groups_by_max ? 0.0f : kMinusInfinity;
    }
}

// Phi-3.5: rounds of the best of what is left, each weighted by a softmax over what is nearly as good.
void sparsemixer(const RouterSpec& spec, const float* logits, Choice& room, std::int32_t* chosen, float* weights) {
    std::vector<float> left(logits, logits + spec.num_experts), near(static_cast<std::size_t>(padded(spec.num_experts)));
    for (std::int64_t k = 0; k < spec.top_k; ++k) {
        const auto best = std::max_element(left.begin(), left.end());
        const auto id = static_cast<std::size_t>(best - left.begin());
        for (std::size_t e = 0; e < left.size(); ++e) {
            const float scale = std::max(std::fabs(logits[e]), *best);
            const bool far = (*best - logits[e]) / scale > 2 * spec.jitter;
            near[e] = far ? kMinusInfinity : left[e];
        }
        table().quantized.softmax(near.data(), spec.num_experts);
        chosen[k] = static_cast<std::int32_t>(id);
        weights[k] = near[id] * spec.scale;
        left[id] = kMinusInfinity;
    }
    (void)room;
}

void route_token(const RouterSpec& spec, const float* logits, Choice& room, std::int32_t* chosen, float* weights) {
    if (spec.score == RouterScore::kSparsemixer) return sparsemixer(spec, logits, room, chosen, weights);
    const auto experts = static_cast<std::size_t>(spec.num_experts);
    const bool selected = spec.score == RouterScore::kSoftmaxSelected || spec.score == RouterScore::kSigmoidSelected;
    const bool sigmoid = spec.score == RouterScore::kSigmoid || spec.score == RouterScore::kSigmoidSelected;
    const auto score = sigmoid ? table().quantized.sigmoids : table().quantized.softmax;
    std::copy(logits, logits + experts, room.scores.begin());
    if (!selected) score(room.scores.data(), spec.num_experts);
    std::copy(room.scores.begin(), room.scores.begin() + static_cast<std::ptrdiff_t>(experts), room.choice.begin());
    for (std::size_t e = 0; spec.select_bias != nullptr && e < experts; ++e) room.choice[e] += spec.select_bias[e];
    if (spec.num_groups > 0) keep_best_groups(spec, room);
    table().top_k_rows(room.choice.data(), 1, spec.num_experts, spec.top_k, room.ids.data(), room.values.data());
    const auto top_k = static_cast<std::size_t>(spec.top_k);
    for (std::size_t k = 0; k < top_k; ++k) room.values[k] = room.scores[static_cast<std::size_t>(room.ids[k])];
    if (selected) score(room.values.data(), spec.top_k);
    float total = spec.renormalize_eps;
    for (std::size_t k = 0; k < top_k; ++k) total += room.values[k];
    for (std::size_t k = 0; k < top_k; ++k) {
        chosen[k] = static_cast<std::int32_t>(room.ids[k]);
        weights[k] = (spec.renormalize ? room.values[k] / total : room.values[k]) * spec.scale;
    }
}

template <class Element>
void record(Element*& to, const Element* from, std::int64_t count) {
    if (to == nullptr) return;
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(Element));
    to += count;
}

template <class Element>
void replay(const Element*& from, Element* to, std::int64_t count) {
    if (from == nullptr) return;
    std::memcpy(to, from, static_cast<std::size_t>(count) * sizeof(Element));
    from += count;
}

}  // namespace

void choose(const RouterSpec& spec, const Rows& rows, float* logits, std::int32_t* chosen, float* weights, Step& step) {
    const std::int64_t count = step.count(), k = spec.top_k, experts = spec.num_experts;
    const auto route_tokens = [&](std::int64_t begin, std::int64_t end) {
        Choice room(spec);
        for (std::int64_t t = begin; t < end; ++t) {
            float* row = logits + t * experts;
            for (std::int64_t e = 0; spec.bias != nullptr && e < experts; ++e) row[e] += spec.bias[e];
            route_token(spec, row, room, chosen + t * k, weights + t * k);
        }
    };
    if (!spec.weight.is_plain() || count == 1) {
        step.linear(spec.weight, rows, logits, experts);
        step.parallel(count, row_grain(count), [&](std::int64_t begin, std::int64_t end, int) { route_tokens(begin, end); });
        return;
    }
    step.parallel(count, row_grain(count), [&](std::int64_t begin, std::int64_t end, int worker) {
        Activations some = rows;
        some.values += begin * some.stride;
        some.tiles.count = end - begin;
        multiply(spec.weight, 0, spec.weight.blocks(), some, logits + begin * experts, experts, worker);
        route_tokens(begin, end);
    });
}

void route(const RouterSpec& spec, Step& step) {
    const std::int64_t count = step.count(), k = spec.top_k, experts = spec.num_experts;
    float* logits = step.room.logits.reserve(count * experts);
    std::int32_t* chosen = step.room.chosen.reserve(count * k);
    float* weights = step.room.weights.reserve(count * k);
    choose(spec, step.normed, logits, chosen, weights, step);
    replay(step.routes.replay_ids, chosen, count * k);
    replay(step.routes.replay_weights, weights, count * k);
    record(step.routes.ids, chosen, count * k);
    record(step.routes.weights, weights, count * k);
    record(step.routes.logits, logits, count * experts);
}

}  // namespace fewfire
