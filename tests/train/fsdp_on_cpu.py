"""FSDP2 of accelerate on CPUs, which it offers for accelerators alone."""

import functools

from accelerate.state import AcceleratorState, DistributedType


def allow_fsdp_on_cpu() -> None:
    """From here on, an Accelerator that is given an FSDP plugin uses it on CPUs too."""
    own = AcceleratorState.__init__
    if hasattr(own, "__wrapped__"):
        return

    @functools.wraps(own)
    def init(self, *args, fsdp_plugin=None, **kwargs):
        own(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init
