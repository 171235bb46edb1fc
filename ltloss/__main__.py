"""`python -m ltloss` is the `ltloss` command."""

import sys

try:
    from ltloss.cli.command import main

    code = main()
except KeyboardInterrupt:  # before `main` could report it
    print("ltloss: interrupted", file=sys.stderr)
    code = 130
sys.exit(code)
