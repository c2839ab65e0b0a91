"""Launchers: each starts the same worker command, on this machine or on a cluster.

A launcher is a module with a `LAUNCHER`, and its own settings are a base of `SubmitConfig`. Nothing of what makes a run
correct is in here: a launcher may lose or repeat workers as it likes.
"""
