"""Every operation of the language: what PyTorch computes, what the oracle computes, what a compiled kernel computes."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from gallery.matrix import computed_scores, evaluated_scores, matrix_inputs

import jitgen
from jitgen import ops_torch, symbols
from jitgen.ir_ops import OPS, ROW_OPS

BATCH, Q_LEN, KV_LEN = 1, 37, 48
THREE, MINUS_FOUR, BIG = 3, -4, 2**33 + 5
BYTES = torch.arange(64, dtype=torch.uint8) % 21  # torch's own sums of bytes wrap at 256; see the test of that
LONGS = (torch.arange(64, dtype=torch.int64) - 20) * 3_000_000_019
FLAGS = torch.arange(64) % 3 == 0
PAIRS = torch.stack([torch.arange(64) * 3 % 11, torch.arange(64) - 9], dim=1)
HALVES = ((torch.arange(64) - 31) / 16).to(torch.float16)

# name -> function(s, q, k); integers differ in sign, floats lie between -8 and 8. Called as they stand, and traced.
FLOATS: dict[str, Callable] = {
    "exp": lambda s, q, k: torch.exp(s),
    "exp2": lambda s, q, k: torch.exp2(s - 1),
    "log": lambda s, q, k: torch.log(s.abs() + 0.01),
    "log2": lambda s, q, k: torch.log2(s * s + 1),
    "log1p": lambda s, q, k: torch.log1p(s.abs() * 1e-3),
    "tanh": lambda s, q, k: torch.tanh(s),
    "sigmoid": lambda s, q, k: torch.sigmoid(s),
    "softplus": lambda s, q, k: F.softplus(s),
    "softplus_beta": lambda s, q, k: F.softplus(s, beta=2.0),
    "logsigmoid": lambda s, q, k: F.logsigmoid(s),
    "silu": lambda s, q, k: F.silu(s),
    "gelu": lambda s, q, k: F.gelu(s),
    "gelu_tanh": lambda s, q, k: F.gelu(s, approximate="tanh"),
    "relu": lambda s, q, k: F.relu(s),
    "relu6": lambda s, q, k: F.relu6(s),
    "leaky_relu": lambda s, q, k: F.leaky_relu(s, 0.1),
    "hardtanh": lambda s, q, k: F.hardtanh(s, -2.0, 3.0),
    "erf": lambda s, q, k: torch.erf(s),
    "special": lambda s, q, k: torch.special.erf(s) + torch.special.log1p(torch.special.exp2(s)) + torch.special.expit(s),
    "sqrt": lambda s, q, k: torch.sqrt(s.abs()),
    "rsqrt": lambda s, q, k: torch.rsqrt(s * s + 0.5),
    "sin": lambda s, q, k: torch.sin(s * 3),
    "cos": lambda s, q, k: torch.cos(q - k),
    "floor": lambda s, q, k: torch.floor(s) + torch.ceil(s * 3),
    "round_half_even": lambda s, q, k: torch.round(s * 4),
    "trunc": lambda s, q, k: torch.trunc(s),
    "sign": lambda s, q, k: torch.sign(s) + torch.sign(q - k),
    "abs": lambda s, q, k: abs(s) + (q - k).abs(),
    "square": lambda s, q, k: s**2 + torch.square(s),
    "power": lambda s, q, k: s**3 - (s + 9) ** -1,
    "power_five": lambda s, q, k: (s / 4) ** 5,
    "power_root": lambda s, q, k: (s + 9) ** 0.5 + (s + 9) ** -0.5,
    "power_of_two": lambda s, q, k: 2**s + 2.0 ** (k * 0.1),
    "power_of_positive": lambda s, q, k: (s.abs() + 1) ** (k * 0.01),
    "reciprocal": lambda s, q, k: torch.reciprocal(s + 9),
    "float_mod": lambda s, q, k: s % 1.5,
    "float_mod_negative": lambda s, q, k: torch.remainder(s, -0.75),
    "float_fmod": lambda s, q, k: torch.fmod(s, 1.25),
    "float_floordiv": lambda s, q, k: s // 0.5,
    "where": lambda s, q, k: torch.where(s > 0, s * 2, torch.where(q > k, -1.0, 0.5)),
    "masked_fill": lambda s, q, k: s.masked_fill(q == k, 7.0),
    "clamp": lambda s, q, k: s.clamp(-1, 2) + torch.clamp(q, min=3, max=9) + k.clamp_max(5) + k.clamp_min(20),
    "minimum": lambda s, q, k: torch.minimum(s, -s) + torch.max(q, k) + torch.min(q, k),
    "add_alpha": lambda s, q, k: torch.add(s, q, alpha=2) + torch.sub(s, k, alpha=0.5),
    "lerp": lambda s, q, k: torch.lerp(s, s * 2, 0.25),
    "addcmul": lambda s, q, k: torch.addcmul(s, HALVES[k].float(), s, value=0.5),
    "casts": lambda s, q, k: s.int() + (s * 2).to(torch.int64) + q.float() / 3 + s.bool().float() + s.long().half(),
    "int_division_is_float": lambda s, q, k: q / (k + 1) + s,
    "bool_arithmetic": lambda s, q, k: (q > k) + 2 * (q == k) + s * (k % 2 == 0),
    "half_capture": lambda s, q, k: s * HALVES[k] + HALVES[q],
    "named_constants": lambda s, q, k: s * math.pi + math.sqrt(2) + math.floor(2.5),
    "full_like": lambda s, q, k: s + torch.full_like(s, 2) + torch.ones_like(s) + torch.zeros_like(q),
    "isfinite": lambda s, q, k: torch.where(torch.isfinite(1 / s) & ~torch.isnan(s) & ~torch.isinf(s), s, 99.0),
    "captured_scalars": lambda s, q, k: s * THREE + MINUS_FOUR,
    "stack": lambda s, q, k: torch.stack([s, s * 0.5, q * 0.1]).amax(0) + torch.stack([s, k + 0.5]).sum(),
    "tensor_on_the_left": lambda s, q, k: torch.tensor(2.5) * s + torch.tensor(3) - torch.tensor(1.5) / (s + 20),
}
INTS: dict[str, Callable] = {
    "floordiv": lambda s, q, k: (q - k) // 7 + (q - 20) // THREE,
    "floordiv_negative": lambda s, q, k: (q - k) // -5 + (k - 3) // MINUS_FOUR,
    "floordiv_traced": lambda s, q, k: (q - 2 * k) // (k + 1),
    "floor_divide": lambda s, q, k: torch.floor_divide(q - k, 3) + torch.div(q - k, 4, rounding_mode="floor"),
    "mod": lambda s, q, k: (q - k) % 7 + (q - 20) % THREE + (q - k) % 8,
    "mod_negative": lambda s, q, k: (q - k) % -5 + (k - 3) % MINUS_FOUR,
    "mod_traced": lambda s, q, k: (q - 30) % (k + 1),
    "shifts": lambda s, q, k: ((q - k) >> 2) + (q << 3) + (1 << (k % 5)) + ((q - 40) >> (k % 4)),
    "bits": lambda s, q, k: (q & 12) + (k | 3) + (q ^ k) + ~q,
    "bits_negative": lambda s, q, k: ((q - k) & 7) + ((q - k) | 4) + ((q - k) ^ 5),
    "comparisons": lambda s, q, k: (q < k) + 2 * (q <= k) + 4 * (q > k) + 8 * (q >= k) + 16 * (q == k) + 32 * (q != k),
    "logic": lambda s, q, k: ((q > 3) & (k < 9)) + 2 * ((q > 3) | (k < 9)) + 4 * ((q > 3) ^ (k < 9)) + 8 * ~(q > k),
    "logical": lambda s, q, k: torch.logical_and(q, k) + 2 * torch.logical_or(q, k) + 4 * torch.logical_xor(q, k)
    + 8 * torch.logical_not(q),
    "product": lambda s, q, k: q * k - 3 * q * 2 + (q - 1) * (k - 1),
    "square": lambda s, q, k: (q - k) ** 2 + q**3,
    "big_numbers": lambda s, q, k: (q * BIG + k) % 1000 + (k * BIG) // 2**33,
    "big_products": lambda s, q, k: ((q.long() + 70000) * (k.long() + 80000)) % 97,
    "big_shifts": lambda s, q, k: ((q + BIG) << 4) % 101 + ((k + BIG) >> 33) + ((k + BIG) >> THREE) % 7,
    "minimum": lambda s, q, k: torch.minimum(q, k - 3) + torch.maximum(q, k) * 100,
    "byte_gather": lambda s, q, k: BYTES[k] * 2 + BYTES[q],
    "long_gather": lambda s, q, k: LONGS[k] % 1009 + LONGS[q] // 3_000_000_019,
    "bool_gather": lambda s, q, k: FLAGS[k] + 2 * (FLAGS[k] & FLAGS[q]) + 4 * (~FLAGS[k]),
    "negative_index": lambda s, q, k: BYTES[-1] + BYTES[-k - 1] + BYTES[k - 20],
    "gather_of_gather": lambda s, q, k: BYTES[(BYTES[k] + q) % 64],
    "unbind": lambda s, q, k: sum(column[k] * (i + 1) for i, column in enumerate(PAIRS.unbind(-1))) + PAIRS[q].unbind()[1],
    "any_of_row": lambda s, q, k: (BYTES[:9] == k).any() + 2 * (BYTES[2:20:3] >= q).all() + (BYTES[:5] * k).sum(),
    "tensor_on_the_left": lambda s, q, k: torch.tensor(40) // (k + 1)
    + torch.tensor(50) % (k + 1)
    + (torch.tensor(3) & q)
    + (torch.tensor(True) | (q > k))
    + (torch.tensor(5) ^ k)
    + (torch.tensor(2) << (q % 3))
    + (torch.tensor(900) >> (q % 3))
    + (torch.tensor(7) > q)
    + torch.tensor(2) ** (q % 3),
    "neg": lambda s, q, k: -q + (-k) * 2 - -(q - k),
    "relu": lambda s, q, k: F.relu(q - k),
}  # fmt: skip


def batches(table, size=14):
    """The table in groups that one kernel computes, a head for each."""
    rows = list(table.items())
    return [pytest.param(dict(rows[i : i + size]), id=f"{rows[i][0]}…") for i in range(0, len(rows), size)]


def chosen_by_head(functions):
    """One score hook whose head i computes functions[i]."""
    table = list(functions)

    def score(s, b, h, q_idx, kv_idx):
        value = table[0](s, q_idx, kv_idx).float()
        for i in range(1, len(table)):
            value = torch.where(h == i, table[i](s, q_idx, kv_idx).float(), value)
        return value

    return score


def computed_by_torch(function, q_offset):
    q, k, _ = matrix_inputs(BATCH, 1, Q_LEN, KV_LEN)
    score = (q @ k.mT)[0, 0].flatten()
    rows, columns = torch.meshgrid(torch.arange(Q_LEN) + q_offset, torch.arange(KV_LEN), indexing="ij")
    out = torch.vmap(lambda *args: torch.as_tensor(function(*args)))(score.double(), rows.flatten(), columns.flatten())
    return out.double().view(Q_LEN, KV_LEN)


@pytest.mark.parametrize("q_offset", [0, KV_LEN - Q_LEN], ids=["local", "absolute"])
@pytest.mark.parametrize("functions", [*batches(FLOATS), *batches(INTS)])
def test_operation_means_in_a_kernel_what_it_means_in_torch(functions, q_offset):
    variant = jitgen.Variant(score_mod=chosen_by_head(functions.values()))
    sizes = {"batch": BATCH, "num_heads": len(functions), "q_len": Q_LEN, "kv_len": KV_LEN, "q_offset": q_offset}
    oracle, kernel = evaluated_scores(variant, **sizes)[0], computed_scores(variant, **sizes)[0].double()
    wrong = []
    for i, (name, function) in enumerate(functions.items()):
        want = computed_by_torch(function, q_offset)
        for who, got, rtol in (("oracle", oracle[i], 1e-6), ("kernel", kernel[i], 3e-6)):
            if not torch.allclose(got, want, rtol=rtol, atol=rtol):
                at = (got - want).abs().nan_to_num(torch.inf).argmax()
                row, column = divmod(int(at), KV_LEN)
                wrong.append(f"{name}: {who} {got[row, column]}, torch {want[row, column]} at q {row + q_offset} k {column}")
    assert not wrong, "\n" + "\n".join(wrong)


def test_bytes_are_widened_before_arithmetic():
    """Unlike in torch, where a sum of bytes is a byte."""
    full = torch.full((64,), 200, dtype=torch.uint8)
    variant = jitgen.Variant(score_mod=lambda s, b, h, q, k: (full[k] + full[q]).float())
    sizes = {"batch": 1, "num_heads": 1, "q_len": 3, "kv_len": 8, "q_offset": 0}
    assert (evaluated_scores(variant, **sizes) == 400).all() and (computed_scores(variant, **sizes) == 400).all()


NOT_PART = {"popcount", "kv_slot", "page"}  # of the IR, and of no torch function


def test_every_ir_operation_is_covered():
    used = set()
    for function in (*FLOATS.values(), *INTS.values()):
        program = jitgen.Variant(score_mod=lambda s, b, h, q, k, f=function: f(s, q, k)).trace().program
        used |= {n.op for n in ops_torch.ir.walk(program.score, program.mask)}
    elementwise = set(OPS) - ROW_OPS - {"sub", "tanh_approx"} - NOT_PART
    assert elementwise <= used, elementwise - used


def test_every_torch_name_in_the_table_exists_in_torch():
    own = {"rms", "row_max", "row_sum", "row_cumsum", "tanh_approx", "log_sigmoid", "fabs"}
    own |= {"linalg_norm", "linalg_vector_norm"}  # as functions of torch.linalg call themselves, and those of torch.special
    own |= {"special_expit", "special_erf", "special_exp2", "special_log1p"}
    homes = (torch, F, torch.special, torch.Tensor)
    missing = {n for n in (*symbols.FUNCTIONS, *symbols.METHODS) if not any(hasattr(home, n) for home in homes)}
    assert missing <= own
