"""Tables: a tabular world and its policies, as the exact recursions read them."""

from typing import NamedTuple

import numpy as np

from jaxpg.envs import Mdp, check_mdp


class Tables(NamedTuple):
    """A world, the policy to improve and the policy that acts, in float64.

    Terminal states are absorbing: rewards and scores are 0 there, and the two policies are equal.
    """

    initial: np.ndarray  # [S]
    transition: np.ndarray  # [S, A, S]
    reward: np.ndarray  # [S, A]
    variance: np.ndarray  # [S, A]
    terminal: np.ndarray  # [S] bool
    observation: np.ndarray  # [S]
    horizon: int
    policy: np.ndarray  # [S, A]
    behaviour: np.ndarray  # [S, A]
    ratio: np.ndarray  # [S, A] policy / behaviour
    score: np.ndarray  # [S, A, P] grad log pi(a|s); parameters are [O, A], state-major
    edges: tuple[np.ndarray, np.ndarray] | None = None  # if few: successor, probability [S, A, K]

    def successor(self, x):
        """E'[x] [S, A, ...] of x [S, ...] over the successor state."""
        if self.edges is None:
            return np.tensordot(self.transition, x, axes=1)
        index, probability = (np.moveaxis(e, -1, 0) for e in self.edges)
        return sum(_scaled(p, x[i]) for i, p in zip(index, probability, strict=True))

    def carried(self, weight, x):
        """sum_a weight(s, a) E'[x] [S, ...] of x [S, ...], without building an array over (s, a)."""
        if self.edges is None:
            return np.tensordot(np.einsum("sa,sax->sx", weight, self.transition), x, axes=1)
        index, probability = (e.reshape(len(weight), -1) for e in self.edges)
        flow = np.repeat(weight, probability.shape[1] // weight.shape[1], axis=1) * probability
        return sum(_scaled(p, x[i]) for i, p in zip(index.T, flow.T, strict=True))

    def policy_mean(self, x):
        """sum_a pi(a|s) x(s, a) [S, ...] of x [S, A, ...]."""
        return average(self.policy, x)


class Moments(NamedTuple):
    """Moments of one trajectory's gradient estimate; a mean over N independent ones has covariance / N."""

    mean: np.ndarray  # [P]
    covariance: np.ndarray  # [P, P]

    @property
    def trace(self) -> float:
        """tr Cov: the expected squared distance to the mean."""
        return float(np.trace(self.covariance))


def tabulate(mdp: Mdp, logits, behaviour_logits=None) -> Tables:
    """The tables of a softmax policy over observations; on-policy without behaviour_logits.

    logits: [O, A]. Raises ValueError for another shape, for logits that give no distribution, and for
    actions that the policy takes but the behaviour never does.
    """
    mdp = check_mdp(mdp)
    initial, transition, reward, variance, terminal, observation = map(np.asarray, mdp[:6])
    num_states, num_actions = reward.shape
    table = acting = _check_logits(mdp, logits, "logits")
    if behaviour_logits is not None:
        acting = _check_logits(mdp, behaviour_logits, "behaviour_logits")
    policy, behaviour = softmax(table)[observation], softmax(acting)[observation]
    unsupported = (policy > 0) & (behaviour == 0) & ~terminal[:, None]
    if unsupported.any():
        state, action = np.argwhere(unsupported)[0]
        raise ValueError(
            f"importance sampling has no support: behaviour_logits never take action {action} in state "
            f"{state}, where the policy does"
        )
    policy[terminal] = behaviour[terminal] = 1.0 / num_actions
    ratio = policy / np.where(behaviour > 0, behaviour, 1.0)
    own_row = np.eye(len(table))[observation]
    # grad of log pi(a|s) = onehot(a) - pi(.|s) in the row of the observation, 0 elsewhere.
    within_row = np.eye(num_actions)[None] - policy[:, None]
    within_row[terminal] = 0.0
    score = np.einsum("so,sab->saob", own_row, within_row).reshape(num_states, num_actions, -1)
    reward, variance = (np.where(terminal[:, None], 0.0, x) for x in (reward, variance))
    transition = np.where(terminal[:, None, None], np.eye(num_states)[:, None], transition)
    return Tables(
        *(initial, transition, reward, variance, terminal, observation, mdp.horizon),
        *(policy, behaviour, ratio, score, _edges(transition)),
    )


def _edges(transition):
    """Successors of each (s, a), padded with probability 0; None if they are not few."""
    num_edges = int((transition > 0).sum(axis=-1).max())
    if 8 * num_edges * transition.shape[1] > transition.shape[0]:
        return None
    index = np.argsort(-transition, axis=-1, kind="stable")[..., :num_edges]
    return index, np.take_along_axis(transition, index, axis=-1)


def _scaled(weight, x):
    return weight.reshape(*weight.shape, *(1,) * (x.ndim - weight.ndim)) * x


def average(weight, x):
    """sum_a weight(s, a) x(s, a) [S, ...] of weight [S, A] and x [S, A, ...]."""
    return np.einsum("sa,sa...->s...", weight, x)


def occupancy(mdp: Mdp, logits) -> np.ndarray:
    """d_t(s) = P(s_t = s) [H, S] under the policy; ended episodes rest in their terminal state."""
    return visits(tabulate(mdp, logits))


def visits(world: Tables) -> np.ndarray:
    """`occupancy` for given tables, under the policy to improve."""
    rows = [world.initial]
    for _ in range(world.horizon - 1):
        rows.append(np.einsum("s,sa,sax->x", rows[-1], world.policy, world.transition))
    return np.stack(rows)


def values(mdp: Mdp, logits, gamma) -> tuple[np.ndarray, np.ndarray]:
    """V_t(s) [H+1, S] and Q_t(s, a) [H, S, A]: Q_t = r + gamma P V_{t+1}, V_t = sum_a pi Q_t, V_H = 0."""
    return action_values(tabulate(mdp, logits), gamma)


def action_values(world: Tables, gamma) -> tuple[np.ndarray, np.ndarray]:
    """V [H+1, S] and Q [H, S, A] of the policy to improve."""
    value, rows = np.zeros((world.horizon + 1, len(world.initial))), []
    for t in reversed(range(world.horizon)):
        rows.append(world.reward + gamma * world.successor(value[t + 1]))
        value[t] = world.policy_mean(rows[-1])
    return value, np.stack(rows[::-1])


def observation_values(mdp: Mdp, logits, gamma) -> tuple[np.ndarray, np.ndarray]:
    """V_t(o(s)) [H, S] and Q_t(o(s), a) [H, S, A]: means, weighted by d_t, over the states that look alike.

    They are the values of the best critic that sees only observations; 0 for those not seen at t.
    """
    world = tabulate(mdp, logits)
    value, action_value = action_values(world, gamma)
    seen = np.eye(world.observation.max() + 1)[world.observation]  # [S, O]
    weight = visits(world)[:, :, None] * seen
    met = weight.sum(axis=1, keepdims=True)
    weight = weight / np.where(met > 0, met, 1.0)
    by_state = np.einsum("txo,so->tsx", weight, seen)
    return np.einsum("tsx,tx->ts", by_state, value[:-1]), by_state @ action_value


def squared_returns(world: Tables, gamma) -> tuple[np.ndarray, np.ndarray]:
    """E[R_t^2 | s] [H+1, S] and E[R_t^2 | s, a] [H, S, A], reward noise included."""
    value, _ = action_values(world, gamma)
    square, rows = np.zeros_like(value), []
    for t in reversed(range(world.horizon)):
        ahead, ahead_square = world.successor(value[t + 1]), world.successor(square[t + 1])
        own = world.reward**2 + world.variance
        rows.append(own + 2 * gamma * world.reward * ahead + gamma**2 * ahead_square)
        square[t] = world.policy_mean(rows[-1])
    return square, np.stack(rows[::-1])


def objective(mdp: Mdp, logits, gamma) -> float:
    """J = E[sum_t gamma^t r_t] = sum_s p_0(s) V_0(s)."""
    return float(np.asarray(mdp.initial, float) @ values(mdp, logits, gamma)[0][0])


def return_variance(mdp: Mdp, logits, gamma) -> float:
    """Var[sum_t gamma^t r_t] of one episode, reward noise included."""
    return return_moments(tabulate(mdp, logits), gamma)[1]


def return_moments(world: Tables, gamma) -> tuple[float, float]:
    """The mean and the variance of one episode's return."""
    mean = world.initial @ action_values(world, gamma)[0][0]
    return float(mean), float(world.initial @ squared_returns(world, gamma)[0][0] - mean**2)


def gradient(mdp: Mdp, logits, gamma, *, from_start=True) -> np.ndarray:
    """grad J = sum_t gamma^t sum_s d_t(s) sum_a pi(a|s) u(s,a) Q_t(s,a) [P] (Sutton et al., 2000).

    from_start=False drops gamma^t, which makes it the gradient of no function.
    """
    world = tabulate(mdp, logits)
    _, action_value = action_values(world, gamma)
    weight = discounts(gamma if from_start else 1.0, world.horizon)[:, None] * visits(world)
    return np.einsum(
        "ts,sa,sap,tsa->p", weight, world.policy, world.score, action_value, optimize=True
    )


def gradients_ahead(world: Tables, action_value, weight) -> np.ndarray:
    """E[sum_{k>=t} c_k u_k R_k | s_t] [H+1, S, P] for weights c [H]."""
    rows = [np.zeros(world.score.shape[::2])]
    for t in reversed(range(world.horizon)):
        local = weight[t] * world.score * action_value[t][..., None]
        rows.append(world.policy_mean(local + world.successor(rows[-1])))
    return np.stack(rows[::-1])


def discounts(gamma, horizon) -> np.ndarray:
    """gamma^t [H]."""
    return float(gamma) ** np.arange(horizon)


def _check_logits(mdp, logits, name):
    table = np.asarray(logits, np.float64)
    expected = (int(mdp.observation.max()) + 1, mdp.reward.shape[1])
    if table.shape != expected:
        raise ValueError(
            f"{name} has shape {table.shape}; observations and actions need {expected}"
        )
    if not np.isfinite(table.max(axis=1)).all() or np.isnan(table).any():
        raise ValueError(f"{name} has a row that gives no distribution")
    return table


def softmax(logits):
    """The probabilities [..., A] of logits."""
    weight = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return weight / weight.sum(axis=-1, keepdims=True)
