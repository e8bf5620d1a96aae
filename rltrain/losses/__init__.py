"""Losses of the policy, one file each: the term of a token that :mod:`rltrain.loss` weighs and adds up."""
