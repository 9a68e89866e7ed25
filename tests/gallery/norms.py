"""Replacements of softmax, transforms of the output and of the logsumexp."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from norm_cases import MergedSigmoid, MergedSoftmax, MergedStickBreaking, Power, StickBreaking

import jitgen
from gallery.case import Sizes, case
from gallery.masks import causal_mask


class Weight(jitgen.OnlineNorm):
    """Weights that are a function of the logit alone: no denominator and no logsumexp."""

    def weight(self, s):
        raise NotImplementedError

    def update(self, s, st):
        return self.weight(s), 1.0, st


class Sigmoid(Weight):
    def __init__(self, bias: float = 0.0) -> None:
        self.bias = bias

    def weight(self, s):
        return torch.sigmoid(s + self.bias)


class SquaredRelu(Weight):
    def weight(self, s):
        return F.relu(s) ** 2


class Gelu(Weight):
    def weight(self, s):
        return F.gelu(s)


class Quadratic(Weight):
    def weight(self, s):
        return (s + 1) * (s + 1) * 0.5


class NormalisedRelu(jitgen.OnlineNorm):
    """relu(s), divided by the sum of the weights of the row."""

    state = {"total": 1e-3}  # noqa: RUF012

    def update(self, s, st):
        weight = F.relu(s)
        return weight, 1.0, {"total": st["total"] + jitgen.row_sum(weight)}

    def finalize(self, o, st):
        return o / st["total"]


@case("sigmoid attention")
def sigmoid(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(softmax=Sigmoid(-2.0))


@case("squared ReLU attention")
def squared_relu(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal_mask, softmax=SquaredRelu)


@case("GELU attention")
def gelu(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(softmax=Gelu)


@case("quadratic attention")
def quadratic_weights(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal_mask, softmax=Quadratic)


@case("activation attention with a denominator")
def normalised_relu(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(softmax=NormalisedRelu)


@case("stick-breaking attention")
def stick_breaking(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal_mask, softmax=StickBreaking)


@case("softmax as a replacement")
def written_softmax(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal_mask, softmax=MergedSoftmax)


@case("sigmoid attention whose parts are joined")
def joined_sigmoid(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal_mask, softmax=MergedSigmoid)


@case("stick-breaking attention whose parts are joined")
def joined_stick_breaking(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(mask_mod=causal_mask, softmax=MergedStickBreaking)


@case("power attention whose parts are joined")
def joined_power(z: Sizes) -> jitgen.Variant:
    return jitgen.Variant(softmax=Power(1.5))


@case("output gate of native sparse attention")
def gated_output(z: Sizes) -> jitgen.Variant:
    gate = z.floats(z.batch, z.num_q_heads, z.num_positions)

    def output(o, lse, b, h, q_idx):
        return o * torch.sigmoid(gate[b, h, q_idx])

    return jitgen.Variant(mask_mod=causal_mask, output_transform=output)


@case("output gate per channel (gated attention of Qwen3-Next)")
def gated_channels(z: Sizes) -> jitgen.Variant:
    gate = z.floats(z.batch, z.num_q_heads, z.num_positions, z.head_dim)

    def output(o, lse, b, h, q_idx):
        return o * torch.sigmoid(gate[b, h, q_idx])

    return jitgen.Variant(mask_mod=causal_mask, output_transform=output)


@case("differential transformer: normalisation of the output")
def normalised_output(z: Sizes) -> jitgen.Variant:
    kept = 0.8

    def output(o, lse, b, h, q_idx):
        return o / o.rms(1e-5) * (1 - kept)

    return jitgen.Variant(mask_mod=causal_mask, output_transform=output)


@case("scale per channel of the output")
def channel_scale(z: Sizes) -> jitgen.Variant:
    channels = z.floats(z.num_q_heads, z.head_dim)

    def output(o, lse, b, h, q_idx):
        return (o * channels[h]).clamp(-0.5, 0.5)

    return jitgen.Variant(output_transform=output)


@case("output weighted by its logsumexp")
def lse_weighted(z: Sizes) -> jitgen.Variant:
    def output(o, lse, b, h, q_idx):
        return o * torch.sigmoid(lse)

    return jitgen.Variant(output_transform=output)


@case("logsumexp to base 2")
def base_two(z: Sizes) -> jitgen.Variant:
    log2_e = 1.4426950408889634

    def lse_base_two(lse, b, h, q_idx):
        return lse * log2_e

    return jitgen.Variant(mask_mod=causal_mask, lse_transform=lse_base_two)
