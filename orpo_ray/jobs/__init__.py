"""Runs on a remote cluster: its files, its jobs and the way to it."""
