"""The `ltloss` command."""
