"""What ``ltloss doctor``, ``ltloss tune`` and ``ltloss plan`` run."""
