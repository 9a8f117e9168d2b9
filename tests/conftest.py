"""Tests run without silent rank promotion, with room in jaxlib's thread pool and a cache of the run's own."""

import gc
import os
import tempfile

# jaxlib 0.10.0 to 0.11.0 can hang in batched LAPACK calls on two cores; read when jaxlib is loaded.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The exact module's small matrices gain nothing from threads that spin on the cores of others.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A test compiles for seconds what runs for milliseconds: without optimisation, with XLA's plainer code
# generator and in one piece, a program compiles in a sixth of the time. `XLA_FLAGS= scripts/test` tests the
# programs that users get.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)
# What one process of this run compiles the others read. The folder goes with the run: nothing is left to the
# next one, whose time would depend on it, and the user's is not touched.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _programs = tempfile.TemporaryDirectory(prefix="jaxpg-tests-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name

import jax
import pytest

from jaxpg.runs.host.cache import use_compilation_cache

# Traces are many small objects that live on: a seventh of the time went into looking for cycles among them.
gc.set_threshold(100_000, 50, 100)
jax.config.update("jax_numpy_rank_promotion", "raise")
use_compilation_cache()


@pytest.fixture
def x64():
    """Float64 for the length of a test."""
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", False)


@pytest.fixture
def failed_reads():
    """What orbax leaves of a failure is collected here: not while another test parses Python.

    asyncio logs such a task with its traceback, for which Python 3.11 parses source in the middle of a parse,
    and fails (AST constructor recursion depth mismatch).
    """
    yield
    gc.collect()
