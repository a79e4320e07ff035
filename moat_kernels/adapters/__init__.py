"""Other people's blocks: how each implementation's modules are computed by the fused ops.

`moat_kernels.fuse` asks these. To add one's own, subclass MBConvAdapter (or AttentionAdapter) and
pass an instance to `moat_kernels.register_adapter`:

    class InvertedResidual(MBConvAdapter):
        implementation, class_name = "my_models", "InvertedResidual"
        children = ("bn", "expand", "bn1", "act", "depthwise", "bn2", "project")

        def read(self, block):
            return read_bottleneck(
                pre_norm=block.bn,
                expand=block.expand,
                expand_norm=block.bn1,
                expand_activation=block.act,
                depthwise=block.depthwise,
                depthwise_norm=block.bn2,
                depthwise_activation=block.act,
                project=block.project,
            )

    moat_kernels.register_adapter(InvertedResidual())
"""

from moat_kernels.adapters.base import (
    Adapter,
    AttentionAdapter,
    AttentionReading,
    MBConvAdapter,
)
from moat_kernels.adapters.reading import (
    Bottleneck,
    NotCovered,
    NotCoveredInTraining,
    read_bottleneck,
    read_drop_path,
    read_gate,
    read_swin_table,
    refuse_dropout,
)

__all__ = [
    "Adapter",
    "AttentionAdapter",
    "AttentionReading",
    "Bottleneck",
    "MBConvAdapter",
    "NotCovered",
    "NotCoveredInTraining",
    "read_bottleneck",
    "read_drop_path",
    "read_gate",
    "read_swin_table",
    "refuse_dropout",
]
