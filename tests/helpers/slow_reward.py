"""A reward that takes its time and changes nothing, so that a run can be stopped between two of its steps."""

import time


def same_for_all(groups, options, context):
    time.sleep(options["seconds"])
    return [[0.0] * len(group.completions) for group in groups]
