"""Entry point of ``python -m ltloss``, the ``ltloss`` command."""

import sys

try:
    from ltloss.cli.command import main

    code = main()
except KeyboardInterrupt:  # during the import, before `main` can report it
    print("ltloss: interrupted", file=sys.stderr)
    code = 130
sys.exit(code)
