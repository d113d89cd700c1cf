"""Which devices can run the operator, and what to tell the user of one that cannot."""

from __future__ import annotations

import functools
import re

import torch

from .._build import build_info
from .tracing import traced_constant

MIN_CAPABILITY = (8, 0)


def _built_for(archs: str, capability: tuple[int, int]) -> bool:
    """Whether kernels of an architecture list ("8.0;9.0a+PTX") run on a GPU."""
    for arch in archs.split(";"):
        digits = re.match(r"(\d+)\.(\d+)", arch)
        if digits is None:
            continue
        major, minor = int(digits[1]), int(digits[2])
        # Machine code runs on later GPUs of its own generation, PTX on all later ones.
        if arch.endswith("+PTX") and (major, minor) <= capability:
            return True
        if major == capability[0] and minor <= capability[1]:
            return True
    return False


# Subclasses bring operators of their own, or stand for something while code is traced.
PLAIN = (torch.Tensor, torch.nn.Parameter)


def plain_on_cuda(tensors: list[torch.Tensor]) -> bool:
    """Whether eager code may give tensors to a kernel that compiled code has no use for."""
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return False
    for t in tensors:
        if type(t) not in PLAIN or not t.is_cuda:
            return False
    return True


def check_device(device: torch.device) -> None:
    """Raises RuntimeError if this build has no kernels for `device`."""
    if device.type in ("cpu", "meta"):
        return
    built = build_info()
    if device.type != "cuda":
        raise RuntimeError(
            f"butterfly_lowrank_mm: expected tensors on cpu or cuda, got {device}; pixelfly has "
            "no kernels for this device"
        )
    name = torch.cuda.get_device_name(device)
    major, minor = torch.cuda.get_device_capability(device)
    if not built["cuda"]:
        raise RuntimeError(
            f"butterfly_lowrank_mm: got tensors on {device} ({name}, sm_{major}{minor}), but "
            "this pixelfly was built without CUDA; install the CUDA toolkit (nvcc), then run "
            "PIXELFLY_FORCE_CUDA=1 pip install --force-reinstall --no-deps ."
        )
    if (major, minor) < MIN_CAPABILITY:
        raise RuntimeError(
            f"butterfly_lowrank_mm: expected a GPU of compute capability 8.0 or newer, got "
            f"{device} ({name}, sm_{major}{minor}); this pixelfly was built for "
            f"{built['archs']}. Older GPUs have no kernels: move the "
            "tensors to the CPU"
        )
    if not _built_for(built["archs"], (major, minor)):
        raise RuntimeError(
            f"butterfly_lowrank_mm: got tensors on {device} ({name}, sm_{major}{minor}), but this "
            f"pixelfly was built for TORCH_CUDA_ARCH_LIST={built['archs']!r}; run "
            f"TORCH_CUDA_ARCH_LIST={major}.{minor} PIXELFLY_FORCE_CUDA=1 pip install "
            "--force-reinstall --no-deps ."
        )


_known: dict[torch.device, bool] = {}


@traced_constant
def has_kernels(device: torch.device) -> bool:
    """Whether this build has kernels for `device`; asked in every call, found out once."""
    if device not in _known:
        try:
            check_device(device)
        except RuntimeError:
            _known[device] = False
        else:
            _known[device] = True
    return _known[device]


_hopper: dict[torch.device, bool] = {}


@traced_constant
def has_hopper_kernels(device: torch.device) -> bool:
    """Whether `device` is a Hopper GPU and this build has its kernels; found out once."""
    if device not in _hopper:
        _hopper[device] = (
            device.type == "cuda"
            and torch.cuda.get_device_capability(device) == (9, 0)
            and "9.0" in build_info()["archs"]
        )
    return _hopper[device]


USUAL_THREAD_BLOCKS = 132  # kUsualThreadBlocks in csrc/include/pixelfly/schedule.h


@functools.cache
def thread_blocks(device: torch.device) -> int:
    """How many thread blocks plans for `device` are balanced for: a Hopper GPU's multiprocessors.

    Only Hopper's kernels ask, so it is the usual number elsewhere.
    """
    if not has_hopper_kernels(device):
        return USUAL_THREAD_BLOCKS
    return torch.cuda.get_device_properties(device).multi_processor_count
