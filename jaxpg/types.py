"""The data that flows through jaxpg: time steps, trajectories, hyperparameters.

Arrays are time-major, `[T, B, ...]`: T steps of B environments.
"""

import math
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple, get_type_hints

if TYPE_CHECKING:
    from jax import Array
else:
    Array = Any  # the command's help reads Hyperparams, and must not wait for jax

Key = Array
Params = Any
Carry = Any
Metrics = dict[str, Array]


class TimeStep(NamedTuple):
    """What one environment returns for one step, before any reset.

    >>> TimeStep(obs=0.0, reward=1.0, terminated=False, truncated=True).reward
    1.0
    """

    obs: Array  # the true successor observation
    reward: Array  # []
    terminated: Array  # [] bool: the MDP ended, nothing follows
    truncated: Array  # [] bool: a time limit cut the episode, whose value continues


class Trajectory(NamedTuple):
    """T steps of B environments, [T, B, ...]; rows after an episode's end have mask False and zeros.

    >>> Trajectory._fields[-4:]
    ('mask', 'value', 'next_value', 'reference')
    """

    obs: Array
    action: Array  # as sampled; the environment clips it
    log_prob: Array  # under the behaviour policy, of the action as sampled
    reward: Array
    discount: Array  # 0 where terminated, else 1; gamma is applied later
    first: Array  # bool: obs opens an episode
    last: Array  # bool: the episode ended here, either way
    mask: Array  # bool: the step counts
    value: Array  # V(obs); 0 without a critic
    next_value: (
        Array  # V(true successor), also at truncation; where terminated, discount cancels it
    )
    reference: Any = ()  # log-prob of the action under a fixed reference policy; () without one


class Number(NamedTuple):
    """A hyperparameter's meaning in words, where it applies, and its range."""

    help: str
    where: str = ""  # "": everywhere
    least: float = -math.inf
    most: float = math.inf
    above: bool = False  # least itself is not allowed
    hint: str = ""  # a value that works

    def check(self, name: str, value: float) -> None:
        """Raises ValueError for a value outside the range."""
        if self.least < value <= self.most or (value == self.least and not self.above):
            return
        must = "must not be negative"
        if self.most < math.inf:
            must = f"must lie in [{self.least:g}, {self.most:g}]"
        elif self.above:
            must = f"must be above {self.least:g}"
        raise ValueError(f"{name}={value:g} {must}; {self.hint}")


_RATE = Number("", least=0, hint="try 1e-3")
_SHARE = Number("", least=0, most=1)
_POSITIVE = Number("", least=0, above=True)
_CLIPS = _POSITIVE._replace(hint="a large one, such as 1e9, never clips")
_NATURAL = "npg, trpo, enac"


class Hyperparams(NamedTuple):
    """Numbers that training reads: traced and vmappable, never a shape and never a switch.

    The only table of them: each has its default, meaning, place and range.

    >>> Hyperparams(gamma=0.9)._replace(lambda_=0.5)[2:4]
    (0.9, 0.5)
    """

    learning_rate: Annotated[Any, _RATE._replace(help="step size of the policy's optimizer")] = 1e-3
    critic_learning_rate: Annotated[
        Any, _RATE._replace(help="step size of the critic's optimizer", where="rows with a critic")
    ] = 1e-3
    gamma: Annotated[Any, _SHARE._replace(help="discount per step", hint="try 0.99")] = 0.99
    lambda_: Annotated[
        Any,
        _SHARE._replace(
            help="lambda of the lambda-return (GAE is the lambda-return minus V)",
            where="credit lambda_return",
            hint="try 0.95",
        ),
    ] = 0.95
    clip_eps: Annotated[
        Any,
        _POSITIVE._replace(
            help="epsilon of the clipped surrogate: ratios outside 1 +- epsilon are clipped",
            where="ppo",
            hint="try 0.2",
        ),
    ] = 0.2
    clip_eps_high: Annotated[
        Any,
        _POSITIVE._replace(
            help="epsilon above 1, where it differs from clip_eps below",
            where="dapo, gspo, cispo",
            hint="try 0.28",
        ),
    ] = 0.28
    entropy_coef: Annotated[Any, Number("weight of the entropy bonus")] = 0.0
    kl_coef: Annotated[
        Any,
        Number("weight of the KL penalty", "ppo_kl, --kl-estimate", least=0, hint="try 1"),
    ] = 1.0
    target_kl: Annotated[
        Any,
        _POSITIVE._replace(
            help="KL per update, in nats per step, that --adaptation steers to",
            where="rows that adapt",
            hint="try 0.01",
        ),
    ] = 0.01
    stop_kl: Annotated[
        Any,
        _POSITIVE._replace(
            help="a minibatch with a larger KL ends the policy's steps for that update",
            where="rows with several steps per batch",
            hint="a large one, such as 1e9, never stops",
        ),
    ] = 1e9
    max_kl: Annotated[
        Any,
        _POSITIVE._replace(
            help="KL of one step, in nats per step of the batch", where=_NATURAL, hint="try 0.01"
        ),
    ] = 0.01
    damping: Annotated[
        Any,
        Number("added to the diagonal of the Fisher matrix", _NATURAL, least=0, hint="try 0.1"),
    ] = 0.1
    value_clip_eps: Annotated[
        Any,
        _CLIPS._replace(
            help="how far the critic's loss lets a value move per update; a large number is no limit",
            where="rows with a critic",
        ),
    ] = 1e9
    value_coef: Annotated[
        Any,
        Number(
            "weight of the critic's gradient, that of half its squared error, in a shared torso's",
            "--shared-torso",
            least=0,
            hint="try 0.5",
        ),
    ] = 0.5
    ess_floor: Annotated[
        Any,
        _SHARE._replace(
            help="a batch of old data is dropped when its effective sample share is below this",
            where="off_policy, impala",
            hint="try 0.1",
        ),
    ] = 0.1
    normaliser_coef: Annotated[
        Any, Number("weight of the log normaliser of the self-normalised weights", "guided")
    ] = 0.0
    max_grad_norm: Annotated[
        Any, _CLIPS._replace(help="gradients are scaled down to this global norm")
    ] = 0.5
    weight_decay: Annotated[
        Any,
        Number(
            "decay of weight matrices, in units of the learning rate",
            "adamw, lion and muon",
            least=0,
            hint="try 1e-2",
        ),
    ] = 0.0
    schedule_updates: Annotated[
        Any,
        _POSITIVE._replace(
            help="updates over which the learning-rate schedule runs; on the command line, 0 means all",
            hint="leave it out to mean all updates",
        ),
    ] = 1e9


HYPERPARAMS: dict[str, Number] = {
    name: kind.__metadata__[0]
    for name, kind in get_type_hints(Hyperparams, include_extras=True).items()
}
