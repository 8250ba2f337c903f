"""Before you rent: does a run fit, how long does it take, what does it cost. No torch, no Ray."""
