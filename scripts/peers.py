"""PPO of jaxpg and its peers, measured alike; scripts/benchmark --peers runs each in its environment.

Each prints one line of JSON:
python peers.py jaxpg|rejax|sb3 NUM_ENVS UPDATES REPEATS    speed in one setting
python peers.py rejax-seeds|sb3-seeds SEEDS STEPS SEED      returns in its own setting
"""

import json
import sys
import time

STEPS, EPOCHS, PARTS, RATE, ENTROPY, EVALUATION = 128, 4, 4, 1e-3, 0.01, 128


def jaxpg(num_envs: int, updates: int, repeats: int) -> dict:
    """Train on two cores if there are two, as the command does for one agent."""
    from functools import partial

    import jax

    from jaxpg import Hyperparams, evaluate, make_trainer, train
    from jaxpg.devices import on_two_devices
    from jaxpg.envs import from_gymnax
    from jaxpg.policies import actor_critic
    from jaxpg.runs.train.replicas import use_cpu_cores
    from jaxpg.training.algorithm import algorithm

    use_cpu_cores()
    env = from_gymnax("CartPole-v1")
    agent = actor_critic(env, hidden=(64, 64))
    row = algorithm("ppo")._replace(num_epochs=EPOCHS, num_minibatches=PARTS)
    trainer = make_trainer(env, agent, row, num_envs=num_envs, num_steps=STEPS)
    found = Hyperparams(learning_rate=RATE, critic_learning_rate=RATE, entropy_coef=ENTROPY)
    hyperparams = jax.tree.map(jax.numpy.float32, found)
    learn = on_two_devices(partial(train, trainer, num_updates=updates))
    state = jax.jit(trainer.init)(jax.random.key(0))
    started = time.perf_counter()
    compiled = jax.jit(learn).lower(state, hyperparams).compile()
    compile_seconds, seconds, after = time.perf_counter() - started, [], state
    for _ in range(repeats):
        started = time.perf_counter()
        after, _ = jax.block_until_ready(compiled(state, hyperparams))
        seconds.append(time.perf_counter() - started)
    params = jax.device_put(after.params, jax.devices()[0])
    score = jax.jit(partial(evaluate, env, agent, num_episodes=EVALUATION))
    mean = float(score(params, jax.random.key(1)).mean)
    return {"compile_seconds": compile_seconds, "seconds": seconds, "return": mean}


def rejax(num_envs: int, updates: int, repeats: int) -> dict:
    import jax
    from rejax import get_algo

    algo = get_algo("ppo").create(
        env="CartPole-v1",
        agent_kwargs={"hidden_layer_sizes": (64, 64), "activation": "tanh"},
        num_envs=num_envs,
        num_steps=STEPS,
        num_epochs=EPOCHS,
        num_minibatches=PARTS,
        learning_rate=RATE,
        ent_coef=ENTROPY,
        total_timesteps=num_envs * STEPS * updates,
        eval_freq=num_envs * STEPS * updates,
    )

    def learn(state):
        step = lambda state, _: (algo.train_iteration(state), None)  # noqa: E731
        return jax.lax.scan(step, state, length=updates)[0]

    state = jax.jit(algo.init_state)(jax.random.key(0))
    started = time.perf_counter()
    compiled = jax.jit(learn).lower(state).compile()
    compile_seconds, seconds, after = time.perf_counter() - started, [], state
    for _ in range(repeats):
        started = time.perf_counter()
        after = jax.block_until_ready(compiled(state))
        seconds.append(time.perf_counter() - started)
    from rejax.evaluate import evaluate

    act = algo.make_act(after)
    _, returns = evaluate(act, jax.random.key(1), algo.env, algo.env_params, EVALUATION)
    return {"compile_seconds": compile_seconds, "seconds": seconds, "return": float(returns.mean())}


def sb3(num_envs: int, updates: int, repeats: int) -> dict:
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    total, seconds, model = num_envs * STEPS * updates, [], None
    for _ in range(repeats):
        model = PPO(
            "MlpPolicy",
            make_vec_env("CartPole-v1", num_envs),
            n_steps=STEPS,
            batch_size=num_envs * STEPS // PARTS,
            n_epochs=EPOCHS,
            learning_rate=RATE,
            ent_coef=ENTROPY,
            device="cpu",
        )
        started = time.perf_counter()
        model.learn(total)
        seconds.append(time.perf_counter() - started)
    mean, _ = evaluate_policy(model, make_vec_env("CartPole-v1", 8), n_eval_episodes=EVALUATION)
    return {"compile_seconds": 0.0, "seconds": seconds, "return": float(mean)}


def rejax_seeds(seeds: int, steps: int, seed: int) -> dict:
    """The setting of rejax's configs/gymnax/cartpole.yaml; all seeds run in one program, evaluated once."""
    import jax
    from rejax import get_algo
    from rejax.evaluate import evaluate

    algo = get_algo("ppo").create(
        env="CartPole-v1",
        agent_kwargs={"activation": "tanh"},
        num_envs=5,
        num_steps=100,
        num_epochs=5,
        num_minibatches=5,
        learning_rate=0.00075,
        max_grad_norm=0.5,
        total_timesteps=steps,
        eval_freq=steps,
        gamma=0.99,
        gae_lambda=0.95,
        clip_eps=0.2,
        ent_coef=0.01,
        vf_coef=0.5,
    )

    def learn(key):
        step = lambda state, _: (algo.train_iteration(state), None)  # noqa: E731
        state = jax.lax.scan(step, algo.init_state(key), length=steps // 500)[0]
        act = algo.make_act(state)
        return evaluate(act, jax.random.fold_in(key, 1), algo.env, algo.env_params, EVALUATION)[1]

    returns = jax.jit(jax.vmap(learn))(jax.random.split(jax.random.key(seed), seeds))
    return {"returns": returns.mean(1).tolist()}


def sb3_seed(seed: int, steps: int) -> float:
    """The setting of the peer's own tuned hyperparameters for CartPole-v1."""
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    torch.set_num_threads(1)
    model = PPO(
        "MlpPolicy",
        make_vec_env("CartPole-v1", 8, seed=seed),
        n_steps=32,
        batch_size=256,
        gae_lambda=0.8,
        gamma=0.98,
        n_epochs=20,
        ent_coef=0.0,
        learning_rate=lambda left: 1e-3 * left,
        clip_range=lambda left: 0.2 * left,
        seed=seed,
        device="cpu",
    )
    model.learn(steps)
    envs = make_vec_env("CartPole-v1", 8, seed=seed + 10**6)
    return float(evaluate_policy(model, envs, n_eval_episodes=EVALUATION)[0])


def sb3_seeds(seeds: int, steps: int, seed: int) -> dict:
    """Run one process per core, each with one thread."""
    import multiprocessing
    import os

    first = 1000 * seed
    jobs = [(first + i, steps) for i in range(seeds)]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        return {"returns": pool.starmap(sb3_seed, jobs, chunksize=1)}


MODES = {
    "jaxpg": jaxpg,
    "rejax": rejax,
    "sb3": sb3,
    "rejax-seeds": rejax_seeds,
    "sb3-seeds": sb3_seeds,
}

if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    print(json.dumps(MODES[name](*map(int, numbers))))
