"""Random integer expressions: plain Python, the oracle, a compiled kernel and its tile classes must agree."""

from __future__ import annotations

import random

import pytest
import torch
from gallery.matrix import computed_scores, evaluated_scores

import jitgen
from jitgen.mask_tiles import TILE_FULL, TILE_NONE, classify

Q_LEN, KV_LEN, NUM_HEADS = 21, 40, 12
Q_OFFSET = KV_LEN - Q_LEN
SMALL, NEGATIVE, LARGE = 5, -3, 70000
TABLE = (torch.arange(KV_LEN, dtype=torch.int32) * 17) % 31 - 7
GRID = (torch.arange(KV_LEN * KV_LEN) * 7 % 19 - 4).view(KV_LEN, KV_LEN).to(torch.int16)
FLAGS = torch.arange(KV_LEN) % 3 != 1
LEAVES = (
    "q",
    "k",
    "h",
    "SMALL",
    "NEGATIVE",
    "LARGE",
    "2",
    "7",
    "-4",
    "TABLE[k]",
    "TABLE[q]",
    "GRID[q, k]",
    "(FLAGS[k] + 0)",
    "13",
)


DIVISORS = ("7", "-4", "8", "SMALL", "NEGATIVE")


def number(rng: random.Random, depth: int) -> str:
    """Source of a random integer expression."""
    if depth == 0:
        return rng.choice(LEAVES)
    a, b = number(rng, depth - 1), number(rng, rng.randrange(depth))
    forms = ["({a} + {b})", "({a} - {b})", "({a} * {factor})", "({a} // {divisor})", "({a} % {divisor})", "abs({a})",
             "least({a}, {b})", "most({a}, {b})", "choose({c}, {a}, {b})", "({a} & 12)", "({a} >> 2)", "(-{a})",
             "({a} | 5)", "({a} ^ 9)"]  # fmt: skip
    parts = {
        "a": a,
        "b": b,
        "c": truth(rng, depth - 1),
        "factor": rng.choice(LEAVES[3:9]),
        "divisor": rng.choice(DIVISORS),
    }
    return rng.choice(forms).format(**parts)


def truth(rng: random.Random, depth: int) -> str:
    """Source of a random condition."""
    if depth <= 0:
        return f"({rng.choice('qk')} {rng.choice(('<', '<=', '>'))} {rng.choice(('k', 'SMALL', '17'))})"
    a, b = number(rng, depth - 1), number(rng, rng.randrange(depth))
    c, d = truth(rng, depth - 1), truth(rng, depth - 1)
    comparison = rng.choice(("<", "<=", "==", "!=", ">"))
    return rng.choice((f"({a} {comparison} {b})", f"({c} & {d})", f"({c} | {d})", f"negate({c})"))


PLAIN = {"least": min, "most": max, "choose": lambda c, a, b: a if c else b, "negate": lambda a: not a}
NAMES = {"SMALL": SMALL, "NEGATIVE": NEGATIVE, "LARGE": LARGE}
TABLES = {"TABLE": TABLE, "GRID": GRID, "FLAGS": FLAGS}


class Numbers:
    """A tensor whose elements are Python ints."""

    def __init__(self, t: torch.Tensor) -> None:
        self.rows = t.to(torch.int64).tolist()

    def __getitem__(self, at):
        return self.rows[at[0]][at[1]] if isinstance(at, tuple) else self.rows[at]


def as_tensor(x):
    return x if isinstance(x, torch.Tensor) or hasattr(x, "expr") else torch.tensor(x)


TRACED = {
    "least": lambda a, b: torch.minimum(as_tensor(a), as_tensor(b)),
    "most": lambda a, b: torch.maximum(as_tensor(a), as_tensor(b)),
    "choose": lambda c, a, b: torch.where(as_tensor(c), a, b),
    "negate": lambda a: torch.logical_not(as_tensor(a)),
}


def as_hook(source: str, traced: bool):
    """The expression as a function of q, k and h, over stand-ins or over Python ints."""
    scope = {
        **NAMES,
        **(TABLES if traced else {n: Numbers(t) for n, t in TABLES.items()}),
        **(TRACED if traced else PLAIN),
    }
    exec(f"def hook(q, k, h):\n    return {source}\n", scope)
    return scope["hook"]


