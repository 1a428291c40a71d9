"""The exceptions of gpuad. Each text says what was given, what was expected and how to mend it."""

from __future__ import annotations


class GpuadError(Exception):
    """Base of every exception that gpuad raises of its own."""


class DeviceError(GpuadError, RuntimeError):
    """A device is not there, or operands are on different devices."""


class ShapeError(GpuadError, ValueError):
    """Shapes do not fit together, or a dimension does not exist."""


class DtypeError(GpuadError, TypeError):
    """A dtype is not one that the operation takes."""


class AutogradError(GpuadError, RuntimeError):
    """The graph cannot be walked: freed, changed in place, or never recorded."""


class AnomalyError(AutogradError):
    """A gradient is not finite; raised inside detect_anomaly."""


class FormulaError(GpuadError, TypeError):
    """A function cannot be traced as an elementwise formula."""


class MissingPackageError(GpuadError, ImportError):
    """An optional package is needed and is not installed; the text names the pip command."""


class SynchronizationError(GpuadError, RuntimeError):
    """The host would wait for a device while gpuad.cuda.set_sync_debug_mode("error") forbids it."""


class OutOfMemoryError(GpuadError, RuntimeError, MemoryError):
    """An allocation on a device failed, also after the cache was emptied; the text lists what is alive there.

    device: its name. requested: the bytes asked for, None where that is not known. free, total: those of the device.
    """

    def __init__(
        self, text: str, device: str = "", requested: int | None = None, free: int | None = None,
        total: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__(text)
        self.device, self.requested, self.free, self.total = device, requested, free, total
