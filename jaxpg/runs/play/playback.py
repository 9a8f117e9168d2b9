"""The commands evaluate, record and render, which run a trained policy."""

import errno
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from jaxpg.devices import check_devices, check_present, compiler_options
from jaxpg.envs import Env, make_env
from jaxpg.policies import Agent, AgentParams, init_params
from jaxpg.rollout import Evaluation, episodes
from jaxpg.rollout import evaluate as evaluate_policy
from jaxpg.runs.config.config import ALL, Config, points
from jaxpg.runs.console import parser, say, whole
from jaxpg.runs.host import health
from jaxpg.runs.play import policy as policies
from jaxpg.runs.play.experts import expert
from jaxpg.runs.play.policy import Policy, policy_of
from jaxpg.runs.store.folder import write_atomically
from jaxpg.runs.store.trajectories import write_trajectories
from jaxpg.runs.train.build import named, settings_of
from jaxpg.runs.train.replicas import make_replicas, replicated, use_cpu_cores
from jaxpg.runs.train.report import table
from jaxpg.runs.train.saved import Run, choose, read_run, recast
from jaxpg.stats.intervals import attained

MOST_FRAMES = 2000


def evaluate(argv: Sequence[str]) -> None:
    """`jaxpg evaluate RUN`: fresh episodes of every replica; nothing is written. Raises ValueError."""
    options = _parser("evaluate", "Evaluate every policy of a run over fresh episodes.")
    options.add_argument(
        "--episodes", type=whole(1), metavar="N", help="for each policy; default: as in the run"
    )
    options.add_argument(
        "--devices", type=whole(1), metavar="N", help="that share the policies; default: all"
    )
    given = options.parse_args(list(argv))
    use_cpu_cores()
    devices = check_present(given.devices)
    run = _read(given)
    count = run.config.evaluation_episodes if given.episodes is None else given.episodes
    found = evaluation(run, count, given.greedy, given.seed, devices)
    how = "greedy" if given.greedy else "sampled"
    shape = -1, run.config.seeds
    attainable = attained(found.smallest, found.largest)
    returns = np.asarray(found.mean).reshape(shape)
    say(
        f"{run.config.environment}, {run.config.algorithm}: {count} fresh episodes, {how} actions",
        *table(run.grid, returns, run.diverged.reshape(shape), attainable),
    )


def _read(given) -> Run:
    """Reads the run, and says so if its parameters change precision."""
    run = read_run(given.run, given.update)
    if said := recast(run):
        say(said)
    return run


def evaluation(
    run: Run, count: int, greedy: bool, seed: int = 0, devices: int | None = None
) -> Evaluation:
    """Evaluates every replica, over the same episodes as at the end of training if seed is 0.

    devices: how many of this machine's, by default all, however many the run was trained on.
    """
    shared = replace(run.config, devices=str(devices or ALL), shard="replicas")
    replicas = make_replicas(shared, points(run.grid))
    keys = replicas.evaluation_keys
    if seed:
        keys = jax.vmap(lambda key: jax.random.fold_in(key, seed))(keys)

    def evaluated(params, key):
        return evaluate_policy(run.parts.env, run.parts.agent, params, key, count, greedy)

    program = replicated(evaluated, (0, 0), replicas.sharding, ())
    arguments = jax.device_put(run.params, replicas.sharding), keys
    return jax.device_get(
        _fitting(program.lower(*arguments).compile(compiler_options(None)), count)(*arguments)
    )


def _fitting(compiled: Any, count: int) -> Any:
    """The program of `count` episodes. Raises ValueError if it needs more memory than there is."""
    health.check_episodes(compiled, count)
    return compiled


def record(argv: Sequence[str]) -> None:
    """`jaxpg record RUN --episodes N --out FILE.npz`: whole episodes. Raises ValueError.

    `jaxpg record ENV --expert ...` records a scripted expert.
    """
    options = _parser("record", "Record whole episodes of a run's policy, as demonstrations.")
    options.add_argument(
        "--expert", action="store_true", help="RUN is an environment: record its scripted expert"
    )
    options.add_argument("--settings", help="settings of the expert's environment, as in size=16")
    options.add_argument("--episodes", type=whole(1), metavar="N", required=True)
    _add_out(options, ".npz")
    given = options.parse_args(list(argv))
    out = _writable(given.out, (".npz",))
    check_devices()
    actor = _expert(given) if given.expert else _trained(given)
    roll = jax.jit(lambda key: episodes(actor.env, actor.agent, actor.params, key, given.episodes))
    key = jax.random.key(given.seed)
    trajectory, _ = jax.device_get(
        _fitting(roll.lower(key).compile(compiler_options(None)), given.episodes)(key)
    )
    steps = int(trajectory.mask.any(axis=1).sum())  # rows after the longest episode hold nothing
    trajectory = jax.tree.map(lambda x: x[:steps], trajectory)
    write_trajectories(out, trajectory, actor.environment)
    mean = float((trajectory.reward * trajectory.mask).sum() / given.episodes)
    say(
        f"{given.episodes} episodes of {actor.name}, {int(trajectory.mask.sum()):,} steps, mean "
        f"return {mean:.4g}: {out}"
    )


class _Actor(NamedTuple):
    """The policy to record, and its environment."""

    env: Env
    agent: Agent
    params: AgentParams
    environment: str  # with the flags of its wrappers
    name: str


