"""Launchers: each starts the same worker command, on this machine or on a cluster.

A launcher is a function `launch(job, reporter)` in a module of its own. Nothing of what makes a run correct is in here:
a launcher may lose or repeat workers as it likes.
"""
