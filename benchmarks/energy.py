"""Energy a GPU has used since its driver was loaded, from NVML's counter."""

from __future__ import annotations

import ctypes


class EnergyCounter:
    """Reads millijoules of one GPU; `read()` returns None where NVML has no such counter."""

    def __init__(self, index: int = 0) -> None:
        self._nvml, self._device = None, ctypes.c_void_p()
        try:
            nvml = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        if nvml.nvmlInit_v2() == 0:
            if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(self._device)) == 0:
                self._nvml = nvml

    def read(self) -> int | None:
        """Returns the counter in millijoules, or None."""
        if self._nvml is None:
            return None
        value = ctypes.c_ulonglong()
        failed = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._device, ctypes.byref(value))
        return None if failed else value.value
