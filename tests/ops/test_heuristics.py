"""Which kernel the launchers choose. Host code: it needs a CUDA build, but no GPU."""

from __future__ import annotations

import pytest
import torch

from pixelfly import _C, build_info, masks
from pixelfly.ops.device import USUAL_THREAD_BLOCKS
from pixelfly.ops.plan import HEADER_SIZE, Header, host_plan

pytestmark = pytest.mark.skipif(build_info()["cuda"] is None, reason="a CPU-only build")
H100 = (90, 132, 232448)  # arch, multiprocessors, shared bytes a thread block can have
A100 = (80, 108, 166912)
B200 = (100, 148, 232448)
FLOAT32, BFLOAT16, FLOAT16 = 0, 1, 2  # dtype.h
ALL_ROWS = "product_all_rows_sm90"


def choose(
    device=H100, *, tokens=4096, b=64, rank=0, dtype=BFLOAT16, activation=0, outputs=1024, n=2048
) -> dict:
    layout = masks.flat_block_butterfly(outputs, n, block_size=b)
    plan = host_plan(layout, rank, USUAL_THREAD_BLOCKS)
    return dict(_C.explain(plan, dtype, tokens, activation, False, False, *device))


def test_hopper_has_its_own_kernels():
    for dtype in (BFLOAT16, FLOAT16):
        for b, rank in ((32, 0), (64, 64), (128, 136)):
            kernels = choose(b=b, dtype=dtype, rank=rank)
            assert kernels["y"] == kernels["dx"] == "product_sm90"
            assert kernels["dblocks, du, dv, dbias"] == "weight_grad_sm90"


def test_t_is_formed_beside_the_product_where_that_is_quicker():
    ahead = "low_rank_ahead_sm90, beside the product"
    square = choose(n=1024, rank=64, tokens=5000)
    assert square["t"] == square["s"] == ahead
    few = choose(n=1024, rank=64, tokens=4096)  # groups of single rows, see csrc/README.md
    assert few["t"] == few["s"] == "low_rank_sm90, clusters of 2"
    assert choose(n=4096, rank=64, tokens=9000)["t"] == "low_rank_sm90"
    # more than a tile of ranks
    assert choose(n=1024, rank=72, tokens=5000)["t"] == "low_rank_sm90"
    assert choose(A100, n=1024, rank=64)["t"] == "product_sm80 without blocks"
    assert "t" not in choose(n=1024)


