"""`fewstep doctor train`: what a run will cost and where it would go wrong, before it starts."""
