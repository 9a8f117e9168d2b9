"""Runs that tests make share what they compile."""

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxpg.experiment.cache import use_compilation_cache


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def cache(cache_folder):
    """Programs compiled once, for this process and those it starts."""
    names = [n for n in dir(jax.config) if "persistent_cache" in n or "compilation_cache_" in n]
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(cache_folder))
        compilation_cache.reset_cache()
        use_compilation_cache()
        yield cache_folder
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
