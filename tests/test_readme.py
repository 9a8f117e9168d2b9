"""The Python of the README and of the pages runs as it stands, at small sizes; commands and links hold."""

import re
import shlex
from pathlib import Path

import jax
import pytest

from jaxpg.runs.config.flags import parse
from jaxpg.runs.config.processes import take
from jaxpg.runs.sweep.search import take_options
from jaxpg.runs.train.build import build

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = sorted((ROOT / "scripts/pages").glob("*.md"))
TINY = "updates=1, num_envs=2, num_steps=8, num_minibatches=1, evaluation_episodes=2, quiet=True"
SMALLER = {
    "num_updates=50": "num_updates=1",
    "jax.random.key(0), 64)": "jax.random.key(0), 2)",
    "jnp.linspace(0.2, 2.0, 64)": "jnp.linspace(0.2, 2.0, 2)",
    "(source, 1000)": "(source, 64)",
    "seeds=8": f"seeds=1, {TINY}",
    "run.evaluate(1000": "run.evaluate(2",
    'run("ladder", quick=True)': 'run("ladder", quick=True, trajectories=64, estimators="rtg")',
}


def blocks(path, language):
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL)


@pytest.mark.slow
def test_the_python_blocks_run(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = "\n".join(block for path in (README, *PAGES) for block in blocks(path, "python"))
    for size, small in SMALLER.items():
        assert size in code
        code = code.replace(size, small)
    exec(code, {})
    assert "0.0123" in capsys.readouterr().out


def test_an_environment_and_a_network_of_twenty_lines_are_built(tmp_path, monkeypatch):
    """As for `jaxpg train mine:walk --network mine:torso`."""
    (own,) = (block for block in blocks(README, "python") if block.startswith("# mine.py"))
    assert len([line for line in own.splitlines() if line.strip()]) <= 20
    (tmp_path / "mine.py").write_text(own)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = "mine:walk --network mine:torso --settings length=12"
    env, agent, *_ = build(parse(words.split(), "jaxpg train")[0])
    assert env.horizon == 12
    # Dense(16) on one entry, and the layer that gives two logits.
    sizes = jax.tree.map(lambda x: x.size, jax.eval_shape(agent.policy.init, jax.random.key(0)))
    assert sum(jax.tree.leaves(sizes)) == 16 * 2 + 2 * 17


def test_the_quickstart_is_short():
    for block in blocks(README, "python")[:2]:
        assert len([line for line in block.splitlines() if line.strip()]) <= 15


def test_the_readme_is_one_page():
    prose = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    assert len(prose.split()) <= 750
    for name in re.findall(r"!\[[^]]+\]\(([^)]+)\)", prose):
        assert (ROOT / name).stat().st_size < 60_000


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_every_command_can_be_read(path):
    """The flags of train and sweep exist and take the values that are written."""
    text = "\n".join(blocks(path, "sh")).replace("\\\n", " ")
    for line in re.findall(r"^jaxpg (?:train|sweep) .*", text, re.MULTILINE):
        command, *words = shlex.split(line, comments=True)[1:]
        if {"--resume", "--config", "--join"} & {*words}:
            continue  # these read a folder
        words = take([word for word in words if word != "--resume-or-start"], "jaxpg train")[1]
        if command == "sweep":
            words = take_options(words)[1]
        parse(words, f"jaxpg {command}")


@pytest.mark.parametrize("path", [README, *PAGES], ids=lambda path: path.stem)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("https://") or (path.parent / target).exists(), target
