"""The README's Python runs as it stands, at small sizes."""

import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
SMALLER = {
    "num_updates=50": "num_updates=1",
    "jax.random.key(0), 64)": "jax.random.key(0), 2)",
    "jnp.linspace(0.2, 2.0, 64)": "jnp.linspace(0.2, 2.0, 2)",
    "(source, 1000)": "(source, 64)",
}


@pytest.mark.slow
def test_the_python_blocks_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    code = "\n".join(blocks)
    for size, small in SMALLER.items():
        assert size in code
        code = code.replace(size, small)
    exec(code, {})
    assert "0.0123" in capsys.readouterr().out


def test_the_quickstart_is_short():
    first = re.search(r"```python\n(.*?)```", README.read_text(), re.DOTALL).group(1)
    assert len([line for line in first.splitlines() if line.strip()]) <= 15
