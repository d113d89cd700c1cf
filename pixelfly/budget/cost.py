"""Cost models: how long a matmul of so many FLOPs and bytes takes on a device."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

import torch

from .operators import CONVOLUTIONS, MATMULS, MOVED, aligned
from .rate import Rate, Work

VERSION = 3


@dataclass(frozen=True)
class GPU:
    """What a data sheet promises: dense bf16 TFLOP/s, memory GB/s, and where it says so."""

    tflops: float
    gbps: float
    source: str


GPUS = {
    "a100-40gb": GPU(312, 1555, "NVIDIA A100 data sheet, 40GB PCIe"),
    "a100": GPU(312, 2039, "NVIDIA A100 data sheet, 80GB SXM"),
    "h100": GPU(989.4, 3350, "NVIDIA H100 data sheet, SXM (half of the figure with sparsity)"),
    "h100-pcie": GPU(756, 2000, "NVIDIA H100 data sheet, PCIe (half of the figure with sparsity)"),
    "h200": GPU(989.4, 4800, "NVIDIA H200 data sheet, SXM (half of the figure with sparsity)"),
    "b200": GPU(2250, 8000, "NVIDIA DGX B200 data sheet, per GPU (half of that with sparsity)"),
}


@dataclass(frozen=True)
class CostModel:
    """Predicts how long dense and Pixelfly layers take on a device.

    Attributes:
        device: what it describes.
        dtype: of activations and weights, by torch's name.
        rates: by kind. Each followed by "/forward" or "/step" (forward + backward): "dense";
            "unaligned", dense with rows that are not whole pieces of 16 bytes; "b16" ... "b128",
            Pixelfly layers by block size; "attention"; "convolution"; "unaligned convolution", of
            images, say, whose three channels are no whole pieces. And, for all operators that only
            move bytes: "pointwise"; "mixed", of tensors of several floating-point dtypes;
            "normalization", whose FLOPs are elements; "reduction", sums over rows; "strided", where
            dimensions change their order in memory.
        source: where the numbers come from.

    Source: Pixelated Butterfly (Chen et al., ICLR 2022), section 3.3 and its appendix:
    cost = cost_mem · blocks + cost_flop · flops.

    Example:
        >>> cost = CostModel.roofline("h100")
        >>> dense = cost.dense_seconds(16384, 4096, 4096)
        >>> ours = cost.sparse_seconds(16384, 4096, 4096, block_size=64, nnz=1024, rank=0)
        >>> round(dense / ours, 2)  # a quarter of the blocks
        4.0
    """

    device: str
    dtype: str
    rates: dict[str, Rate] = field(hash=False)
    source: str = ""

    @classmethod
    def roofline(cls, gpu: str) -> CostModel:
        """Returns a GPU's floor in bf16: its data sheet's peaks reached, nothing for launches.

        Args:
            gpu: a key of `pixelfly.budget.GPUS`.

        Raises:
            ValueError: the GPU is unknown. There is none for the CPU: `measure` it.

        Example:
            >>> CostModel.roofline("h200").source
            'NVIDIA H200 data sheet, SXM (half of the figure with sparsity)'
        """
        if gpu not in GPUS:
            hint = "; a CPU has no data sheet here, use CostModel.measure('cpu')"
            raise ValueError(
                f"CostModel.roofline: gpu must be one of {', '.join(map(repr, GPUS))}, got {gpu!r}"
                + (hint if gpu == "cpu" else "")
            )
        sheet = GPUS[gpu]
        rate = Rate(0.0, 1 / (sheet.tflops * 1e12), 1 / (sheet.gbps * 1e9))
        kinds = (*MATMULS, "b16", "b32", "b64", "b128")
        names = [f"{kind}/{mode}" for kind in kinds for mode in ("forward", "step")]
        return cls(gpu, "bfloat16", dict.fromkeys((*names, *MOVED), rate), sheet.source)

    @classmethod
    def measure(
        cls,
        device: torch.device | str = "cuda",
        *,
        dtype: torch.dtype | None = None,
        tokens: Sequence[int] | None = None,
        shapes: Sequence[tuple[int, int]] | None = None,
        densities: Sequence[float] = (0.1, 0.25, 0.5),
        block_sizes: Sequence[int] = (32, 64),
        repeats: int = 5,
    ) -> CostModel:
        """Times layers and what stands between them on a device and fits the model to that.

        Takes seconds to minutes. On CUDA every operation is captured into a graph that walks over
        several buffer sets, so that launches from Python and L2 hits do not count.

        Args:
            device: "cpu" or a CUDA device.
            dtype: of activations and weights; None is bfloat16 on CUDA, float32 on the CPU.
            tokens: values of T; None takes some that suit the device.
            shapes: (K, N) of the layers, multiples of 8; None takes some that suit the device.
            densities: of the Pixelfly layers, each with and without a low rank.
            block_sizes: of the Pixelfly layers; a plan can use no others.
            repeats: timings of which the median counts.

        Returns:
            The model, with the relative error of every fit in its rates.

        Raises:
            ValueError: a grid is empty, or the device is neither a CPU nor a CUDA device.
            RuntimeError: there is no such device, or it cannot run the operators.
        """
        from .measure import measure_rates

        device = torch.device(device)
        cuda = device.type == "cuda"
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"CostModel.measure: device must be cpu or cuda, got {device.type!r}")
        if cuda and not torch.cuda.is_available():
            raise RuntimeError(
                f"CostModel.measure: torch sees no CUDA device here for device={str(device)!r}"
            )
        dtype = dtype or (torch.bfloat16 if cuda else torch.float32)
        if tokens is None:
            tokens = (1024, 8192, 32768) if cuda else (128, 1024)
        if shapes is None:
            small = ((256, 256), (256, 1024), (1024, 256), (1024, 1024))
            large = ((768, 3072), (3072, 768), (1024, 1024), (1024, 4096), (4096, 4096))
            shapes = large if cuda else small
        rates, name = measure_rates(device, dtype, tokens, shapes, densities, block_sizes, repeats)
        return cls(
            name, str(dtype).removeprefix("torch."), rates, f"measured, torch {torch.__version__}"
        )

    @property
    def itemsize(self) -> int:
        return getattr(torch, self.dtype).itemsize

    @property
    def block_sizes(self) -> tuple[int, ...]:
        """Block sizes of which the model knows the cost."""
        return tuple(b for b in (16, 32, 64, 128) if f"b{b}/forward" in self.rates)

    def seconds(self, works: dict[str, Work], *, training: bool = True) -> float:
        """Returns the seconds of work by kind, as `count` tallies it.

        In training a matmul's or an attention's work, which is the forward's, is done three times;
        work of other kinds holds the backward already.

        Raises:
            ValueError: the model does not know a kind.
        """
        total = 0.0
        for kind, work in works.items():
            if kind in MATMULS:
                if training and kind not in CONVOLUTIONS:
                    work = work.scaled(3)
                kind = f"{kind}/{'step' if training else 'forward'}"
            if kind not in self.rates:
                raise ValueError(
                    f"the cost model of {self.device} has no rate {kind!r}, only "
                    f"{', '.join(map(repr, self.rates))}: measure it again"
                )
            total += self.rates[kind].seconds(work)
        return total

    def dense_seconds(self, tokens: int, k: int, n: int, *, training: bool = True) -> float:
        """Returns the seconds of a dense layer: forward, and backward if `training`."""
        kind = "dense" if aligned(self.itemsize, k, n) else "unaligned"
        return self.seconds({kind: dense_work(tokens, k, n, self.itemsize)}, training=training)

    def sparse_seconds(
        self,
        tokens: int,
        k: int,
        n: int,
        *,
        block_size: int,
        nnz: int,
        rank: int,
        training: bool = True,
    ) -> float:
        """Returns the seconds of a Pixelfly layer with `nnz` blocks and a factored `rank`.

        Raises:
            ValueError: the model does not know the block size.
        """
        mode, passes = ("step", 3) if training else ("forward", 1)
        if block_size not in self.block_sizes:
            raise ValueError(
                f"block_size must be one that the cost model of {self.device} knows, "
                f"{self.block_sizes}, got {block_size}"
            )
        work = sparse_work(tokens, k, n, block_size, nnz, rank, self.itemsize, passes)
        return self.rates[f"b{block_size}/{mode}"].seconds(work)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model as JSON."""
        data = {"format": "pixelfly.CostModel", "version": VERSION, **asdict(self)}
        pathlib.Path(path).write_text(json.dumps(data, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CostModel:
        """Reads what `save` wrote; raises ValueError for anything else."""
        return cls.from_dict(json.loads(pathlib.Path(path).read_text()))

    @classmethod
    def from_dict(cls, data: dict) -> CostModel:
        """Returns the model of plain data, as in a saved file."""
        if data.get("format", "pixelfly.CostModel") != "pixelfly.CostModel":
            raise ValueError(f"CostModel.load: this is a file of {data['format']}")
        if data.get("version", VERSION) != VERSION:
            raise ValueError(
                f"CostModel.load: version must be {VERSION}, got {data['version']}: written by "
                "another pixelfly, with other rates; measure again"
            )
        rates = {key: Rate(**rate) for key, rate in data["rates"].items()}
        return cls(data["device"], data["dtype"], rates, data["source"])


def dense_work(tokens: int, k: int, n: int, itemsize: int, passes: int = 1) -> Work:
    """Returns a dense layer's work; `passes` is 1 for forward, 3 for forward + backward.

    All three passes (y, dx, dW) read two of x, y and W and write the third.
    """
    moved = tokens * (k + n) + k * n
    return Work(2.0 * passes * tokens * k * n, float(passes * itemsize * moved), passes)


def sparse_work(
    tokens: int, k: int, n: int, block_size: int, nnz: int, rank: int, itemsize: int, passes: int
) -> Work:
    """Returns a Pixelfly layer's work; blocks at the edge count whole, as the kernels run them."""
    weights = nnz * block_size**2 + rank * (k + n)
    moved = tokens * (k + n + 2 * rank) + weights  # t is written and read
    launches = passes * (2 if rank else 1)
    return Work(2.0 * passes * tokens * weights, float(passes * itemsize * moved), launches)
