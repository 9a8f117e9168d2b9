"""Sweeps whose points an Optuna study chooses, and what it is told; nothing is trained."""

import sys

import numpy as np
import pytest
from small_runs import FLAGS, prepared

from jaxpg.runs.sweep import ranking, study

DRAWN = f"{FLAGS} --updates 2 --learning-rate 1e-4:1e-2:log --gamma .9,.99 --random 3"


def opened(tmp_path, name="CartPole-v1 ppo"):
    optuna = pytest.importorskip("optuna")
    storage = f"sqlite:///{tmp_path}/study.db"
    return storage, optuna.create_study(
        storage=storage, study_name=name, direction="maximize", load_if_exists=True
    )


def results(returns, evaluated):
    found = ranking.nothing_yet(len(returns), 2, 1)
    found.returns[:], found.evaluated[:] = np.array(returns)[:, None], np.array(evaluated)[:, None]
    return found


@pytest.mark.slow
def test_a_study_chooses_points_and_is_told_their_returns(tmp_path):
    storage, mine = opened(tmp_path)
    mine.enqueue_trial({"learning_rate": 5e-3, "gamma": 0.99})
    _, search, *_ = one = prepared(f"{DRAWN} --study {storage}", tmp_path / "one")
    asked = study.ask(tmp_path / "one", one.config, search)
    first = asked.points[0]
    assert (first.learning_rate, first.gamma, asked.trials) == (5e-3, 0.99, [0, 1, 2])
    for point in asked.points:
        assert 1e-4 <= point.learning_rate <= 1e-2 and point.gamma in (0.9, 0.99)
        assert point._replace(learning_rate=0, gamma=0) == first._replace(learning_rate=0, gamma=0)
    # The same sweep gets its own trials again, and another gets others.
    assert study.ask(tmp_path / "one", one.config, search)[1:] == asked[1:]
    other = study.ask(tmp_path / "other", one.config, search)
    assert other.trials == [3, 4, 5]
    study.tell(asked, search, results([7.0, np.nan, 3.0], [True, True, False]))
    study.tell(other, search)
    names = ["COMPLETE", "FAIL", "PRUNED", "FAIL", "FAIL", "FAIL"]
    assert [x.state.name for x in mine.trials] == names
    assert mine.best_value == 7.0 and mine.best_params == {"learning_rate": 5e-3, "gamma": 0.99}


def test_a_study_is_told_of_a_grid(tmp_path):
    storage, named = opened(tmp_path, "grid")
    flags = f"{FLAGS} --updates 2 --learning-rate 1e-4:1e-2:log3 --study {storage}#grid"
    found = prepared(flags, tmp_path / "r")
    asked = study.ask(tmp_path / "r", found.config, found.search)
    assert asked.points == found.search.points and asked.trials is None
    study.tell(asked, found.search)  # nothing was trained, so nothing is said
    assert named.trials == []
    study.tell(asked, found.search, results([1.0, 2.0, 3.0], [True] * 3))
    told = [(x.params["learning_rate"], x.value) for x in named.trials]
    assert told == [(1e-4, 1.0), (1e-3, 2.0), (1e-2, 3.0)]
    (space,) = named.trials[0].distributions.values()
    assert space.log and (space.low, space.high) == (1e-4, 1e-2)


def test_a_study_that_cannot_be_opened_is_one_line(tmp_path, monkeypatch):
    flags = f"{DRAWN} --study sqlite:///{tmp_path}/none/study.db"
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "optuna", None)
        with pytest.raises(
            ValueError, match=r"^--study needs optuna: .*pip install .*\[optuna\]'$"
        ):
            prepared(flags, tmp_path / "r")
    pytest.importorskip("optuna")
    found = prepared(flags, tmp_path / "r")
    with pytest.raises(ValueError, match=r"^the study in sqlite:///.*none/study.db .*$"):
        study.ask(tmp_path / "r", found.config, found.search)
