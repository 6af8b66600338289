"""The one door to the fused operations: checks arguments, and leaves the choice of kernel or twin to the operators.

``backend`` is "auto" (the Triton kernel for GPU tensors where it can run, its twin elsewhere), "triton" (the kernel, or
BackendUnavailable) or "torch" (the twin). With ``compiled=True`` a twin on the CPU runs through Inductor where a C++
compiler exists. The bits are the same in every case.

State, network output and copies are float32, float16 or bfloat16, each of its own; the arithmetic is float32, and each
stored value is rounded once. For float64 there is ``fastddpm.reference``. No operation reads a tensor's value on the
host: a row index out of range is an error on the CPU and undefined on a GPU.
"""

from fastddpm.noise.v1 import Counter
from fastddpm.ops.ddpm_loss import ddpm_loss
from fastddpm.ops.p_sample import p_sample
from fastddpm.ops.q_sample import q_sample
from fastddpm.ops.randn import randn

__all__ = ["Counter", "ddpm_loss", "p_sample", "q_sample", "randn"]
