"""Runs on a cluster that is elsewhere: its files."""
