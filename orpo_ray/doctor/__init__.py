"""What a machine or a cluster lacks for a run, found before the run starts.

Probes gather facts, rules turn facts into findings. Neither starts a run or changes a setting.
"""
