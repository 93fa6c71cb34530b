"""The `fastslim` command."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("click", "yaml")


def main() -> None:
    """Runs the command line; without its packages it says in one sentence how to get them."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"the fastslim command needs {' and '.join(missing)}: pip install 'fastslim[cli]'")
    from fastslim.cli.commands import fastslim

    fastslim(prog_name="fastslim")


if __name__ == "__main__":
    main()
