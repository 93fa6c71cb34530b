"""``python -m fastslim``: the `fastslim` command."""

from fastslim.cli.main import main

main()
