"""Estimators against an exactly known policy gradient: ``judge`` in a test, ``python -m rltrain.compare.gradients``."""

from rltrain.compare.gradients.families import FAMILIES as FAMILIES
from rltrain.compare.gradients.families import Family as Family
from rltrain.compare.gradients.judging import Judgement as Judgement
from rltrain.compare.gradients.judging import judge as judge
