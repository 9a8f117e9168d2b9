"""The page of results: its cases are valid commands, and its table says what was measured."""

import importlib.util
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxpg.runs.config.config import check, completed
from jaxpg.runs.config.flags import parse

SCRIPT = Path(__file__).parent.parent / "scripts/results.py"
spec = importlib.util.spec_from_file_location("results", SCRIPT)
assert spec and spec.loader
results = importlib.util.module_from_spec(spec)
spec.loader.exec_module(results)


def test_cases_are_commands():
    parsed = [parse(shlex.split(case.arguments), "jaxpg train") for case in results.ALL.values()]
    for config, grid in parsed:
        check(config, completed(config, grid))
    assert len({repr(run) for run in parsed}) == len(parsed), "no case is there twice"


def test_the_page_has_means_intervals_and_worst_seeds():
    row = {
        "command": "jaxpg train CartPole-v1",
        "returns": [490.0, 500.0, 500.0, 450.0],
        "steps": 204800,
        "seconds": 4.2,
        "machine": "2 CPU cores",
    }
    text = results.page({"cartpole-ppo": row})
    (line,) = [x for x in text.splitlines() if "CartPole-v1`" in x and x.startswith("|")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    # 450, 490, 500 and 500 have mean 485; t(3) = 3.18 standard errors of 11.9 would reach 522.9, which no
    # episode can return. The middle two average 495.
    assert cells[1] == "475" and cells[2].startswith("485.0 [")
    low, high = map(float, cells[2].removeprefix("485.0 [").removesuffix("]").split(", "))
    assert 450 <= low < 470 and 495 < high <= 500
    assert cells[3].startswith("495.0 [") and cells[4:] == ["450.0", "2e+05", "4"]
    assert "2 CPU cores" in text and "{" not in text


def test_trained_policies_are_compared_with_untrained_ones():
    row = {
        "command": "jaxpg train navix/Navix-Empty-5x5-v0",
        "returns": [1.0, 0.9, 0.2],
        "untrained": [0.1, 0.3, 0.0],
        "steps": 2e5,
        "seconds": 12.3,
        "machine": "2 CPU cores",
    }
    # Of the 20 ways to choose 3 of the 6, two have a sum of at least 2.1: these, and with 0.3 for 0.2.
    assert results.improvement(np.array(row["returns"]), np.array(row["untrained"])) == 2 / 20
    text = results.page({"empty": row})
    (line,) = [x for x in text.splitlines() if "Navix-Empty" in x]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1].startswith("0.13 [") and cells[2].startswith("0.70 [")
    assert cells[3:] == ["0.1", "3", "2e+05", "12"]


def test_the_long_cases_are_the_short_ones_for_more_updates(monkeypatch):
    monkeypatch.setattr(results, "_trained", lambda case, given: {"returns": given})
    row = results.run("minatar-breakout", quick=False, long=True)
    config, _ = parse(row["returns"], "jaxpg train")
    steps = config.updates * config.num_envs * (config.num_steps or 0)
    assert 0.99e7 < steps <= 1e7 and config.network == "cnn"
    start, grid = parse(row["untrained"], "jaxpg train")
    assert start.updates == 1 and grid.learning_rate == grid.critic_learning_rate == (0.0,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["cartpole"], "unknown case 'cartpole'"),
        (["--quick"], "give --out DIR"),
        (["suites", "--long"], "--long is for minatar"),
    ],
)
def test_mistakes_are_one_clear_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["results", *arguments])
    with pytest.raises(SystemExit) as exit_:
        results.main()
    assert exit_.value.code == 2 and message in capsys.readouterr().err
