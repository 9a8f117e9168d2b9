"""Grids, and the table of presets behind the flags."""

import re
from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxpg.devices import built_for
from jaxpg.envs import env_names, installed
from jaxpg.optimizers import BATCH_SCALINGS, OPTIMIZERS, SCHEDULES
from jaxpg.policies import DISTRIBUTIONS, NETWORKS, init_params
from jaxpg.policies.layers import ACTIVATIONS, PRECISIONS
from jaxpg.runs.config.config import COUNTS, Config, Grid, check, completed, points, varying
from jaxpg.runs.config.flags import parse, request
from jaxpg.runs.config.presets import PRESETS, preset
from jaxpg.runs.config.processes import FLAGS
from jaxpg.runs.config.rows import settled
from jaxpg.runs.store.folder import description
from jaxpg.runs.train.build import build, build_algorithm
from jaxpg.training.algorithm import ALGORITHMS
from jaxpg.types import HYPERPARAMS, Hyperparams

TRAINABLE = [
    name for name, row in ALGORITHMS.items() if not row.data.demonstrations
]  # the others need demonstrations


def test_a_grid_has_every_combination_once():
    _, grid = preset("CartPole-v1", "ppo")
    grid = grid._replace(learning_rate=(0.1, 0.2, 0.3), gamma=(0.5, 0.9))
    seen = [(p.learning_rate, p.gamma) for p in points(grid)]
    assert seen == [(a, b) for a in (0.1, 0.2, 0.3) for b in (0.5, 0.9)]
    assert varying(grid) == ["learning_rate", "gamma"]


@pytest.mark.parametrize("key", PRESETS)
def test_a_preset_names_what_exists(key):
    environment, algorithm = key
    suite = environment.rpartition("/")[0]
    known = env_names(suite or None) if not suite or installed(suite) else [environment]
    assert environment in {"*", *known}
    assert algorithm in {"*", *ALGORITHMS}
    assert PRESETS[key].keys() <= {f.name for f in fields(Config)} | set(Hyperparams._fields)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", TRAINABLE)
@pytest.mark.parametrize("environment", sorted({e for e, _ in PRESETS} - {"*"}))
def test_every_combination_of_presets_builds(environment, algorithm):
    suite = environment.rpartition("/")[0]
    if suite and not installed(suite):
        pytest.skip(f"{suite} is not installed")
    config, grid = preset(environment, algorithm)
    grid = completed(config, grid)
    check(config, grid)
    build(config)
    assert grid.schedule_updates == (config.updates,)


def test_a_rows_counts_hold_unless_a_preset_or_a_flag_says_otherwise(monkeypatch):
    counts = {"num_epochs": 10, "num_minibatches": 2, "critic_epochs": 3, "critic_minibatches": 5}
    new = ALGORITHMS["ppo"]._replace(**counts)
    monkeypatch.setitem(ALGORITHMS, "new", new)
    config, _ = parse(
        ["CartPole-v1", "--algorithm", "new", "--num-minibatches", "8"], "jaxpg train"
    )
    expected = counts | {"num_minibatches": 8}
    for found in (build_algorithm(config), settled(config)):
        assert {name: getattr(found, name) for name in COUNTS} == expected
    row = build_algorithm(preset("CartPole-v1", "ppo")[0])
    assert (row.num_epochs, row.num_minibatches) == (4, 8), "the row's, and the preset's"


def test_every_hyperparameter_stands_once_in_the_table():
    assert [*HYPERPARAMS] == [*Hyperparams._fields]
    for name, number in HYPERPARAMS.items():
        number.check(name, getattr(Hyperparams(), name))
        assert number.help and (number.hint or number.least == -np.inf)


