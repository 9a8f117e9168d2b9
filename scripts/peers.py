"""PPO of a peer, measured like jaxpg's own: run by scripts/benchmark --peers in an environment of its own.

python peers.py rejax|sb3 NUM_ENVS UPDATES REPEATS prints one line of JSON.
"""

import json
import sys
import time

STEPS, EPOCHS, PARTS, RATE, ENTROPY, EVALUATION = 128, 4, 4, 1e-3, 0.01, 128


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


if __name__ == "__main__":
    name, *numbers = sys.argv[1:]
    print(json.dumps({"rejax": rejax, "sb3": sb3}[name](*map(int, numbers))))
