"""Compiler options for programs that run a few times: most of a test's time is to compile them."""

import jax

# Without kernels for fusions XLA's CPU compiler took a third of the time; programs then run up to half
# as long again.
QUICK = (
    {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    if jax.default_backend() == "cpu"
    else None
)
