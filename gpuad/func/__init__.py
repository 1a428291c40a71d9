"""Function transforms over the tape, forward mode and vmap, with PyTorch's (torch.func) and JAX's meanings.

All of them take and give nested dicts, lists, tuples and named tuples of Tensors, and compose in any order.
"""

from gpuad.autograd.forward import jvp
from gpuad.autograd.vmap import vmap
from gpuad.func.custom import custom_jvp, custom_vjp
from gpuad.func.derivatives import grad, grad_and_value, linearize, value_and_grad, vjp
from gpuad.func.jacobians import hessian, hvp, jacfwd, jacrev
from gpuad.func.modules import functional_call, stack_module_state

__all__ = [
    "custom_jvp", "custom_vjp", "functional_call", "grad", "grad_and_value", "hessian", "hvp", "jacfwd", "jacrev",
    "jvp", "linearize", "stack_module_state", "value_and_grad", "vjp", "vmap",
]  # fmt: skip
