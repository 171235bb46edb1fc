"""The ``ltloss`` command."""
