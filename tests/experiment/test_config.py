"""Grids, and the table of presets behind the flags."""

from dataclasses import fields, replace

import pytest

from jaxpg.algorithms import ALGORITHMS
from jaxpg.envs import gymnax_names
from jaxpg.experiment.build import build, build_algorithm
from jaxpg.experiment.config import Config, Grid, check, completed, points, varying
from jaxpg.experiment.flags import parse
from jaxpg.experiment.presets import PRESETS, preset
from jaxpg.optimizers import OPTIMIZERS, SCHEDULES
from jaxpg.policies import NETWORKS
from jaxpg.policies.networks import ACTIVATIONS
from jaxpg.types import Hyperparams

TRAINABLE = [name for name, row in ALGORITHMS.items() if not row.imitates]


def test_a_grid_has_every_combination_once():
    _, grid = preset("CartPole-v1", "ppo")
    grid = grid._replace(learning_rate=(0.1, 0.2, 0.3), gamma=(0.5, 0.9))
    seen = [(p.learning_rate, p.gamma) for p in points(grid)]
    assert seen == [(a, b) for a in (0.1, 0.2, 0.3) for b in (0.5, 0.9)]
    assert varying(grid) == ["learning_rate", "gamma"]


@pytest.mark.parametrize("key", PRESETS)
def test_a_preset_names_what_exists(key):
    environment, algorithm = key
    assert environment in {"*", *gymnax_names()}
    assert algorithm in {"*", *TRAINABLE}
    assert PRESETS[key].keys() <= {f.name for f in fields(Config)} | set(Hyperparams._fields)


@pytest.mark.parametrize("algorithm", TRAINABLE)
@pytest.mark.parametrize("environment", sorted({e for e, _ in PRESETS} - {"*"}))
def test_every_combination_of_presets_builds(environment, algorithm):
    config, grid = preset(environment, algorithm)
    grid = completed(config, grid)
    check(config, grid)
    build(config)
    assert grid.schedule_updates == (config.updates,)


@pytest.mark.parametrize("algorithm", TRAINABLE)
def test_epochs_agree_with_the_algorithm_table(algorithm):
    """The help cannot read that table, which needs jax; so the presets repeat it."""
    row = build_algorithm(preset("", algorithm)[0])
    for name in ("num_epochs", "critic_epochs"):
        assert getattr(row, name) == getattr(ALGORITHMS[algorithm], name)


@pytest.mark.parametrize(
    ("flag", "table"),
    [
        ("algorithm", TRAINABLE),
        ("network", NETWORKS),
        ("activation", ACTIVATIONS),
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
    ],
)
def test_help_names_every_choice(flag, table):
    (text,) = (f.metadata["help"] for f in fields(Config) if f.name == flag)
    assert [name for name in table if name not in text] == []


@pytest.mark.parametrize("order", ["{env} {flags}", "{flags} {env}", "{flags} --quiet {env}"])
def test_flags_fill_both_types_in_any_order(order):
    flags = "--algorithm=vpg --learning-rate 1e-3,3e-4 --lambda .9 --hidden 32,16"
    config, grid = parse(order.format(env="CartPole-v1", flags=flags).split(), "jaxpg train")
    expected, preset_grid = preset("CartPole-v1", "vpg")
    assert config == replace(expected, hidden=(32, 16), quiet="--quiet" in order)
    assert grid == preset_grid._replace(learning_rate=(1e-3, 3e-4), lambda_=(0.9,))


def test_every_field_is_a_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["CartPole-v1", "--help"], "jaxpg train")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    names = [f.name for f in fields(Config) if f.name != "environment"] + list(Grid._fields)
    missing = [n for n in names if f"--{n.strip('_').replace('_', '-')}" not in text]
    assert missing == []
