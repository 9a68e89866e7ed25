"""Head dims above 256: which kernels calls and plans choose for them on each GPU, and what is refused."""

from __future__ import annotations

import pytest
import torch

import jitgen
from jitgen import block_lists
from jitgen.errors import ShapeMismatch, VariantError
from jitgen.families import choose_spec, cuda_spec, padded_head_dims, serving_spec
from jitgen.target import cuda_target

CUDA = torch.device("cuda", 0)


def program():
    return jitgen.Variant().trace().program


@pytest.mark.parametrize(
    "arch, family, tile, decode",
    [
        ("9.0", "sm90_wide", (64, 64, 8), (8, 16, 4)),
        ("10.0", "sm80", (64, 64, 8), (8, 16, 4)),
        ("8.0", "sm80", (64, 32, 8), (8, 16, 2)),
        ("8.6", "sm80", (32, 16, 4), (8, 16, 2)),
        ("12.0", "sm80", (32, 16, 4), (8, 16, 2)),
    ],
)
def test_every_gpu_has_kernels(monkeypatch, arch, family, tile, decode):
    monkeypatch.setenv("JITGEN_CUDA_ARCH", arch)
    dense = choose_spec(program(), "bfloat16", (512, 512), CUDA)
    assert (dense.family, dense.tiles.tile_q, dense.tiles.tile_kv, dense.tiles.num_warps) == (family, *tile)
    assert serving_spec(program(), "bfloat16", (512, 512), CUDA, "paged").family == family
    found = serving_spec(program(), "bfloat16", (512, 512), CUDA, "paged", family="decode").tiles
    assert (found.tile_q, found.tile_kv, found.num_warps) == decode


@pytest.mark.parametrize("dims, padded", [((264, 264), 512), ((384, 64), 512), ((512, 512), 512), ((256, 256), 256)])
def test_dims_between_are_padded(dims, padded):
    assert padded_head_dims(*dims) == (padded, padded)


def test_larger_dims_are_refused():
    with pytest.raises(ShapeMismatch, match="head_dim 520 is larger than 512, the largest the cuda kernels take"):
        padded_head_dims(520, 64)


@pytest.mark.parametrize("family, head_dim", [("sm90", 512), ("sm90_wide", 256)])
def test_family_of_other_dims_names_the_right_one(family, head_dim):
    with pytest.raises(
        VariantError, match=f"family='{family}' has no kernel for head_dim {head_dim}: 'sm90' has those up to 256"
    ):
        cuda_spec(program(), "bfloat16", (head_dim, head_dim), family, cuda_target("9.0a"))


def test_listed_blocks_keep_to_the_mask(monkeypatch):
    monkeypatch.setattr(block_lists, "is_hopper", lambda device: True)
    blocks = jitgen.BlockSparse.bsr(torch.tensor([0, 1, 3]), torch.tensor([0, 0, 1]), (32, 32), (16, 16))
    q, k, v = (torch.randn(1, 2, 32, 512).half() for _ in range(3))
    out = jitgen.block_sparse_attention(q, k, v, blocks)
    want = jitgen.reference.attention(q, k, v, blocks.variant())
    torch.testing.assert_close(out.double(), want.double(), atol=2e-3, rtol=2e-3)
    assert not blocks.lists.plans
