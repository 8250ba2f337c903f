"""What is looked at on one server. Probes tell facts, and change nothing that stays."""
