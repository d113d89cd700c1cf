"""What benchmarks/op.py times: layers, their roofline floors, and the studies they belong to."""

from __future__ import annotations

import dataclasses

from pixelfly import masks

# Measured ceilings of an H100 SXM, see csrc/README.md: the roofline floor is stated against these.
PEAK_FLOPS = 790e12
PEAK_BYTES = 3.0e12

KINDS = ("blocks", "factored", "global")
DIRECTIONS = ("forward", "dx", "dw", "forward_backward")
BOTH = ("forward", "forward_backward")


@dataclasses.dataclass(frozen=True)
class Case:
    """One pixelfly layer to time: a shape, a pattern and its low-rank form."""

    tokens: int
    in_features: int
    out_features: int
    block_size: int = 64
    max_stride: int | None = None
    kind: str = "blocks"  # blocks | factored | global
    rank: int = 64
    activation: str | None = None

    def layout(self) -> masks.BlockLayout:
        layout = masks.flat_block_butterfly(
            self.out_features,
            self.in_features,
            block_size=self.block_size,
            max_stride=self.max_stride,
        )
        if self.kind == "global":
            layout = layout | masks.global_(
                self.out_features, self.in_features, block_size=self.block_size, width=self.rank
            )
        return layout

    @property
    def factored_rank(self) -> int:
        return self.rank if self.kind == "factored" else 0

    @property
    def density(self) -> float:
        """Weights of the layer / weights of the dense layer."""
        border = self.factored_rank * (self.in_features + self.out_features)
        return self.layout().density + border / (self.in_features * self.out_features)

    def floor_ms(self, direction: str) -> float:
        """Roofline floor: the larger of the FLOP time and the bytes-touched-once time."""
        t, k, n, r = self.tokens, self.in_features, self.out_features, self.factored_rank
        kept = self.layout().nnz * self.block_size**2
        flops = 2.0 * t * (kept + r * (k + n))
        weights = 2.0 * (kept + r * (k + n))
        extra = 2.0 * t * n if self.activation else 0.0  # act'(z): written, then read
        one_pass = max(flops / PEAK_FLOPS, (2.0 * t * (k + n) + weights + extra) / PEAK_BYTES)
        passes = 3 if direction == "forward_backward" else 1
        return 1e3 * passes * one_pass


@dataclasses.dataclass(frozen=True)
class Group:
    """Cases of one shape that are timed against one dense layer, in one interleaved run."""

    study: str
    cases: tuple[Case, ...]
    directions: tuple[str, ...]
    peers: bool = False
    accuracy: bool = False


# T x K x N: ViT/Mixer-B (batch 128), GPT-2 medium widths, and wider.
TABLE = [
    (25216, 768, 768),
    (25216, 768, 3072),
    (25216, 3072, 768),
    (16384, 1024, 1024),
    (16384, 1024, 4096),
    (16384, 4096, 1024),
    (16384, 2048, 8192),
    (16384, 4096, 4096),
    (8192, 8192, 8192),
]


def table(shapes: list[tuple[int, int, int]] = TABLE, **options) -> list[Group]:
    """Every shape in every form and direction: the README's table."""
    return [
        Group("table", tuple(Case(*s, kind=kind, **options) for kind in KINDS), DIRECTIONS,
              accuracy=True)
        for s in shapes
    ]  # fmt: skip


def epilogue() -> list[Group]:
    """Fused GELU, with its derivative kept, against compiled dense."""
    shapes = [(25216, 768, 3072), (16384, 1024, 4096), (16384, 4096, 4096)]
    return [Group("epilogue", (Case(*s, activation="gelu"),), BOTH) for s in shapes]


def block_sizes() -> list[Group]:
    """Full-stride butterflies of the other block sizes beside 64, each against its own floor."""
    shapes = [(16384, 1024, 4096), (16384, 4096, 4096)]
    return [
        Group("block_size", (Case(*s, block_size=b),), DIRECTIONS)
        for s in shapes
        for b in (32, 64, 128)
    ]


def tokens() -> list[Group]:
    """From one token to 128k: where the launch, the weights, then the activations bound a call."""
    counts = (1, 8, 64, 256, 512, 1024, 4096, 16384, 65536, 131072)
    return [
        Group("tokens", (Case(t, k, n),), BOTH)
        for k, n in ((1024, 4096), (4096, 4096))
        for t in counts
    ]


def widths() -> list[Group]:
    """Square layers by width, and GPT-2's odd widths, whose grids are no powers of two."""
    square = [(16384, d, d) for d in (512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192)]
    odd = [(16384, 1280, 5120), (16384, 1600, 6400), (16384, 2560, 10240)]
    return [Group("width", (Case(*s),), BOTH) for s in square + odd]


def densities() -> list[Group]:
    """One layer from block diagonal to full stride, and denser by global rows and columns."""
    cases = [Case(16384, 4096, 4096, max_stride=2**i) for i in range(7)]
    cases += [Case(16384, 4096, 4096, kind="global", rank=64 * w) for w in (2, 4, 8, 16, 32)]
    return [Group("density", (case,), BOTH) for case in cases]


def peers() -> list[Group]:
    """Other people's kernels on the same pattern; STK knows blocks of 128 only."""
    shapes = [(16384, 1024, 4096), (16384, 4096, 4096), (8192, 8192, 8192)]
    return [
        Group("peers", (Case(*s, block_size=b),), ("forward",), peers=True)
        for s in shapes
        for b in (64, 128)
    ]


STUDIES = {
    "table": table,
    "epilogue": epilogue,
    "block_size": block_sizes,
    "tokens": tokens,
    "width": widths,
    "density": densities,
    "peers": peers,
}
