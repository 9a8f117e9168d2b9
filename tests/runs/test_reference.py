"""A run that is held to the policy of another run, from the command line."""

import json

import jax
import numpy as np
import pytest
from small_runs import FLAGS, resume, start

from jaxpg.runs.config.flags import request
from jaxpg.runs.train.run import prepare
from jaxpg.runs.train.saved import choose, read_run

HELD = ("--kl-estimate", "k3", "--kl-coef", "0.5", "--updates", "4")


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reference") / "first"
    start(folder, "--updates", "4", "--learning-rate", "0.05")
    return folder


def apart(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return np.array([json.loads(line)["kl_reference"] for line in lines])


@pytest.mark.slow
def test_the_reference_is_the_run_s_best_policy_and_survives_a_resume(first, tmp_path):
    start(tmp_path / "whole", *HELD, "--reference", str(first))
    assert (apart(tmp_path / "whole")[0] > 0).all(), "a fresh policy is not the reference"
    start(tmp_path / "half", *HELD, "--updates", "2", "--reference", str(first))
    resume(tmp_path / "half", "--updates", "4")
    np.testing.assert_array_equal(apart(tmp_path / "half"), apart(tmp_path / "whole"))
    # All seeds have the same reference, which no update moves.
    config, grid, _ = request(
        [*FLAGS.split(), *HELD, "--reference", str(first), "--run", str(tmp_path / "new")], ""
    )
    parts = prepare(config, grid).parts
    state = parts.trainer.init(jax.random.key(0))
    best = read_run(first)
    chosen = choose(best, None)
    pairs = zip(*map(jax.tree.leaves, (state.data[0].params, best.params.policy)), strict=True)
    for held, saved in pairs:
        np.testing.assert_array_equal(held, saved[chosen])


@pytest.mark.slow
def test_without_one_it_is_the_policy_at_the_start(tmp_path):
    start(tmp_path / "run", "--kl-estimate", "reward", "--updates", "2")
    found = apart(tmp_path / "run")
    assert (found[0] == 0).all() and (found[1] > 0).all()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--kl-estimate", "k2", "--hidden", "5"), r"its policy has .*layers_0/bias=\(4,\), and"),
        (("--kl-estimate", "k2", "--activation", "relu"), r"has activation=tanh, and this run's"),
        ((), "give --kl-estimate reward, or k1, k2 or k3"),
        (("--kl-estimate", "k4"), "unknown KL estimate 'k4'"),
        (("--kl-estimate", "k2", "--algorithm", "ppo_kl"), "kl_coef weighs the KL of each update"),
        (("--kl-estimate", "reward", "--num-batches", "2"), "actions, but replay.* of others"),
    ],
)
def test_a_reference_that_cannot_be_is_one_line(first, tmp_path, flags, message):
    given = [*FLAGS.split(), "--reference", str(first), *flags, "--run", str(tmp_path / "new")]
    with pytest.raises(ValueError, match=message) as refused:
        prepare(*request(given, "jaxpg train")[:2])
    assert "\n" not in str(refused.value) and not (tmp_path / "new").exists()
