"""Compiler options for programs that run only a few times: compiling them is most of a test's time."""

import jax

# Without kernels for fusions XLA's CPU compiler takes a third of the time, and programs run up to half as
# long again.
QUICK = (
    {"xla_backend_optimization_level": 0, "xla_cpu_use_fusion_emitters": False}
    if jax.default_backend() == "cpu"
    else None
)
