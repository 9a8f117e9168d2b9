"""Shared set-up: no silent rank promotion, room in jaxlib's thread pool, and a compilation cache per run."""

import gc
import os
import tempfile

# jaxlib 0.10.0 to 0.11.0 can hang in batched LAPACK calls on two cores; read when jaxlib is loaded.
os.environ.setdefault("NPROC", "16")
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# The exact module's small matrices gain nothing from threads that spin on cores that others need.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
# A test compiles for seconds what runs for milliseconds: without optimisation, with XLA's plainer code
# generator and in one piece, a program compiles in a sixth of the time. `XLA_FLAGS= scripts/test` tests the
# programs that users get.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false "
    "--xla_cpu_parallel_codegen_split_count=1",
)
# The processes of this run share compiled programs. The folder is deleted with the run, so that the next
# run's time does not depend on it; the user's cache is not touched.
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
    """Collect what orbax leaves behind after a failure here, not while another test parses Python.

    asyncio logs such a task with its traceback; for that, Python 3.11 parses source in the middle of another
    parse, and fails (AST constructor recursion depth mismatch).
    """
    yield
    gc.collect()