def _trained(given) -> _Actor:
    run = _read(given)
    chosen = choose(run, given.replica)
    env, agent, *_ = run.parts
    if given.greedy:
        agent = agent._replace(policy=policies.greedily(agent.policy))
    params = jax.tree.map(lambda x: x[chosen], run.params)
    return _Actor(env, agent, params, named(run.config), f"replica {chosen}")


def _expert(given) -> _Actor:
    settings = settings_of(Config(given.run, settings=given.settings))
    env = make_env(given.run, **settings)
    agent = Agent(expert(given.run, env, **settings))
    return _Actor(env, agent, init_params(agent, jax.random.key(0)), given.run, "a scripted expert")


def render(argv: Sequence[str]) -> None:
    """`jaxpg render RUN --out FILE.gif`: one episode as GIF or MP4. Raises ValueError."""
    options = _parser("render", "Draw one episode of a run's policy.")
    _add_out(options, ".gif or .mp4")
    given = options.parse_args(list(argv))
    out = _writable(given.out, (".gif", ".mp4"))
    encoder = _encoder() if out.suffix == ".mp4" else ""
    check_devices()
    run = _read(given)
    policy, environment = policy_of(run, given.replica, given.greedy), run.config.environment
    frames, total = film(policy, environment, jax.random.key(given.seed))
    from jaxpg.runs.play.frames import frames_per_second

    save = _save_mp4 if encoder else _save_gif
    save(out, frames, frames_per_second(environment), encoder)
    say(f"{len(frames)} frames of replica {policy.replica}, return {total:.1f}: {out}")


def film(policy: Policy, environment: str, key: Any) -> tuple[list, float]:
    """The frames of one episode, from its start to its end, and its return."""
    from jaxpg.runs.play.frames import frame

    env = policy.env

    @jax.jit
    def advance(key, state, obs, carry, first):
        k_act, k_env = jax.random.split(key)
        action, carry = policy.step(k_act, obs[None], carry, first[None])
        state, result = env.step(k_env, state, action[0])
        return state, result, carry

    k_reset, key = jax.random.split(key)
    state, obs = jax.jit(env.reset)(k_reset)
    carry, total, frames, ended = policy.initial_carry(1), 0.0, [], False
    for t in range(min(MOST_FRAMES, env.horizon + 1)):
        shown = jax.device_get((state, obs))
        caption = f"{environment}   step {t}   return {total:.4g}"
        frames.append(frame(environment, *shown, caption=caption))
        if ended:
            break
        k_step, first = jax.random.fold_in(key, t), np.array(t == 0)
        state, result, carry = advance(k_step, state, obs, carry, first)
        obs, total = result.obs, total + float(result.reward)
        ended = bool(result.terminated | result.truncated)
    return frames, total


def _save_gif(path, frames, rate, encoder):
    del encoder
    first, *others = [frame.quantize(32) for frame in frames]
    write_atomically(
        path,
        lambda file: first.save(
            file, "GIF", save_all=True, append_images=others, duration=1000 // rate, loop=0
        ),
    )


def _save_mp4(path, frames, rate, encoder):
    width, height = frames[0].size
    part = path.with_name(f".{path.stem}.part.mp4")
    command = [encoder, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24"]
    command += ["-s", f"{width}x{height}", "-r", str(rate), "-i", "-", "-pix_fmt", "yuv420p"]
    try:
        done = subprocess.run(
            [*command, str(part)], input=b"".join(f.tobytes() for f in frames), capture_output=True
        )
        if done.returncode:
            raise ValueError(f"{encoder} failed: {done.stderr.decode(errors='replace').strip()}")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _encoder() -> str:
    found = shutil.which("ffmpeg")
    if found is None:
        try:
            from imageio_ffmpeg import get_ffmpeg_exe
        except ImportError:
            raise ValueError(
                "an .mp4 needs ffmpeg, which is not on the path; install it, or write a .gif"
            ) from None
        found = get_ffmpeg_exe()
    return found


def _parser(name, description):
    found = parser(name, description)
    add = found.add_argument
    add("run", metavar="RUN", help="folder of a jaxpg train run")
    add("--greedy", action="store_true", help="take the likeliest action, not a sample")
    add(
        "--update",
        type=whole(word="best"),
        metavar="N",
        help="checkpoint: number of updates, or best; default: the last",
    )
    add("--seed", type=whole(0, 2**32 - 1), default=0, help="seed of the episodes; default: 0")
    return found


def _add_out(options, kinds):
    options.add_argument("--out", metavar="FILE", required=True, help=f"file to write, {kinds}")
    options.add_argument(
        "--replica",
        type=whole(word="best"),
        metavar="R",
        default="best",
        help="number of the agent, or best by the final evaluation; default: best",
    )


def _writable(name, suffixes) -> Path:
    """The path, checked. Raises ValueError before anything is computed."""
    path = Path(name)
    if path.suffix not in suffixes:
        raise ValueError(f"--out {name} must end in {' or '.join(suffixes)}")
    try:
        if not path.parent.is_dir():
            raise ValueError(f"--out {name}: there is no folder {path.parent}")
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        write_atomically(path.with_name(f"{path.name}.probe"), lambda file: None)
        path.with_name(f"{path.name}.probe").unlink()
    except OSError as error:
        raise ValueError(f"--out {name} cannot be written: {error.strerror}") from error
    return path
