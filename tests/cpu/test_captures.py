"""Indexing captured tensors, and containers and objects that hold them."""

from __future__ import annotations

import copy
import io
import pickle
import types

import pytest
import torch
from gallery.matrix import computed_scores, evaluated_scores

import jitgen
from jitgen.captures import SortedTensor
from jitgen.reference import mask_of

Q_LEN, KV_LEN, HEADS = 7, 11, 3
ROW = torch.arange(KV_LEN) * 5 % 7
TABLE = (torch.arange(Q_LEN * KV_LEN) * 11 % 23).view(Q_LEN, KV_LEN)
CUBE = (torch.arange(HEADS * Q_LEN * KV_LEN) * 13 % 29).view(HEADS, Q_LEN, KV_LEN)
FOUR = CUBE.view(1, HEADS, Q_LEN, KV_LEN)
NUMBER = torch.tensor(4)
ROWS = [ROW, ROW * 2, ROW + 3]
NESTED = {"a": {"row": ROW}, "b": (TABLE, [CUBE])}
SPACE = types.SimpleNamespace(row=ROW, inner=types.SimpleNamespace(table=TABLE))


class Holder(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("table", TABLE.clone())
        self.parts = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
        for i, part in enumerate(self.parts):
            part.register_buffer("row", ROW + i)


HOLDER = Holder()

INDEXED = {
    "chained": lambda b, h, q, k: FOUR[b][h][q][k] > 9,
    "mixed": lambda b, h, q, k: FOUR[b, h][q, k] > 9,
    "partial": lambda b, h, q, k: CUBE[h][q, k] > 9,
    "ellipsis": lambda b, h, q, k: (CUBE[..., k][h][q] > 9) & (FOUR[b, ..., k][h, q] > 3),
    "new axis": lambda b, h, q, k: (CUBE[h, None, q, k] > 9).any(-1),
    "slice first": lambda b, h, q, k: TABLE[1:][q.clamp(max=Q_LEN - 2), k] > 9,
    "slice with step": lambda b, h, q, k: ROW[::2][k // 2] > 2,
    "slice from the end": lambda b, h, q, k: ROW[-4:][k.clamp(max=3)] > 2,
    "negative constant": lambda b, h, q, k: (ROW[-1] > 0) & (TABLE[-2, k] > 5),
    "negative traced": lambda b, h, q, k: (ROW[-1 - k] > 2) & (ROW[-(q + 1)] > 1),
    "captured index": lambda b, h, q, k: TABLE[NUMBER, k] > 9,
    "gather of gather": lambda b, h, q, k: TABLE[ROW[k], ROW[ROW[k]]] > 9,
    "row equal": lambda b, h, q, k: (TABLE[q, :4] == k).any(-1),
    "row sum": lambda b, h, q, k: TABLE[q, 2:5].sum() + TABLE[q, -3:].max() > 40,
    "row all": lambda b, h, q, k: (TABLE[q, :3] > k).all(),
    "row gathered by a row": lambda b, h, q, k: (ROW[TABLE[q, :3] % KV_LEN] == k % 5).any(),
    "row product": lambda b, h, q, k: torch.dot(TABLE[q, :4], TABLE[0, :4]) > 20 * k + 150,
    "row iterated": lambda b, h, q, k: sum(x > k for x in TABLE[q, :3]) > 1,
    "row unpacked": lambda b, h, q, k: TABLE[q, :2][0] - TABLE[q, :2][1] < k,
    "transposed": lambda b, h, q, k: (TABLE.T[k, q] > 9) & (TABLE.t()[k][q] > 2) & (CUBE.transpose(0, 2)[k, q, h] > 3),
    "permuted": lambda b, h, q, k: CUBE.permute(2, 0, 1)[k, h, q] > 9,
    "squeezed": lambda b, h, q, k: FOUR.squeeze(0)[h, q, k] > 9,
    "converted": lambda b, h, q, k: (TABLE.float()[q, k] * 0.5 > 4.4) & (TABLE.bool()[q, k]),
    "shape": lambda b, h, q, k: (k < TABLE.shape[1] - 2) & (q < TABLE.size(0) - 1) & (k < len(ROW)) & (q < CUBE.ndim + 2),
    "embedding": lambda b, h, q, k: torch.nn.functional.embedding(q, TABLE)[2] > k,
    "list of tensors": lambda b, h, q, k: (ROWS[0][k] > 2) | (ROWS[-1][k] > 8),
    "loop over tensors": lambda b, h, q, k: any((row[k] == q) for row in ROWS),
    "dictionaries": lambda b, h, q, k: (NESTED["a"]["row"][k] > 2) & (NESTED["b"][1][0][h, q, k] > 5),
    "namespaces": lambda b, h, q, k: (SPACE.row[k] > 2) & (SPACE.inner.table[q, k] > 5),
    "module": lambda b, h, q, k: (HOLDER.table[q, k] > 5) & (HOLDER.parts[1].row[k] > 2),
}


@pytest.mark.parametrize("name", INDEXED)
def test_indexing_means_what_it_means_in_torch(name):
    mask = INDEXED[name]
    want = torch.tensor(
        [[[bool(mask(*map(torch.tensor, (0, h, q, k)))) for k in range(KV_LEN)] for q in range(Q_LEN)] for h in range(HEADS)]
    )
    traced = jitgen.Variant(mask_mod=mask).trace()
    got = mask_of(traced.program, traced.values(), num_q_heads=HEADS, q_len=Q_LEN, kv_len=KV_LEN)[0]
    assert torch.equal(got, want)
    assert want.any() and not want.all()


@pytest.mark.parametrize("name", ["chained", "mixed", "partial", "permuted"])
def test_ways_to_index_are_one_program(name):
    def plain(b, h, q, k):
        return CUBE[h, q, k] > 9

    def four(b, h, q, k):
        return FOUR[b, h, q, k] > 9

    want = jitgen.Variant(mask_mod=four if name in ("chained", "mixed") else plain).trace().program.id
    assert jitgen.Variant(mask_mod=INDEXED[name]).trace().program.id == want


def test_index_outside_a_tensor_is_clamped_in_oracle_and_kernel():
    short = torch.tensor([0.0, 1.0, 2.0])

    def score(s, b, h, q, k):
        return short[k - 2] + 10 * short[q * 5 - 3]

    sizes = {"batch": 1, "num_heads": 1, "q_len": 4, "kv_len": 8, "q_offset": 0}
    rows = torch.tensor([0.0, 2.0, 2.0, 2.0])[:, None] * 10  # -3 counts from the end, then beyond it
    want = rows + torch.tensor([1.0, 2.0, 0.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    variant = jitgen.Variant(score_mod=score)
    assert torch.equal(evaluated_scores(variant, **sizes)[0, 0].float(), want)
    assert torch.equal(computed_scores(variant, **sizes)[0, 0], want)


LAYOUTS = {
    "contiguous": lambda t: t,
    "transposed": lambda t: t.t().contiguous().t(),
    "every other": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "broadcast rows": lambda t: t[:1].expand_as(t),
    "broadcast columns": lambda t: t[:, :1].expand_as(t),
    "offset": lambda t: torch.nn.functional.pad(t, (3, 2, 1, 0))[1:, 3:-2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int16, torch.float64], ids=str)
def test_kernel_reads_captures_of_any_layout(layout, dtype):
    table = LAYOUTS[layout]((torch.arange(9 * 16).view(9, 16) % 50).to(dtype))
    variant = jitgen.Variant(score_mod=lambda s, b, h, q, k: table[q, k] * 1.0)
    got = computed_scores(variant, batch=1, num_heads=1, q_len=9, kv_len=16, q_offset=0)[0, 0]
    assert torch.equal(got, table.float())


def test_copies_of_declared_tensors_are_declared_and_have_one_memory():
    doc = jitgen.sorted(torch.arange(10) // 3)
    file = io.BytesIO()
    torch.save(doc, file)
    file.seek(0)
    copies = [copy.deepcopy(doc), pickle.loads(pickle.dumps(doc)), torch.load(file, weights_only=False)]
    for made in (*copies, copy.copy(doc), jitgen.sorted(doc)):
        assert type(made) is SortedTensor and torch.equal(made, doc)
        assert made.plain.data_ptr() == made.data_ptr() and type(made.plain) is torch.Tensor
    assert all(made.data_ptr() != doc.data_ptr() for made in copies)
