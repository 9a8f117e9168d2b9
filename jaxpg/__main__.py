"""`python -m jaxpg` is the command `jaxpg`."""

from jaxpg.cli import main

main()
