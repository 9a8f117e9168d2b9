"""The list of environments that can be made on this machine: `jaxpg envs [WORD]`."""

from collections.abc import Iterator, Sequence

from jaxpg.envs import SUITES, Box, Discrete, env_names, installed, make_env
from jaxpg.envs.suites import installing
from jaxpg.runs.config.presets import PRESETS
from jaxpg.runs.console import say, shortened

WIDTH = 79
HELP = """\
usage: jaxpg envs [WORD]

List environments with their observations, actions, longest episode and the
algorithms that have a preset for them.

Without WORD: gymnax's, those that other packages declare, and the suites. With
WORD: all whose name contains it, those of installed suites too.

examples: jaxpg envs car
          jaxpg envs brax/
"""


def execute(argv: Sequence[str]) -> None:
    """Prints the list, each line as soon as it is known. Raises ValueError for anything but one word."""
    if {"-h", "--help"} & {*argv}:
        say(*HELP.splitlines())
        return
    if len(argv) > 1 or (argv and argv[0].startswith("-")):
        raise ValueError(f"jaxpg envs takes one word, not {shortened(' '.join(argv))!r}")
    word = argv[0].lower() if argv else None
    found = False
    for name in _names(word):
        if not found:
            say(_line("environment", "observation", "action", "steps", "presets"))
        found = True
        say(described(name))
    if word is None:
        say("", *suites())
    elif not found:
        absent = [suite for suite in SUITES if not installed(suite)]
        hint = f"; not installed: {', '.join(absent)}" if absent else ""
        raise ValueError(f"no environment here has {shortened(word)!r} in its name{hint}")


def _names(word: str | None) -> Iterator[str]:
    for suite in (None, *(SUITES if word else ())):
        if suite is None or installed(suite):
            yield from (name for name in env_names(suite) if (word or "") in name.lower())


def described(name: str) -> str:
    """A line on one environment, or the reason why it cannot be made.

    >>> described("CartPole-v1").split()
    ['CartPole-v1', 'Box', '4', 'Discrete', '2', '500', 'ppo,', 'vpg,', 'reinforce_baseline']
    """
    try:
        env = make_env(name)
    except ValueError as error:
        return f"{name:<{NAME}}  {str(error).removeprefix(name).lstrip(': ')}"
    presets = ", ".join(row for environment, row in PRESETS if environment == name)
    return _line(name, _said(env.observation), _said(env.action), str(env.horizon), presets)


NAME = 26  # of most environments


def _line(name, observation, action, steps, presets) -> str:
    return f"{name:<{NAME}} {observation:<14} {action:<14} {steps:>6}  {presets}".rstrip()


def _said(space) -> str:
    if isinstance(space, Box):
        return f"Box {'x'.join(map(str, space.shape))}"
    if isinstance(space, Discrete):
        return f"Discrete {space.n}"
    return f"MultiDiscrete {len(space.nvec)}"


def suites() -> Iterator[str]:
    """Lines on the suites: how many environments each has, or how to install it."""
    for name, suite in SUITES.items():
        yield f"{name:<10} {suite.summary}"
        yield f"{'':<10} " + (
            f"{len(env_names(name))} environments: jaxpg envs {name}/"
            if installed(name)
            else f"not installed: {installing(name)}"
        )
