"""The embedded default: clinical cases with computed answers, and the small base model that learns to reason on them."""
