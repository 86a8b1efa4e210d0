"""Phase experts: adapters that take turns between noise levels, and how they are switched."""
