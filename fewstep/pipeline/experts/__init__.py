"""Phase experts: which adapter serves which steps, switched by the scheduler."""