@pytest.mark.parametrize(
    ("flag", "table"),
    [
        ("algorithm", TRAINABLE),
        ("network", NETWORKS),
        ("distribution", DISTRIBUTIONS),
        ("activation", ACTIVATIONS),
        ("precision", PRECISIONS),
        ("optimizer", OPTIMIZERS),
        ("schedule", SCHEDULES),
        ("batch_scaling", BATCH_SCALINGS),
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


@pytest.mark.slow
def test_flags_wrap_the_environment():
    """CartPole with actions taken twice; observations are 3 steps of 2 entries and the previous action."""
    flags = "CartPole-v1 --keep 0,2 --repeat 2 --history 3 --normalise"
    config, grid = parse(flags.split(), "jaxpg train")
    assert (config.keep, config.repeat, config.history, config.normalise) == ((0, 2), 2, 3, True)
    check(config, completed(config, grid))
    parts = build(config)
    assert parts.env.observation.shape == (3 * (2 + 2),) and parts.env.horizon == 250
    params = init_params(parts.agent, jax.random.key(0))
    assert params.policy["statistics"].mean.shape == params.critic["statistics"].mean.shape == (12,)
    plain, _ = preset("CartPole-v1", "ppo")
    assert build(plain).env.observation.shape == (4,)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("CartPole-v1 --keep 4", "keep=4 must name entries of the observation: 0 to 3"),
        ("Catch-bsuite --keep 0", "keep chooses entries of a vector"),
        ("CartPole-v1 --history 0", "history=0 must be at least 1"),
        ("CartPole-v1 --repeat 0", "repeat=0 must be at least 1"),
        ("CartPole-v1 --reference-batch 0", "reference_batch=0 must be at least 1"),
        ("CartPole-v1 --weight-decay -1", "weight_decay=-1 must not be negative"),
        ("FrozenLake-misc --normalise", "normalise scales real observations"),
        ("CartPole-v1 --network cnn", r"observations are Box of shape \[4\]; use mlp"),
        ("Breakout-MinAtar --network cnn --stride 5 --channels 8,8", "after 1 there are 2 x 2"),
        ("Pendulum-v1 --distribution gausian", "unknown distribution 'gausian'"),
        ("Pendulum-v1 --distribution categorical", "does not fit actions that are Box"),
        ("CartPole-v1 --distribution beta", "but the actions are Discrete"),
        ("CartPole-v1 --distribution bernoulli", "use categorical"),
        ("Pendulum-v1 --distribution beta --state-dependent-std", "is for gaussian and tanh"),
        ("CartPole-v1 --state-dependent-std", "but the distribution is categorical"),
    ],
)
def test_wrong_flags_are_one_clear_line(flags, message):
    config, grid = parse(flags.split(), "jaxpg train")

    def prepare():
        check(config, completed(config, grid))
        build(config)

    with pytest.raises(ValueError, match=message) as error:
        prepare()
    assert "\n" not in str(error.value)


def test_64_bits_on_a_jax_that_loses_32_is_refused(x64, monkeypatch):
    monkeypatch.delattr(jax, "enable_x64", raising=False)
    with pytest.raises(ValueError, match=r"^64 bits need jax 0.8 or newer, and this is \d.*update"):
        build(preset("CartPole-v1", "ppo")[0])


@pytest.mark.parametrize("flags", [("--config", ""), ("--resume=",), ("CartPole-v1", "--run", "")])
def test_an_empty_name_is_a_flag_without_its_value(flags):
    """An unset shell variable gives an empty name, which must not stand for the current folder."""
    with pytest.raises(ValueError, match=f"^{flags[-2:][0].strip('=')} lacks its value"):
        request(flags, "jaxpg train")


def test_every_field_is_a_flag(capsys):
    with pytest.raises(SystemExit) as exit_:
        parse(["CartPole-v1", "--help"], "jaxpg train")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    names = [f.name for f in fields(Config) if f.name != "environment"] + list(Grid._fields)
    flags = [n.strip("_").replace("_", "-") for n in names]
    several = [flag.removeprefix("--") for flag in FLAGS]
    shown = re.findall(r"^  --(?:no-)?(\S+)", text, re.M)
    assert sorted(shown) == sorted([*flags, "config", "resume", "resume-or-start", *several])
    sections = re.findall(r"^(\w+):$", text, re.M)
    assert sections[2:] == ["task", "size", "algorithm", "networks", "numbers", "output", "machine"]
    assert max(map(len, text.splitlines())) <= 80


def check_products(config, precision):
    """Both factors of the three products of the policy and of the critic have this precision."""
    obs, first = jnp.ones((1, 2, 4)), jnp.ones((1, 2), bool)
    for network in build(config).agent[:2]:
        assert network is not None
        params = jax.eval_shape(network.init, jax.random.key(0))
        text = jax.jit(network.apply).lower(params, (), obs, first).as_text()
        asked = re.findall(r"dot_general.*precision = \[(\w+), (\w+)\]", text)
        assert asked == [(precision.upper(),) * 2] * 3


@pytest.mark.parametrize("precision", PRECISIONS)
def test_products_have_the_precision_that_is_asked_for(precision):
    config, _ = parse(["CartPole-v1", "--precision", precision], "jaxpg train")
    check_products(config, precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "chip", "precision"),
    [
        ([], "tpu", "high"),
        ([], "gpu", "highest"),
        ([], "cpu", "highest"),
        (["--precision", "default"], "tpu", "default"),
    ],
)
def test_the_precision_is_the_chips_own_and_recorded(flags, chip, precision):
    config, grid = parse(["CartPole-v1", *flags], "jaxpg train")
    with built_for(chip):
        check_products(config, precision)
        assert description(config, grid, [])["precision"]["matmul"] == precision
