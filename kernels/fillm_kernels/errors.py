"""Named errors of the kernel library; each is also the builtin exception that fits, so callers need not import them."""


class KernelError(Exception):
    """Base of every error this library raises on purpose."""


class ShapeError(KernelError, ValueError):
    """Sizes that do not fit together, or offsets that do not run from 0 to N."""


class DtypeError(KernelError, TypeError):
    """An element type, or a kind of array, that an op does not take."""


class NotANumberError(KernelError, ValueError):
    """A NaN where values are put in order; the message says where."""


class DeviceError(KernelError, ValueError):
    """Tensors of one call that lie on different devices."""


class BackendError(KernelError, RuntimeError):
    """A backend that was asked for by name and cannot run here; the message says why."""