def test_what_python_knows_of_plans():
    layout = masks.flat_block_butterfly(256, 256, block_size=64)
    index = [i.numpy() for i in (layout.row_indices, layout.col_indices)]
    usual = _C.build_plan(256, 256, 64, 8, *index)
    assert (host_plan(layout, 8, USUAL_THREAD_BLOCKS) == usual).all()
    assert (host_plan(layout, 8, 78)[:HEADER_SIZE] != usual[:HEADER_SIZE]).any()
    header = Header.parse(" ".join(map(str, usual[:HEADER_SIZE])))
    assert header.row_ptr_offset == -(-HEADER_SIZE // 4) * 4  # the first section follows


def test_few_tokens_are_formed_by_clusters():
    def t(tokens, **options):
        return choose(tokens=tokens, n=4096, rank=64, **options)["t"]

    assert t(512) == "low_rank_sm90, clusters of 8"
    assert t(2048) == "low_rank_sm90, clusters of 4"
    assert t(4096) == "low_rank_sm90, clusters of 2"
    assert t(8192) == "low_rank_sm90"
    # 12 steps: two thread blocks would save fewer than adding their sums takes.
    assert choose(tokens=512, n=768, outputs=3072, rank=64)["t"] == "low_rank_sm90"


def test_activation_adds_a_step():
    assert "dz" not in choose() and "dz" in choose(activation=2)


@pytest.mark.parametrize("device", [A100, B200])
def test_other_devices_run_the_portable_kernels(device):
    assert all("sm80" in kernel for kernel in choose(device, rank=8).values())


def test_what_hopper_kernels_do_not_cover():
    assert all("sm80" in kernel for kernel in choose(dtype=FLOAT32).values())
    assert all("sm80" in kernel for kernel in choose(b=16).values())


def test_decoding_has_a_kernel_of_its_own():
    for device in (A100, H100, B200):
        for tokens in (1, 64):
            kernels = choose(device, tokens=tokens, b=32, rank=8)
            assert kernels["y"] == kernels["dx"] == "product_few_sm80"
    assert choose(tokens=1, dtype=FLOAT32)["y"] == choose(tokens=1, b=16)["y"] == "product_sm80"


def test_few_tokens_more_than_64_for_narrow_outputs():
    """Two thread blocks of 64 tokens x 16 outputs for each multiprocessor, and 256 tokens, unless
    product_split_sm90 is expected to be quicker, which has no blocks of 32."""
    split = "product_split_sm90"
    for outputs, most, more in (
        (8192, 32, "product_sm90"),
        (4096, 64, split),
        (2048, 128, "product_sm90"),
        (1024, 128, split),
        (256, 256, f"{split}, clusters of 4"),
    ):
        assert choose(outputs=outputs, tokens=most)["y"] == "product_few_sm80"
        assert choose(outputs=outputs, tokens=most + 1)["y"] == more
        most = 256 if outputs == 1024 else max(most, 64)
        assert choose(outputs=outputs, b=32, tokens=most)["y"] == "product_few_sm80"
        assert choose(outputs=outputs, b=32, tokens=most + 1)["y"] == "product_sm90"
        assert choose(A100, outputs=outputs, tokens=64)["y"] == "product_few_sm80"
        assert choose(A100, outputs=outputs, tokens=257)["y"] == "product_sm80"


def test_t_of_few_tokens():
    few, clusters = "product_few_sm80 without blocks", "low_rank_sm90, clusters of 8"
    for n, tokens, t in ((2048, 16, few), (2048, 17, clusters), (1984, 256, few)):
        assert choose(n=n, rank=64, tokens=tokens)["t"] == t
    assert choose(A100, rank=64, tokens=17)["t"] == few


def test_few_tokens_of_wide_contractions_are_split():
    def dx(tokens, **options):
        return choose(tokens=tokens, n=1024, outputs=4096, **options)["dx"]

    for b, rank in ((64, 0), (64, 8), (128, 72)):
        assert dx(64, b=b, rank=rank) == "product_few_sm80"
        assert dx(192, b=b, rank=rank) == "product_split_sm90, clusters of 2"
        assert dx(256, b=b, rank=rank) == "product_split_sm90"
        # Rows alone, where weights of 64 stay in registers, are as quick.
        assert dx(512, b=b, rank=rank) == ("product_sm90" if b == 64 else "product_split_sm90")
        assert dx(1024, b=b, rank=rank) == "product_sm90"
    assert dx(128, b=32) == "product_few_sm80"
    assert "sm80" in dx(128, device=A100) and "sm80" in dx(128, dtype=FLOAT32)
    assert choose(tokens=128, n=8192, outputs=2048)["y"] == "product_split_sm90"
    layout = masks.flat_block_butterfly(4096, 4096, block_size=64)
    layout = layout | masks.global_(4096, 4096, block_size=64, width=64)
    plan = host_plan(layout, 0, USUAL_THREAD_BLOCKS)
    for tokens in (128, 256, 512):  # only the dense row is worth sharing
        kernels = dict(_C.explain(plan, BFLOAT16, tokens, 0, False, False, *H100))
        assert kernels["y"] == "product_split_sm90, clusters of 8 for long rows"
        assert kernels["dx"] == kernels["y"]
    # Where t is formed beside the product, it stays there.
    ahead = choose(tokens=512, n=1024, outputs=3072, rank=64)
    assert "beside" in ahead["t"] and ahead["y"] == "product_sm90"


def test_layers_that_narrow_take_all_rows_at_once():
    def y(tokens, rank=0, **options):
        sizes = {"n": 3072, "outputs": 768} | options
        return choose(tokens=tokens, rank=rank, **sizes)["y"]

    # 197 token tiles are three turns of 66 thread blocks less one; 157 take as long.
    assert y(25216) == y(25216, 64) == y(25216, b=128) == ALL_ROWS
    assert y(20000) == "product_sm90"
    assert choose(tokens=25216, n=768, outputs=3072)["dx"] == ALL_ROWS
    # Too few tokens, too little narrower, too wide, too many ranks.
    assert y(2048) == y(25216, n=1408) == y(25216, n=4608, outputs=2304) == "product_sm90"
    assert y(25216, 72) == y(16384, 64, n=4096, outputs=1024) == "product_sm90"
    assert y(25216, b=32) == "product_sm90"
    assert choose(A100, tokens=25216, n=3072, outputs=768)["y"] == "product_sm80"


def test_weight_gradients_of_few_tokens_run_on_hopper():
    for tokens in (1, 256, 257):
        assert choose(tokens=tokens)["dblocks, du, dv, dbias"] == "weight_grad_sm90"


def test_forced_path(monkeypatch):
    monkeypatch.setenv("PIXELFLY_KERNEL", "sm80")
    assert choose()["y"] == "product_sm80"
    monkeypatch.setenv("PIXELFLY_KERNEL", "sm90")
    assert choose(tokens=1)["y"] == "product_sm90"
    assert "cannot serve" in choose(dtype=FLOAT32)["y"]
    assert "cannot serve" in choose(A100)["dx"]
    monkeypatch.setenv("PIXELFLY_KERNEL", "few")
    assert choose(tokens=8)["y"] == "product_few_sm80"
    assert "at most 256 tokens" in choose(tokens=257)["y"]
    monkeypatch.setenv("PIXELFLY_KERNEL", "split")
    split = choose(tokens=2000, n=1024, rank=64)
    assert "product_split_sm90" in split["y"] and "low_rank_sm90" in split["t"]
    assert split["dblocks, du, dv, dbias"] == "weight_grad_sm90"
    assert "cannot serve" in choose(b=32)["y"]
    monkeypatch.setenv("PIXELFLY_KERNEL", "all_rows")
    all_rows = choose(tokens=9, n=1536, outputs=768, rank=64)
    assert all_rows["y"] == ALL_ROWS and all_rows["t"] == f"{ALL_ROWS}, in the product"
    assert all_rows["dblocks, du, dv, dbias"] == "weight_grad_sm90"
    assert choose(n=768, outputs=1536)["dx"] == ALL_ROWS
    assert "cannot serve" in choose(rank=72)["y"]
    monkeypatch.setenv("PIXELFLY_KERNEL", "sm70")
    assert choose()["y"] == "PIXELFLY_KERNEL must be auto, sm80, few, split, all_rows or sm90"


def test_not_a_plan():
    with pytest.raises(ValueError, match="not a plan"):
        _C.explain(torch.zeros(3, dtype=torch.int32).numpy(), 1, 64, 0, False, False, *H100)
