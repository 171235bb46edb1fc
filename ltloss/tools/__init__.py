"""The commands ``ltloss doctor``, ``ltloss tune`` and ``ltloss plan``."""