def in_python(source: str, h: int) -> torch.Tensor:
    hook = as_hook(source, traced=False)
    rows = range(Q_OFFSET, Q_OFFSET + Q_LEN)
    return torch.tensor([[float(hook(q, k, h)) for k in range(KV_LEN)] for q in rows], dtype=torch.float64)


def fits(source: str, h: int) -> bool:
    """Whether float32 holds every value exactly, so that results compare bit by bit."""
    return bool((in_python(source, h).abs() < 2**24).all())


@pytest.mark.parametrize("seed", range(4))
def test_random_numbers_agree(seed):
    rng = random.Random(f"numbers {seed}")
    sources: list[str] = []
    while len(sources) < NUM_HEADS:
        candidate = number(rng, 3)
        if fits(candidate, len(sources)):
            sources.append(candidate)
    hooks = [as_hook(s, traced=True) for s in sources]

    def score(s, b, h, q, k):
        value = hooks[0](q, k, h) + s * 0
        for i in range(1, NUM_HEADS):
            value = torch.where(h == i, hooks[i](q, k, h), value)
        return value

    sizes = {"batch": 1, "num_heads": NUM_HEADS, "q_len": Q_LEN, "kv_len": KV_LEN, "q_offset": Q_OFFSET}
    variant = jitgen.Variant(score_mod=score)
    oracle, kernel = evaluated_scores(variant, **sizes)[0], computed_scores(variant, **sizes)[0].double()
    for h, source in enumerate(sources):
        want = in_python(source, h)
        assert torch.equal(oracle[h], want), f"oracle: {source}"
        assert torch.equal(kernel[h], want), f"kernel: {source}"


@pytest.mark.parametrize("seed", range(24))
def test_random_conditions_agree_and_their_tiles_are_never_wrong(seed):
    rng = random.Random(f"conditions {seed}")
    source = f"({truth(rng, 3)} | {truth(rng, 2)}) & {truth(rng, 2)}"
    hook = as_hook(source, traced=True)
    variant = jitgen.Variant(mask_mod=lambda b, h, q, k: hook(q, k, h))
    traced = variant.trace()
    want = torch.stack([in_python(source, h) for h in range(3)]).bool()
    lengths = {"q_len": Q_LEN, "kv_len": KV_LEN, "q_offset": Q_OFFSET}
    assert torch.equal(jitgen.reference.mask_of(traced.program, traced.values(), num_q_heads=3, **lengths)[0], want), source
    for tile_q, tile_kv in ((1, 1), (4, 8), (7, 3), (16, 16), (21, 40)):
        found = classify(traced.program, traced.values(), num_q_heads=3, tile_q=tile_q, tile_kv=tile_kv, **lengths)
        rows, columns = torch.arange(Q_LEN) // tile_q, torch.arange(KV_LEN) // tile_kv
        per_element = found[:, rows][:, :, columns]
        assert not want[per_element == TILE_NONE].any(), f"{source}, tiles {tile_q} x {tile_kv}"
        assert want[per_element == TILE_FULL].all(), f"{source}, tiles {tile_q} x {tile_kv}"


ENDS = (2**31 - 1, -(2**31), 2**31 - 2, -1, 1, 2**30, -(2**30), 2**30 + 7)


@pytest.mark.parametrize("seed", range(3))
def test_conditions_hold_for_captured_numbers_at_the_ends_of_32_bits(seed, monkeypatch):
    rng = random.Random(f"ends {seed}")
    for name in NAMES:
        monkeypatch.setitem(NAMES, name, rng.choice(ENDS))
    sources = [f"({truth(rng, 2)} | {truth(rng, 2)}) & {truth(rng, 1)}" for _ in range(NUM_HEADS)]
    hooks = [as_hook(s, traced=True) for s in sources]

    def mask(b, h, q, k):
        keep = as_tensor(hooks[0](q, k, h))
        for i in range(1, NUM_HEADS):
            keep = torch.where(h == i, hooks[i](q, k, h), keep)
        return keep

    variant = jitgen.Variant(score_mod=lambda s, b, h, q, k: s * 0 + 1, mask_mod=mask)
    sizes = {"batch": 1, "num_heads": NUM_HEADS, "q_len": Q_LEN, "kv_len": KV_LEN, "q_offset": Q_OFFSET}
    kernel = computed_scores(variant, **sizes)[0].bool()
    for h, source in enumerate(sources):
        assert torch.equal(kernel[h], in_python(source, h).bool()), f"{source} with {NAMES}"
