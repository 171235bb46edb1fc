"""The classification system around the losses: data, training, evaluation, prediction.

Needs the extra: `pip install 'ltloss[train]'`.
"""
