"""What facts mean for a run. Rules are pure functions from facts to findings."""
