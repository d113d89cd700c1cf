"""Energy a GPU has used since its driver was loaded, from NVML's counter."""

from __future__ import annotations

import ctypes


class EnergyCounter:
    """Reads millijoules of one GPU; `read()` returns None where NVML has no such counter.

    uuid: as `torch.cuda.get_device_properties(...).uuid` says. NVML's own numbers know nothing of
    CUDA_VISIBLE_DEVICES.
    """

    def __init__(self, uuid: object) -> None:
        self._nvml, self._device = None, ctypes.c_void_p()
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        name = f"GPU-{uuid}".encode()
        if nvml.nvmlInit_v2() == 0:
            if nvml.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self._device)) == 0:
                self._nvml = nvml

    def read(self) -> int | None:
        """Returns the counter in millijoules, or None."""
        if self._nvml is None:
            return None
        value = ctypes.c_ulonglong()
        failed = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value))
        return None if failed else value.value
