"""How a run survives a session: kept work, checkpoints, callbacks, processes, tracking."""
